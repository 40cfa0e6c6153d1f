"""What lies on disk of a training that goes on."""
