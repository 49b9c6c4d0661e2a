"""What a compiled file promises, as data and as JSON."""
