"""A model of more than 2 GB through export, fold and the gate, and into ONNX Runtime: what a file inline cannot hold.

    python scripts/large.py [--gigabytes 2.2]

Prints what it took, and the peak of resident memory; needs about ten times the model's size for a moment or two.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import zoo
from torch import nn

import bnfold
from bnfold.runtime.runtime import open_session


def wide(gigabytes: float, width: int = 8192) -> nn.Module:
    """Linear, BatchNorm and ReLU, again and again, until the weights are that large."""
    layers: list[nn.Module] = []
    for _ in range(max(round(gigabytes * 1e9 / (width * width * 4)), 1)):
        layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return zoo.randomize(nn.Sequential(*layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of weights in float32 (default: 2.2)")
    given = parser.parse_args()
    torch.manual_seed(0)
    module = wide(given.gigabytes)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    before, start = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.onnx"
        report = bnfold.export(module, path, (torch.randn(2, 8192),), device="cpu")
        took, after = time.perf_counter() - start, peak()
        assert report.passed and report.check is not None and report.file is not None, report.check
        session = open_session(path)
        (found,) = session.run({session.inputs[0].name: torch.randn(3, 8192).numpy()})
        assert found.shape == (3, 8192)
        gone, total = report.ledger.count()
        print(f"weights {size / 1e9:.2f} GB, {gone} of {total} BatchNorms folded, ratio {report.check.ratio:.2g}")
        print(f"file {report.file.bytes / 1e9:.2f} GB, weights beside it in {report.file.data}")
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.timings.items())
        print(f"{took:.0f} s ({stages})")
        print(f"peak {after / 1e9:.1f} GB, {before / 1e9:.1f} GB of it before the export began")


def peak() -> int:
    """Bytes of resident memory at their peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
