"""The control plane: REST, queue, dispatcher."""
