"""From an image grid to vectors of the transformer and back."""
