"""What the command line says about a model's inputs and its factory's arguments, read before torch is imported."""

from __future__ import annotations

import ast
import difflib
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnfold.errors import UsageError

#: Smallest and largest size of a dynamic dimension; None where there is no largest.
Range = tuple[int, int | None]
#: By the names that torch has for them.
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
#: Sizes are int64 in torch and in ONNX; no array of NumPy has more axes.
_LARGEST, _AXES = 2**63 - 1, 64
_SYNTAX = "Write NAME:DTYPE[N,3,224,224], for example --input x:float32[N,3,224,224]; letters are dynamic sizes"
RANGE_SYNTAX = "Write --dynamic N=1..64, N=1.. or N"


@dataclass(frozen=True)
class InputSpec:
    """One input of a model."""

    name: str | None  #: the parameter of ``forward``, or None to take the next free one.
    dtype: str  #: of the tensor, one of ``DTYPES``.
    dims: tuple[int | str, ...]  #: one entry per axis, a number where the size is fixed and a name where it is dynamic.

    def __str__(self) -> str:
        """As ``--input`` takes it."""
        return f"{self.name or ''}{':' if self.name else ''}{self.dtype}[{','.join(map(str, self.dims))}]"


def parse_input(text: str) -> InputSpec:
    """Read one input specification.

    >>> parse_input("x:float32[N,3,224,224]")
    InputSpec(name='x', dtype='float32', dims=('N', 3, 224, 224))
    >>> parse_input("int64[N,T]").name is None  # a dtype alone: the next input in order
    True
    >>> parse_input("x[8,3]").dtype  # a name alone
    'float32'

    Raises:
        UsageError: the text is no specification; the message shows one.
    """
    match = re.fullmatch(r"\s*(?:([^\W\d]\w*)\s*(:\s*(\w+)\s*)?)?\[([^\[\]]*)\]\s*", text)
    if match is None:
        raise UsageError("this is no input specification", where=f"--input {text}", hint=_SYNTAX)
    name, typed, dtype, dims = match.groups()
    if not typed and name in DTYPES:
        name, dtype = None, name
    dtype = dtype_name(dtype or "float32", DTYPES, where=f"--input {text}")
    axes = tuple(_parse_dim(dim.strip(), text) for dim in dims.split(",")) if dims.strip() else ()
    if len(axes) > _AXES:
        what = f"{len(axes)} dimensions are more than the {_AXES} that an array can have"
        raise UsageError(what, where=f"--input {name or ''}".strip(), hint=_SYNTAX)
    return InputSpec(name, dtype, axes)


def dtype_name(dtype: object, known: Sequence[str] = DTYPES[:4], *, where: str = "dtype") -> str:
    """``"float16"``, ``"torch.float16"`` or ``torch.float16`` -> ``"float16"``.

    UsageError with the nearest where it is none of the ``known`` ones, by default the floating-point dtypes.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}"
        fact = f"{name} is no floating-point dtype" if name in DTYPES else f"there is no dtype {name!r}"
        raise UsageError(fact, where=where, hint=hint)
    return name


def _parse_dim(dim: str, text: str) -> int | str:
    if re.fullmatch(r"[0-9]+", dim):
        if not dim.strip("0"):
            raise UsageError("a dimension of size 0 leaves nothing to compute", where=f"--input {text}", hint=_SYNTAX)
        return _size(dim, f"--input {text}")
    if not dim.isidentifier() or keyword.iskeyword(dim):
        raise UsageError(f"{dim!r} is neither a size nor a name", where=f"--input {text}", hint=_SYNTAX)
    return dim


def _size(digits: str, where: str) -> int:
    digits = digits.lstrip("0") or "0"
    # The length first: Python refuses to read thousands of digits.
    if len(digits) > 19 or int(digits) > _LARGEST:
        raise UsageError(f"a size of {len(digits)} digits is larger than any tensor", where=where)
    return int(digits)


def parse_dynamic(text: str) -> tuple[str, int, int | None]:
    """``"N=1..64"`` -> ``("N", 1, 64)``; ``"N=1.."`` and ``"N"`` -> ``("N", 1, None)``.

    UsageError where the text is no range, or the range holds fewer than two sizes.
    """
    match = re.fullmatch(r"\s*([^\W\d]\w*)\s*(?:=\s*([0-9]+)\s*\.\.\s*([0-9]+)?)?\s*", text)
    if match is None or keyword.iskeyword(match[1]):
        raise UsageError("this is no range of a dynamic dimension", where=f"--dynamic {text}", hint=RANGE_SYNTAX)
    where = f"--dynamic {text}"
    low, high = _size(match[2] or "1", where), _size(match[3], where) if match[3] else None
    if low < 1 or (high is not None and high <= low):
        hint = f"The first size is at least 1 and the last is larger. {RANGE_SYNTAX}; a fixed size is a number"
        raise UsageError("the range is empty or a single size", where=f"--dynamic {text}", hint=hint)
    return match[1], low, high


def parse_factory_arg(text: str) -> tuple[str, Any]:
    """``"width=32"`` -> ``("width", 32)``: a Python literal, else the text; UsageError without a name or a "="."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name.isidentifier():
        raise UsageError(f"{text!r} is no argument", where="--arg", hint="Write NAME=VALUE, for example --arg width=32")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value
