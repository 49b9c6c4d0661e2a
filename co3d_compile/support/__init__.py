"""Numbers as text, files that appear whole, memory, PyTorch kept quiet."""
