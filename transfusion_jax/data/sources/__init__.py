"""Where documents come from: what is built in, and prepared data."""
