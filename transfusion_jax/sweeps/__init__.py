"""Sweeps: named experiments, run one after another and shown in one table. Imports no JAX: the
devices belong to the runs."""
