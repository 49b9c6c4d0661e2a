"""Other shapes of the result: 8 bits, half states, Triton, the step in PyTorch."""
