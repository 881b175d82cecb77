"""bnfold: fold every per-channel affine into its neighbours, export ONNX, prove the file equal."""

from bnfold._version import __version__

__all__ = ["__version__"]
