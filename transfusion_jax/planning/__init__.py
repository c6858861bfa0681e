"""The training step compiled for TPUs you do not have: memory, FLOPs, collectives, a roofline."""
