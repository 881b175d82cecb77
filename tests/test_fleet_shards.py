"""Data in many files: the same bits from this process and from workers, and what one file alone gives."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, load_file

from bnfold.cli import cli
from bnfold.gate.metrics import Classification, Errors, Regression
from bnfold.report import Flip
from bnfold.statistics.moments import Moments

ROOT = Path(__file__).resolve().parent.parent
CNN = ["models/digits.py:digits_cnn", "--weights", "models/digits_cnn.safetensors"]


@pytest.fixture
def bnfold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says in this process."""

    def run(*words: str | Path, code: int = 0) -> str:
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        return out if code == 0 else err

    return run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the held-out digits in 8 files of unlike sizes, and all of them in one."""
    folder = tmp_path_factory.mktemp("shards")
    data = {name: array[:120] for name, array in np.load(ROOT / "models" / "digits_heldout.npz").items()}
    np.savez(folder / "whole.npz", **data)
    cuts = np.cumsum([1 + 7 * i % 31 for i in range(7)])
    for i, rows in enumerate(np.split(np.arange(120), cuts)):
        np.savez(folder / f"0{i}.npz", **{name: array[rows] for name, array in data.items()})
    return folder


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Any]:
    """A scheduler of its own process, to which workers of theirs come as they are asked for."""
    from fleet_cluster import Cluster

    with Cluster() as cluster:
        yield cluster


@pytest.mark.slow
def test_here_and_by_workers_the_same_bits(
    shards: Path, tmp_path: Path, scheduler: Any, bnfold: Callable[..., str]
) -> None:
    bnfold("export", *CNN, "-q", "-o", tmp_path / "net.onnx")
    scheduler.workers(2)
    reports, stats = {}, {}
    for who, where in (("here", ()), ("workers", ("--scheduler", scheduler.address))):
        data = ["--data", shards / "0*.npz", *where]
        bnfold("check", tmp_path / "net.onnx", *CNN, *data, "-q", "--report", tmp_path / f"{who}.json")
        report = json.loads((tmp_path / f"{who}.json").read_text())
        assert report["source"].pop("date") and report["source"].pop("command")
        reports[who] = json.dumps(report)
        bnfold("calibrate", *CNN, *data, "-q", "-o", tmp_path / "stats.safetensors")
        stats[who] = (tmp_path / "stats.safetensors").read_bytes()
    # Bits of the tensors: safetensors leaves the order of a file's metadata to chance.
    bits = {tuple((key, array.tobytes()) for key, array in sorted(load(held).items())) for held in stats.values()}
    assert len(set(reports.values())) == 1 and len(bits) == 1
    whole = ["--data", shards / "whole.npz"]
    bnfold("check", tmp_path / "net.onnx", *CNN, *whole, "-q", "--report", tmp_path / "whole.json")
    found, alone = (json.loads((tmp_path / f"{name}.json").read_text())["accuracy"] for name in ("workers", "whole"))
    for name in ("samples", "before", "after", "flips", "labelled", "top5_after", "flipped", "far_flips"):
        assert found[name] == alone[name]
    bnfold("calibrate", *CNN, *whole, "-q", "-o", tmp_path / "whole.safetensors")
    found, alone = load(stats["workers"]), load_file(tmp_path / "whole.safetensors")
    u = 2.0**-24
    for name in found:
        if name.endswith(("running_mean", "running_var")):
            # Each is rounded once to float32; what a deep layer is fed moves with the rounding of those before it.
            np.testing.assert_allclose(found[name], alone[name], rtol=64 * u, atol=64 * u * np.abs(alone[name]).max())


def test_one_pass_and_shards_in_this_process(shards: Path, tmp_path: Path, bnfold: Callable[..., str]) -> None:
    data = ["--data", shards / "0[2-6].npz", "--scheme", "one-pass", "--batch-size", "8"]
    out = bnfold("calibrate", *CNN, *data, "-o", tmp_path / "stats.safetensors", "--json")
    report = json.loads(out)
    rows = sum(len(np.load(path)["x"]) for path in shards.glob("0[2-6].npz"))
    assert report["samples"] == rows and report["passes"] == 1
    stem = next(layer for layer in report["layers"] if layer["module"] == "stem.1")
    assert stem["values"] == rows * 64


def test_a_fault_in_one_shard_names_it(shards: Path, tmp_path: Path, bnfold: Callable[..., str]) -> None:
    for path in shards.glob("0[0-4].npz"):
        shutil.copy(path, tmp_path)
    damaged = dict(np.load(tmp_path / "02.npz"))
    damaged["x"][2] = np.nan
    np.savez(tmp_path / "02.npz", **damaged)
    np.savez(tmp_path / "04.npz", x=damaged["x"][:2] * 0)
    bnfold("export", *CNN, "-q", "-o", tmp_path / "net.onnx")
    check = ["check", tmp_path / "net.onnx", *CNN, "--data"]
    assert "02.npz: array 'x' has NaN, first in sample 2" in bnfold(*check, tmp_path / "0*.npz", code=3)
    assert "04.npz: these data have not the labels" in bnfold(*check, tmp_path / "0[34].npz", code=3)
    assert "no file is called like that" in bnfold(*check, tmp_path / "x*.npz", code=3)
    assert "workers go through data" in bnfold(*check[:-1], "--workers", "2", code=2)


# -- what is added up --------------------------------------------------------------------------------------------------


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(count, 6, generator=generator)
    return before, before + 1e-3 * torch.randn(count, 6, generator=generator)


def test_parts_add_up_to_the_whole() -> None:
    whole, parts = rows(23, 0), [slice(0, 5), slice(5, 6), slice(6, 23)]
    labels = torch.arange(23) % 6
    one = Errors("o"), Classification("o", 1, 0.0), Regression("o")
    many = [(Errors("o"), Classification("o", 1, 0.0), Regression("o")) for _ in parts]
    for (errors, classes, fit), part in ((one, slice(None)), *zip(many, parts)):
        before, after = (value[part] for value in whole)
        errors.add(before, after)
        classes.add(before, after, labels[part], (), torch.full((6,), 1e-12, dtype=torch.float64), 0, lambda: None)
        fit.add(before, after, after)
    sums = many[0]
    for more, start in zip(many[1:], (5, 6)):
        sums[0].absorb(more[0])
        sums[1].absorb(more[1], start)
        sums[2].absorb(more[2])
    found, wanted = (errors.result(1.0, 0, 1.0) for errors in (sums[0], one[0]))
    assert (found.p50, found.p99, found.max, found.samples) == (wanted.p50, wanted.p99, wanted.max, 23)
    assert math.isclose(found.sqnr, wanted.sqnr, rel_tol=23 * 2.0**-52)
    assert sums[1].result() == one[1].result()
    assert math.isclose(sums[2].result().rmse_before, one[2].result().rmse_before, rel_tol=23 * 2.0**-52)


def test_flips_keep_their_place_among_all_samples() -> None:
    first, second = (Classification("o", 1, 0.0, flipped=[Flip(2, 0, 1, 0.1, units)], flips=1) for units in (1.0, 3.0))
    first.absorb(second, 10)
    assert [(flip.sample, flip.units) for flip in first.flipped] == [(12, 3.0), (2, 1.0)] and first.flips == 2


def test_moments_of_parts_are_those_of_the_whole_in_whatever_parts_they_come() -> None:
    values = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e6
    exact = Moments.of(values)
    for cuts in ([1, 63], [20, 20, 24], [7] * 9 + [1]):
        total = None
        for part in values.split(cuts):
            total = Moments.of(part) if total is None else total + Moments.of(part)
        assert total is not None and total.count == exact.count
        # Chan, Golub and LeVeque: every merge rounds the mean once, and no large number cancels.
        torch.testing.assert_close(total.mean, exact.mean, rtol=len(cuts) * 2.0**-52, atol=0)
        torch.testing.assert_close(total.variance, exact.variance, rtol=1e6 * len(cuts) * 2.0**-52, atol=0)
