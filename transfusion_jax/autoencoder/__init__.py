"""Autoencoders: pixels to the latents that a transformer is fed, and back."""
