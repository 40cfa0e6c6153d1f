"""HTTP: routes, who may, what is refused and how it is said."""
