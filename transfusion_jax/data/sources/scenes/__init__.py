"""Scenes: coloured shapes on a grid, with captions and edits whose truth is known."""
