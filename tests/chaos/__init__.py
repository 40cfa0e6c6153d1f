"""Faults at random moments, and one checker of what they leave; `make chaos` for more of them."""
