"""Noise schedules, corruption and targets, samplers."""
