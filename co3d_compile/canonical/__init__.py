"""One form for operators that can be written in many."""
