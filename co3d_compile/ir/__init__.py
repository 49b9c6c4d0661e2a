"""The program, facts, layouts, index equations, marker operators, the pass manager, arguments of ATen operators."""
