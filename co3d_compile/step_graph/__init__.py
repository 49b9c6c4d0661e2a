"""The step graph in the making."""
