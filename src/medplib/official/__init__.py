"""The published MedPLIB: its names, configuration, tokenizer and evaluation quirks, translated to ours."""
