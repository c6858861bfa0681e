"""The training machine, which knows no model: loop, checkpoints, metrics, update."""
