"""From queued jobs to attempts on the cluster, and their reports back."""
