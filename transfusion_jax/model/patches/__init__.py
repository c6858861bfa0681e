"""Patch encoders: from an image grid to vectors of the transformer and back."""
