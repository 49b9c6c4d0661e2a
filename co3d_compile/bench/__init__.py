"""Times of the compiled file beside the clip model. No import here: a compiled file is timed without PyTorch."""
