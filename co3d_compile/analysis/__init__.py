"""What is known of several nodes: windows, receptive field, costs."""
