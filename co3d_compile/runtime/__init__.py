"""A session over a compiled file."""
