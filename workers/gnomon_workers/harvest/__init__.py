"""From text to activations: read documents, pack contexts, run the model up to the last hook, store rows."""
