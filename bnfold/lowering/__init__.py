"""A program -> ONNX."""
