"""The runners in examples/, each against what it is for; OpenVINO's is in ``test_openvino.py``."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnfold
from bnfold.runtime.runtime import cuda_problem, open_session

torch.set_num_threads(1)
RUNNERS = Path(__file__).resolve().parent.parent / "examples" / "runners"
DTYPES = {"FP32": np.float32, "INT64": np.int64}


class Net(nn.Module):
    """Floats and integers in, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.norm = nn.Embedding(7, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.layer(x) + self.table(ids))
        return y.relu(), y.sum(1)


ARGS = (torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5]))


@functools.cache
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """A server of the exported file on this machine; what it is called with scales its floats."""
    bnfold.export(net(), tmp_path / "net.onnx", ARGS, device="cpu")
    session, scale = open_session(tmp_path / "net.onnx"), [1.0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v2/models/net/infer":
                return self.send_error(404)
            feeds = {t["name"]: np.array(t["data"], DTYPES[t["datatype"]]).reshape(t["shape"]) for t in asked["inputs"]}
            found = zip(session.outputs, session.run(feeds))
            outputs = [
                {
                    "name": v.name,
                    "shape": a.shape,
                    "datatype": "FP32",
                    "data": (a * np.float32(scale[0])).ravel().tolist(),
                }
                for v, a in found
            ]
            body = json.dumps({"model_name": "net", "outputs": outputs}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("BNFOLD_ENDPOINT", f"http://127.0.0.1:{server.server_port}/v2/models/net")
    yield lambda factor: scale.__setitem__(0, factor)
    server.shutdown()
    thread.join()
    server.server_close()


def judge(file: str, **options: Any) -> bnfold.CheckReport:
    return bnfold.check(None, net(), ARGS, runner=f"{RUNNERS / file}:infer", **options)


def test_a_model_behind_http_passes_to_the_last_digit_and_a_wrong_one_fails(served: Callable[[float], None]) -> None:
    report = judge("http_endpoint.py")
    assert report.passed and {o.output for o in report.outputs} == {"output_0", "output_1"}, report
    served(1.001)
    assert judge("http_endpoint.py").verdict == "fail"


def test_an_endpoint_that_fails_is_told(
    served: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    monkeypatch.setenv("BNFOLD_ENDPOINT", os.environ["BNFOLD_ENDPOINT"].replace("models/net", "models/other"))
    report = judge("http_endpoint.py")
    assert report.verdict == "fail" and "HTTPError: HTTP Error 404" in report.problems[0]


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "precision"), [("infer", None), ("infer_float16", "float16")])
def test_tensorrt(name: str, precision: str | None, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed: pip install tensorrt")
    if (problem := cuda_problem()) is not None or not torch.cuda.is_available():
        pytest.skip(problem or "this torch has no CUDA, which holds the example's memory")
    runner = f"{RUNNERS / 'tensorrt_engine.py'}:{name}"
    report = bnfold.export(net(), tmp_path / "net.onnx", ARGS, device="cpu", runner=runner, precision=precision)
    assert report.passed, report.check


@pytest.mark.parametrize("path", sorted(RUNNERS.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_it_is_run(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said is not None and f"--runner examples/runners/{path.name}:infer" in said
