"""A model behind HTTP as a runner, by the Open Inference Protocol (KServe V2) that Triton and others speak.

    BNFOLD_ENDPOINT=http://127.0.0.1:8000/v2/models/net python -m bnfold check net.py:make \\
        --runner examples/runners/http_endpoint.py:infer

JSON writes a float32 as the shortest decimal that reads back as the same number, so no digit is lost on the way.
"""

from __future__ import annotations

import json
import os
import urllib.request

import numpy as np

ENDPOINT = os.environ.get("BNFOLD_ENDPOINT", "http://127.0.0.1:8000/v2/models/net")
#: The protocol's names of numpy's dtypes; what JSON has no numbers for (float16) goes as a binary extension only.
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float32": "FP32", "float64": "FP64",
}  # fmt: skip
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}


def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One request; outputs by the names that the server gives them."""
    tensors = [
        {"name": name, "shape": array.shape, "datatype": DATATYPES[array.dtype.name], "data": array.ravel().tolist()}
        for name, array in inputs.items()
    ]
    request = urllib.request.Request(
        f"{ENDPOINT}/infer", json.dumps({"inputs": tensors}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        outputs = json.load(response)["outputs"]
    return {
        output["name"]: np.array(output["data"], DTYPES[output["datatype"]]).reshape(output["shape"])
        for output in outputs
    }
