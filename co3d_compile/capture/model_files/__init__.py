"""Archives, checkpoints and factories: what may stand in a file from elsewhere, and what becomes of it."""
