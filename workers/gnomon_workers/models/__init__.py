"""A model looked up, and loaded: from the hub, a folder or a GGUF file."""
