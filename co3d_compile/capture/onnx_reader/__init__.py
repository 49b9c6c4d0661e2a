"""ONNX clip models as modules that ``torch.export`` captures: one file per family of operators."""
