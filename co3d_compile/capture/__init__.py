"""From a module or a file to a program, one front end a file."""
