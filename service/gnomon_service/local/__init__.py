"""Everything on one machine: `gnomon up` and `gnomon demo`."""
