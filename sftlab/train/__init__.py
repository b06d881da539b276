"""Training: the trainer, its child process, checkpoints, memory and time."""
