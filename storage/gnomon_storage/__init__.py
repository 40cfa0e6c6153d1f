"""Where bytes live: locations, activation stores, manifests, checkpoints, artifacts."""
