"""Samples of the user's, and what is known about them: read a few rows at a time, whatever their number.

Everything is read once before anything is computed, so that a damaged or unsuitable file is refused at once: what a
zip archive's checksums, NaNs and integers out of range say about a file is known only at its end.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnfold.errors import InputError
from bnfold.gate.stored import Rows, Stored, in_order, open_arrays
from bnfold.report.progress import Progress, silent

#: Bytes that are read at a time.
CHUNK = 2 << 20
#: torch's own ``ignore_index``, and what data sets write into the pixels of a label map that nobody labelled.
IGNORED, VOID = -100, 255


@dataclass(frozen=True)
class Labels:
    """What is known about samples beside the model's inputs.

    Attributes:
        classes: the right class of every sample, (samples, ...); ``IGNORED`` where it is not known.
        targets: the right values of an output, by the output's name; the name "targets" leaves the output open.
        output: the output that the classes belong to, "" before ``assign``.
        axis: of the classes in that output: 1, as in ``torch.nn.functional.cross_entropy``, or -1.
        count: how many classes there are.
        digest: SHA-256 of all arrays, whatever file they came from.
        unused: arrays that are neither inputs nor outputs nor labels.
        where: the file, for messages.
    """

    classes: Rows | None = None
    targets: Mapping[str, Rows] = field(default_factory=dict)
    output: str = ""
    axis: int = 1
    count: int = 0
    digest: str = ""
    unused: tuple[str, ...] = ()
    where: str | None = None


def load_data(
    path: Path, names: Sequence[str], outputs: Sequence[str] = (), optional: Sequence[str] = ()
) -> tuple[dict[str, Rows], Labels]:
    """Open samples in an .npz (arrays named like the inputs, and labels or targets) or, for one input, an .npy.

    Args:
        path: nothing in the file is unpickled.
        names: of the model's inputs.
        outputs: of the model's outputs, of which arrays of the same name are the targets.
        optional: inputs that need not be there.

    Returns:
        One array per input, all of shape (samples, ...), and what else is known about them.

    Raises:
        InputError: missing, damaged or no NumPy file; an array is missing, empty, without a first dimension or not
            numeric; numbers of samples differ.
    """
    return select(open_arrays(path), names, outputs, optional, where=str(path))


def select(
    arrays: Mapping[str, Rows], names: Sequence[str], outputs: Sequence[str] = (), optional: Sequence[str] = (), *,
    where: str | None = None,
) -> tuple[dict[str, Rows], Labels]:  # fmt: skip
    """Tells inputs, labels and targets apart, as ``load_data``, whose errors it raises."""
    arrays, known = dict(arrays), ["labels", "targets", *outputs]
    # An input of the model may be called "labels": then it is that.
    extra = {key: arrays.pop(key) for key in known if key in arrays and key not in names}
    if len(names) == 1 and len(arrays) == 1 and (key := next(iter(arrays))) in ("", "arr_0"):
        # One array for one input needs no name; a name that was given and differs is still a mistake.
        arrays = {names[0]: arrays[key]}
    if missing := [name for name in names if name not in arrays and name not in optional]:
        there = ", ".join(name or "one without a name" for name in (*arrays, *extra)) or "none"
        hint = f"The file's arrays: {there}; the model's inputs: {', '.join(names)}"
        raise InputError(f"no array for {', '.join(missing)}", where=where, hint=hint)
    data = {name: arrays.pop(name) for name in names if name in arrays}
    for name in arrays:
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise InputError(f"array {name!r} is none that bnfold knows", where=where, hint=f"Did you mean {near[0]}?")
    for name, array in {**data, **extra}.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or array.ndim == 0 or 0 in array.shape:
            what = f"array {name!r} is empty or not numeric (shape {array.shape}, dtype {array.dtype})"
            raise InputError(what, where=where, hint="Its shape must be (samples, ...)")
    counts = {name: len(array) for name, array in {**data, **extra}.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        hint = "The first dimension of every array is the sample"
        raise InputError(f"the arrays differ in their number of samples: {listed}", where=where, hint=hint)
    return data, Labels(extra.pop("labels", None), extra, unused=tuple(sorted(arrays)), where=where)


def examine(
    data: Mapping[str, Rows], labels: Labels, dtypes: Mapping[str, torch.dtype], progress: Progress = silent
) -> str:
    """Reads everything once.

    ``dtypes`` are what the model takes, by input name; ``progress`` is told how many bytes are done.

    Returns:
        SHA-256 of all arrays with their names, dtypes and shapes.

    Raises:
        InputError: a dtype that the model does not take, NaN, integers that its dtype does not hold, a damaged file.
    """
    digest, done = hashlib.sha256(), 0
    arrays: dict[str, Rows] = {**data, **({"labels": labels.classes} if labels.classes is not None else {})}
    arrays |= labels.targets
    total = sum(math.prod(rows.shape) * rows.dtype.itemsize for rows in arrays.values())
    for name, rows in arrays.items():
        wanted = dtypes[name] if name in data else None
        if wanted is not None:
            _check_dtype(name, rows.dtype, wanted, labels.where)
        digest.update(f"{name} {rows.dtype.str} {rows.shape}\n".encode())
        at = 0
        for chunk in in_order(rows, max(CHUNK // max(math.prod(rows.shape[1:]) * rows.dtype.itemsize, 1), 1)):
            _check_values(name, chunk, at, wanted, labels.where)
            if rows is labels.classes:
                _check_classes(chunk, at, labels)
            digest.update(np.ascontiguousarray(chunk).data)
            at += len(chunk)
            done += chunk.nbytes
            progress("data", done, total)
    return digest.hexdigest()


def assign(labels: Labels, outputs: Mapping[str, tuple[int | None, ...]]) -> Labels:
    """Finds the output that labels and targets belong to.

    ``outputs`` are shapes of the floating-point outputs by name, None for a dynamic size. Classes lie along axis 1, as
    in ``torch.nn.functional.cross_entropy``, or along the last axis where only that fits.

    Raises:
        InputError: they fit none.
    """
    named = (f"{n} ({', '.join('?' if k is None else str(k) for k in shape)})" for n, shape in outputs.items())
    listed = f"The outputs are {'; '.join(named) or 'none of floating-point numbers'}"
    targets: dict[str, Rows] = {}
    for name, rows in labels.targets.items():
        fitting = [out for out in outputs if name in ("targets", out) and _same_sample(rows.shape, outputs[out])]
        if not fitting:
            hint = f"{listed}; name an array of targets like its output"
            raise InputError(f"array {name!r} of shape {rows.shape} fits no output", where=labels.where, hint=hint)
        targets[fitting[0]] = rows
    if (classes := labels.classes) is None:
        return replace(labels, targets=targets)
    if classes.dtype.kind not in "iu":
        hint = "Give one class index per sample, as integers; values to regress are called targets"
        raise InputError(f"the labels are {classes.dtype}, no integers", where=labels.where, hint=hint)
    if classes.ndim == 2 and classes.shape[1] == 1:  # a column
        row = replace(classes, shape=(len(classes),)) if isinstance(classes, Stored) else classes[:].reshape(-1)
        classes = row
    for output, shape in outputs.items():
        for axis in (1, -1):
            rest = shape[2:] if axis == 1 else shape[1:-1]
            if len(shape) == classes.ndim + 1 and _fits(classes.shape[1:], rest) and (shape[axis] or 2) > 1:
                return replace(
                    labels, classes=classes, targets=targets, output=output, axis=axis, count=shape[axis] or 0
                )
    hint = f"{listed}; give one class per sample, or leave the labels out of the file"
    if any(_fits(classes.shape, shape) for shape in outputs.values()):
        hint = f"{listed}; labels are class indices, one-hot ones become that with labels.argmax(1)"
    raise InputError(f"labels of shape {classes.shape} fit no output", where=labels.where, hint=hint)


def stored_batches(
    names: Sequence[str], example: Sequence[Any], data: Mapping[str, Rows], *, size: int, fixed: bool = False
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """All rows of ``data`` in flat batches of ``size``, each with the number of its samples.

    The flat ``example`` inputs give the dtypes, and what ``data`` does not hold. ``fixed`` fills the last batch up with
    repeated rows, for what takes no other size; the number does not count them.
    """
    streams = {name: in_order(rows, size) for name, rows in data.items()}
    with contextlib.ExitStack() as stack:
        for stream in streams.values():
            stack.callback(stream.close)
        for rows in zip(*streams.values()):
            chunk, count = dict(zip(streams, rows)), len(rows[0])
            index = np.arange(size if fixed else count) % count
            taken = {name: torch.from_numpy(np.ascontiguousarray(each[index])) for name, each in chunk.items()}
            yield tuple(taken[n].to(x.dtype) if n in taken else x for n, x in zip(names, example)), count


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted))


def _same_sample(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether samples of ``shape`` are those of an output, or the same numbers without its axes of size 1."""
    return _fits(shape[1:], wanted[1:]) or _fits([n for n in shape[1:] if n != 1], [n for n in wanted[1:] if n != 1])


def _first(bad: np.ndarray, start: int) -> int:
    """The first sample of which something is bad, where these begin with ``start``."""
    return start + int(np.argmax(bad.reshape(len(bad), -1).any(1)))


def _check_classes(rows: np.ndarray, start: int, labels: Labels) -> None:
    known = rows != IGNORED
    if rows.ndim > 1 and labels.count <= VOID:
        known &= rows != VOID
    bad = known & ((rows < 0) | (rows >= labels.count))
    if labels.count and bad.any():
        label, sample = int(rows[bad].flat[0]), _first(bad, start)
        hint = f"Output '{labels.output}' has classes 0 to {labels.count - 1}; {IGNORED} marks a sample without one"
        what = f"label {label} of sample {sample} is none of the {labels.count} classes"
        raise InputError(what, where=labels.where, hint=hint)


def _check_dtype(name: str, dtype: np.dtype[Any], wanted: torch.dtype, where: str | None) -> None:
    takes = str(wanted).removeprefix("torch.")
    kinds = "f" if wanted.is_floating_point else "b" if wanted == torch.bool else "biu"
    if dtype.kind not in kinds:
        hint = f"Convert it as for training, for example x.astype('{takes}') / 255 and the normalisation, and save that"
        hint = hint if wanted.is_floating_point else f"Save it as {takes}"
        raise InputError(f"array {name!r} holds {dtype}, the model takes {takes}", where=where, hint=hint)


def _check_values(name: str, rows: np.ndarray, start: int, wanted: torch.dtype | None, where: str | None) -> None:
    bad, what = np.isnan(rows) if rows.dtype.kind == "f" else np.zeros(1, bool), "NaN"
    if rows.dtype.kind in "iu" and wanted not in (None, torch.bool):
        limits, what = torch.iinfo(wanted), f"integers that {wanted} does not hold"
        bad = (rows < limits.min) | (rows > limits.max)
    if bad.any():
        hint = "Repair or leave out that sample"
        raise InputError(f"array {name!r} has {what}, first in sample {_first(bad, start)}", where=where, hint=hint)
