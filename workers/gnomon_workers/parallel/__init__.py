"""The (dp, features) mesh and the exact collectives on it. `axis` is a mesh axis, `dim` a tensor dimension."""
