"""Suites: prompts, running them on an engine, and pictures of the results."""
