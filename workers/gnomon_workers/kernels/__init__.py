"""The products that a training step spends its time in, in three implementations of one interface."""
