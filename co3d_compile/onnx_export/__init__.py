"""From the step graph to ONNX."""
