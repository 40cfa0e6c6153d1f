"""How good a dictionary is, measured on text it never saw."""
