"""What lies on disk of a trained dictionary."""
