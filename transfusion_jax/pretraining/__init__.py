"""What is pretrained here: objective, state, step, run."""
