"""ONNX files in float64."""
