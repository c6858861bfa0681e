"""Trained weights for other tools, and weights of others for a run."""
