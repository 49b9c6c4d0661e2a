"""A file in the layout of this machine's kernels."""
