"""The compiled file against the untouched network."""
