"""The constants of an ONNX file."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from bnfold.errors import InputError
from bnfold.evaluate.subject import Array


class Weight:
    """An initializer, read and raised where it is used: there is never a second model in memory."""

    def __init__(self, tensor: onnx.TensorProto, beside: Path | None) -> None:
        self._beside, self._tensor, self._array = beside, None, None
        if onnx.external_data_helper.uses_external_data(tensor):
            self._tensor = tensor
        else:
            self._array = onnx.numpy_helper.to_array(tensor)

    @property
    def dtype(self) -> str:
        """The name of its dtype."""
        if self._array is not None:
            return self._array.dtype.name
        assert self._tensor is not None
        return str(onnx.helper.tensor_dtype_to_np_dtype(self._tensor.data_type).name)

    def array(self) -> Array:
        """Its value, as it is stored."""
        if self._array is not None:
            return self._array
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._tensor)
        try:  # refuses what lies outside of the folder
            onnx.external_data_helper.load_external_data_for_tensor(tensor, os.fspath(self._beside or os.devnull))
            return onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise InputError(
                f"the external data of '{tensor.name}' cannot be read: {' '.join(str(error).split())[:200]}",
                hint="Keep the model's own .data file beside it, in the same folder",
            ) from error
