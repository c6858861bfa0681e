"""The transformer and what is around it."""
