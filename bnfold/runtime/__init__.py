"""ONNX Runtime: sessions and providers that tell the truth, and how long they take."""
