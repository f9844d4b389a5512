"""Mask decoders: image features and prompt embeddings in, mask logits out; and back to image pixels."""
