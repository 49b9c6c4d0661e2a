"""Clips that are computed in chunks, as the same operators on the whole clip."""
