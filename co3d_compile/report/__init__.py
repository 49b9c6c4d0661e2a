"""The report as text, page and picture."""
