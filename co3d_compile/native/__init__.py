"""A file in the layout of this machine's kernels."""

CONVERTER = 1  # the version of what this package makes: a form that another version has kept is not used
