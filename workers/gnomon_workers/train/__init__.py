"""The training loop: batches in, checkpoints and metrics out."""
