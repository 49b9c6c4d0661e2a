"""Loops over frames, which a capture writes out turn by turn: as one operator, or as the body on all frames at once."""
