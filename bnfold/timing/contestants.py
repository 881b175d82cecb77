"""What ``bench`` compares: ONNX files in ONNX Runtime as deployed, and torch modules, all on the same inputs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnfold.errors import BnfoldError, InputError, ProviderError
from bnfold.runtime.runtime import Array, Device, Session, ValueInfo, open_session, resolve_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Contestant:
    """What has its latency measured."""

    name: str  #: what the report calls it.
    run: Callable[[], object] = field(repr=False)  #: does the work once and returns when it is done, on a GPU as well.
    provider: str = ""  #: as in ``report.Latency``, as load and memory are.
    outputs: tuple[tuple[int, ...], ...] = ()  #: the shapes of its results.
    load: float | None = None
    memory: int | None = None


#: Openings of every file of which the median counts, after one that does not: it warms the disk's cache.
OPENINGS = 3


def onnx_contestants(
    paths: Sequence[str | os.PathLike[str]],
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: Device | str = "cpu",
    threads: int | None = None,
    memory: bool = False,
) -> list[Contestant]:
    """Files in ONNX Runtime as it is deployed: all optimisations on, threads that spin while it runs, TF32 on CUDA.

    BnfoldError where a file cannot be opened there, or does not run on its feeds.

    Args:
        feeds: what each file is run on; bound once on the session's device, so that a GPU is not timed with its bus.
        threads: for the operators of one call; None leaves the choice to ONNX Runtime.
        memory: find each file's memory, in a process of its own.
    """
    loads: list[list[float]] = [[] for _ in paths]
    sessions: list[Session | None] = [None] * len(paths)
    for _ in range(OPENINGS + 1):
        for i, path in enumerate(paths):
            sessions[i] = None
            start = time.perf_counter()
            sessions[i] = _open(path, device, threads)
            loads[i].append(time.perf_counter() - start)
    found = []
    for path, session, feed, spent in zip(paths, sessions, feeds, loads):
        assert session is not None
        outputs = session.run(feed)  # explains what does not fit
        grown = peak_memory(path, feed, device=device, threads=threads) if memory else None
        shapes, load = tuple(array.shape for array in outputs), float(np.median(spent[1:]))
        found.append(Contestant(os.fspath(path), session.bind(feed), session.provider, shapes, load, grown))
    return found


def _open(path: str | os.PathLike[str], device: Device | str, threads: int | None) -> Session:
    return open_session(path, device=device, threads=threads, deployed=True, spinning=True)


def torch_contestant(
    name: str,
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Contestant:
    """A torch module in eval mode, without gradients; what is run is a copy where the caller's would have to change.

    InputError where it does not run on these arguments, CaptureError where it cannot be copied, ProviderError where
    torch has no CUDA and CUDA is asked for.
    """
    import torch
    from torch.utils import _pytree as pytree

    from bnfold.graph.copies import copied

    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError("this torch cannot use CUDA", hint="Leave --source out, or use --device cpu")
    if device == "cuda" or any(module.training for module in model.modules()):
        model = copied(model).to(device)
        with contextlib.suppress(NotImplementedError):  # an exported program's module has the mode it was exported in
            model.eval()
    args, named = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, dict(kwargs or {})))

    def run() -> Any:
        with torch.inference_mode():
            found = model(*args, **named)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    try:
        leaves = pytree.tree_leaves(run())
    except Exception as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the model does not run on the file's inputs: {first}", where=name) from error
    outputs = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
    return Contestant(name, run, f"torch, {device}", outputs)


# -- inputs ------------------------------------------------------------------------------------------------------------

#: An input of a file, and the shape that it is run on.
Sized = tuple[ValueInfo, tuple[int, ...]]


def sized_inputs(
    path: str | os.PathLike[str], *, batch: int | None = None, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[Sized]:
    """The inputs of a file, each with the shape to run it on.

    InputError where a size is unknown, or not the file's.

    Args:
        batch: the size of a dynamic first axis, and of every axis of that name; 1 by default.
        shapes: whole shapes by input, for other dynamic sizes.
    """
    values, given, where = _inputs(path), dict(shapes or {}), os.fspath(path)
    if unknown := [name for name in given if name not in {value.name for value in values}]:
        there = ", ".join(value.name for value in values) or "none"
        raise InputError(f"no input named {unknown[0]}", where=where, hint=f"Its inputs are {there}")
    leading = [value.shape[0] for value in values if value.shape]
    batches = {dim for dim in leading if isinstance(dim, str)}
    if batch is not None and leading and all(isinstance(dim, int) for dim in leading) and batch not in leading:
        raise InputError(f"its batch is fixed at {leading[0]}", where=where, hint=f"Use --batch {leading[0]}")
    sized = []
    for value in values:
        if value.name not in given:
            shape = tuple(_size(value, axis, batch, batches, where) for axis in range(len(value.shape)))
        elif value.takes(given[value.name]):
            shape = tuple(given[value.name])
        else:
            what = f"input {value.name} is {written(value.dtype, value.shape)}, given {list(given[value.name])}"
            raise InputError(what, where=where, hint="See --input")
        sized.append((value, shape))
    return sized


def _inputs(path: str | os.PathLike[str]) -> tuple[ValueInfo, ...]:
    # Not optimised: that is what takes the time of opening a file.
    return open_session(path, optimized=False, threads=1).inputs


def _size(value: ValueInfo, axis: int, batch: int | None, batches: set[str], where: str) -> int:
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim
    if axis == 0 or dim in batches:
        return batch or 1
    sizes = ",".join(
        str(n) if isinstance(n, int) else "224" if i else str(batch or 1) for i, n in enumerate(value.shape)
    )
    what = f"input {value.name} is {written(value.dtype, value.shape)}, and nothing says how large {dim or 'it'} is"
    raise InputError(what, where=where, hint=f'Give its whole shape, such as --input "{value.name}[{sizes}]"')


def random_feeds(inputs: Sequence[Sized], seed: int = 0) -> dict[str, Array]:
    """Standard normal numbers, and 0 and 1 for integers and booleans, which every embedding has."""
    source = np.random.default_rng(seed)
    return {
        value.name: np.asarray(
            source.integers(0, 2, shape) if value.dtype.kind in "iub" else source.standard_normal(shape)
        ).astype(value.dtype)
        for value, shape in inputs
    }


def matched_feeds(
    path: str | os.PathLike[str], feeds: Mapping[str, Array], first: str | os.PathLike[str]
) -> dict[str, Array]:
    """The arrays of the ``first`` file for another one: by name, else by position; cast where its precision differs.

    InputError where it takes something else than the first.
    """
    values, names = _inputs(path), list(feeds)
    if {value.name for value in values} == set(feeds):
        names = [value.name for value in values]
    fit = len(values) == len(names) and all(
        _kind(value.dtype) == _kind(feeds[name].dtype) and value.takes(feeds[name].shape)
        for value, name in zip(values, names)
    )
    if not fit:
        own = ", ".join(f"{value.name}:{written(value.dtype, value.shape)}" for value in values) or "nothing"
        other = ", ".join(f"{name}:{written(array.dtype, array.shape)}" for name, array in feeds.items()) or "nothing"
        hint = "Compare files with the same inputs; --batch and --input set dynamic sizes"
        raise InputError(f"it takes {own}, {os.fspath(first)} is run on {other}", where=os.fspath(path), hint=hint)
    return {value.name: feeds[name].astype(value.dtype) for value, name in zip(values, names)}


def torch_arguments(
    model: torch.nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any],
    feeds: Mapping[str, Array],
    where: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arrays as the arguments of a torch module; InputError where they have no place in its inputs.

    Args:
        model: takes floating-point inputs of its first parameter's dtype.
        args: the module's positional example inputs, if there are any: the arrays take their tensors' places in order.
        feeds: arrays by name: those of ``forward`` where there are no example inputs, else in its order.
    """
    import torch
    from torch.utils import _pytree as pytree

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = [_tensor(array, dtype) for array in feeds.values()]
    if args is None and not kwargs:
        from bnfold.graph.scripted import signature

        names = list(signature(model).parameters)
        if set(feeds) <= set(names):
            return (), dict(zip(feeds, tensors))
        return tuple(tensors), {}
    leaves, spec = pytree.tree_flatten((tuple(args or ()), dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if len(places) != len(tensors) or any(leaves[i].ndim != t.ndim for i, t in zip(places, tensors)):
        own = ", ".join(written(np.dtype(_name(leaves[i].dtype)), leaves[i].shape) for i in places)
        other = ", ".join(written(array.dtype, array.shape) for array in feeds.values())
        raise InputError(f"the model takes {own or 'no tensors'}, the file {other or 'none'}", where=where)
    for i, tensor in zip(places, tensors):
        leaves[i] = tensor
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return found


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if array.dtype.kind in "iub":
        return torch.from_numpy(array)
    # By way of float32: numpy has no bfloat16 of its own.
    return torch.from_numpy(array.astype(np.float64 if array.dtype == np.float64 else np.float32)).to(dtype)


def _kind(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.kind in "iub" else "float"


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return "float16" if name == "bfloat16" else name


def written(dtype: np.dtype[Any], shape: Sequence[Any]) -> str:
    """A dtype and a shape as ``--input`` takes them."""
    return f"{dtype.name}[{','.join('?' if dim is None else str(dim) for dim in shape)}]"


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_memory(
    path: str | os.PathLike[str],
    feeds: Mapping[str, Array],
    *,
    device: Device | str = "cpu",
    threads: int | None = None,
) -> int | None:
    """Bytes by which a new process grows at its peak when it opens the file and runs it once; None where unknown.

    Resident memory of the host, without what Python and ONNX Runtime take before a file is opened.
    """
    shapes = {name: [array.dtype.name, *array.shape] for name, array in feeds.items()}
    where = resolve_device(device)
    job = json.dumps([os.fspath(path), where.provider.name, dict(where.options), threads, shapes])
    code = "from bnfold.timing.contestants import _grow; _grow()"
    search = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], input=job, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": search},
    )  # fmt: skip
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _grow() -> None:
    """The child of ``peak_memory``: prints by how many bytes it grew."""
    path, name, options, threads, shapes = json.load(sys.stdin)
    import ml_dtypes  # noqa: F401  numpy knows bfloat16 from here on

    rows = [(ValueInfo(name, np.dtype(dtype), ()), tuple(shape)) for name, (dtype, *shape) in shapes.items()]
    feeds = random_feeds(rows)
    device = resolve_device(name, options)  # what its libraries take is not the file's
    before = _resident("VmRSS")
    if before is None:
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    try:
        _open(path, device, threads).run(feeds)
    except BnfoldError:
        return
    peak = _resident("VmHWM")
    print(max(0, peak - before) if peak is not None else "")


def _resident(field: str) -> int | None:
    """A line of Linux's ``/proc/self/status``, in bytes; ``ru_maxrss`` would hold the parent's peak as well."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = next((line for line in text.splitlines() if line.startswith(f"{field}:")), "")
    return int(found.split()[1]) * 1024 if found else None
