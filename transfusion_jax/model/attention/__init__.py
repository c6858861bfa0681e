"""Interval attention: one contract, several implementations."""
