"""The commands. Each module holds one; what they share is in `common`, `output_file`, `progress` and `summary`."""
