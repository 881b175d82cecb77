"""The verdict: candidates against float64, at the capture, at every fold site, at the outputs, and on data."""
