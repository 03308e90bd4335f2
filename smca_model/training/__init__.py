"""Training: the losses and their matching, the step, and the run around it with its checkpoints and metrics."""
