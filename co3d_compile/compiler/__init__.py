"""``compile``, the compiled model, tuning."""
