"""Measuring a model: metrics, and the report that a model card is made of."""
