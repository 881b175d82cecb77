"""Weights as training code leaves them, put into the model that they fit: unwrapped, renamed, and without the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnfold.errors import InputError
from bnfold.loading import checkpoint, inert
from bnfold.loading.source import Request
from bnfold.loading.structure import switch_on

Shapes = Mapping[str, "tuple[int, ...] | None"]
State = Mapping[str, Any]

#: What wrappers put into names: at any depth, and at their beginning or at any depth.
_COMPILED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OUTER = frozenset({"module", "model"})
_SHOWN = 3


def load_weights(model: nn.Module, request: Request) -> list[str]:
    """Copies the weights of a request into ``model``; the keys that were left out, as no part of the model has them.

    Every weight of the model must be there in its shape. What compiling, parallel and averaging wrappers add to names
    goes where the rest fits then. A file of bnfold calibrate may hold running statistics that the model's class builds
    without: the model gets them. InputError as for ``checkpoint``, and where several state dicts fit or none is there,
    keys or shapes differ, or the weights hold what a layer of the model is built without.
    """
    path = request.weights
    assert path is not None
    switch_on(model, path)
    expected = {name: _shape(value) for name, value in model.state_dict().items()}
    state = _select(checkpoint.read(path, unsafe=request.unsafe_pickle), expected, path, request)
    state = _renamed(
        state, {name: name for name in state if not any(fnmatchcase(name, each) for each in request.ignore)}
    )
    names = _fitting(expected, state)
    left = [] if names is None else [name for name in state if name not in names]
    if names is not None:
        if off := [f"{name} {_shape(state[name])}" for name in left if _switched_off(model, name)]:
            what = f"the model is built without what the weights hold: {_shorten(off)}"
            hint = "Build it as it was trained (--arg name=value), or leave them out on purpose with --ignore PATTERN"
            raise InputError(what, where=str(path), hint=hint)
        if left and request.strict:
            what = f"{len(left)} keys of the weights are none of the model's: {_shorten(left)}"
            raise InputError(what, where=str(path), hint="Leave out --strict, or name them with --ignore PATTERN")
    try:
        # A module's own loading hook may know keys that no name tells, and object to some that fit.
        model.load_state_dict(state if names is None else _renamed(state, names), strict=True)
    except Exception as error:
        what = str((names is None and _difference(expected, state)) or error)[:400]
        prefixes = _fitting_prefixes(expected, state) if names is None else []
        hint = (
            f"--strip-prefix {' or '.join(prefixes)} makes it fit"
            if prefixes
            else "Check that the model is built as it was trained (--arg name=value) and that these are its weights"
        )
        raise InputError(f"the weights do not fit the model: {what}", where=str(path), hint=hint) from error
    return left


# ---- the state dict that is meant ------------------------------------------------------------------------------------


def _select(content: Any, expected: Shapes, path: Path, request: Request) -> State:
    """The one state dict in a checkpoint that is meant."""
    key = request.weights_key
    if key is not None:
        content = descend(content, key, path)
    stub = inert.stub_in(content, checkpoint.WRAPPERS)
    content = inert.as_state(content)
    found = dict(_candidates(content)) if isinstance(content, Mapping) else {}
    if not found and stub is not None:
        raise checkpoint.needs_code(path, stub)
    if not found:
        holds = f"holds {', '.join(map(repr, list(content)[:8]))}" if isinstance(content, Mapping) else "is no mapping"
        what = f"there is no state dict here: the content {holds} ({type(content).__name__})"
        raise InputError(what, where=str(path), hint="--weights-key says where it is")
    stripped = {name: _strip(state, request.strip_prefix, path) for name, state in found.items()}
    if len(stripped) == 1:
        return next(iter(stripped.values()))
    fitting = [name for name, state in stripped.items() if _fitting(expected, state) is not None]
    if len(fitting) == 1:
        return stripped[fitting[0]]
    outer = f"{key}." if key else ""
    names = [f"{outer}{name}" for name in fitting or stripped]
    raise InputError(
        f"{'several' if fitting else 'none'} of the state dicts in it {'fit' if fitting else 'fits'} the model: "
        + ", ".join(names),
        where=str(path),
        hint=f"Pick one, for example --weights-key {names[0]}",
    )


def descend(content: Any, key: str, path: Path) -> Any:
    """The entry of a checkpoint that a key names, with dots for nested ones; InputError where there is none."""
    if isinstance(content, Mapping):
        if key in content:
            return content[key]
        for name, inner in content.items():
            if isinstance(name, str) and key.startswith(f"{name}."):
                return descend(inner, key[len(name) + 1 :], path)
        hint = f"It has {', '.join(map(str, content))}"
        raise InputError(f"there is no key {key!r} in the checkpoint", where=str(path), hint=hint)
    raise InputError(f"there is no key {key!r}: the entry is a {type(content).__name__}", where=str(path))


def _candidates(content: Mapping[Any, Any], path: str = "", depth: int = 2) -> Iterator[tuple[str, State]]:
    entries = {key: inert.as_state(content.get(key)) for key in checkpoint.WRAPPERS} if depth else {}
    inner = {key: value for key, value in entries.items() if isinstance(value, Mapping)}
    found = [pair for key, value in inner.items() for pair in _candidates(value, f"{path}.{key}".strip("."), depth - 1)]
    if found:
        yield from found
        return
    state = OrderedDict((key, inert.as_tensor(value)) for key, value in content.items())
    if any(isinstance(value, torch.Tensor) for value in state.values()) and all(isinstance(key, str) for key in state):
        if metadata := getattr(content, "_metadata", None):
            state._metadata = metadata  # type: ignore[attr-defined]
        yield path, state


def _strip(state: State, prefix: str | None, path: Path) -> State:
    if not prefix:
        return state
    names = {name: name.removeprefix(prefix) for name in state}
    if len(set(names.values())) < len(names):
        raise InputError(f"without the prefix {prefix!r} two keys become one", where=str(path))
    if names.keys() == set(names.values()):
        hint = f"The first key is {next(iter(state))!r}"
        raise InputError(f"no key of the weights begins with {prefix!r}", where=str(path), hint=hint)
    return _renamed(state, names)


def _renamed(state: State, names: Mapping[str, str]) -> State:
    """Those of a state dict that have a name, by it."""
    renamed = OrderedDict((name, state[key]) for key, name in names.items())
    # The versions of the modules that wrote the weights: load_state_dict translates old ones.
    if metadata := getattr(state, "_metadata", None):
        owners = {key.rpartition(".")[0]: name.rpartition(".")[0] for key, name in names.items()}
        renamed._metadata = {  # type: ignore[attr-defined]
            owners[owner]: version for owner, version in metadata.items() if owner in owners
        }
    return renamed


# ---- names -----------------------------------------------------------------------------------------------------------


def _fitting(expected: Shapes, state: State) -> dict[str, str] | None:
    """The model's name for each key that is used, by the first way of renaming that leaves nothing missing."""
    for renamings in _renamings(expected, state):
        fits = [names for names in renamings if _fits(expected, state, names)]
        if fits:
            return fits[0] if len(fits) == 1 else None
    return None


def _renamings(expected: Shapes, state: State) -> Iterator[list[dict[str, str]]]:
    """As they are; without what compiling adds; without a prefix; without wrappers anywhere, in the model's too."""
    bare = {key: _without(key, _COMPILED) for key in state}
    heads = (list(takewhile(_OUTER.__contains__, name.split("."))) for name in bare.values())
    prefixes = sorted({prefix for head in heads for prefix in accumulate(f"{part}." for part in head)})
    inner: dict[str, list[str]] = {}
    for name in expected:
        inner.setdefault(_without(name, _COMPILED | _OUTER), []).append(name)
    only = {short: names[0] for short, names in inner.items() if len(names) == 1}
    for ways in (
        [{key: key for key in state}],
        [bare],
        [{key: name.removeprefix(prefix) for key, name in bare.items()} for prefix in prefixes],
        [{key: only.get(_without(key, _COMPILED | _OUTER), key) for key in state}],
    ):
        yield [{key: name for key, name in names.items() if name in expected} for names in ways]


def _without(name: str, parts: frozenset[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _fits(expected: Shapes, state: State, names: Mapping[str, str]) -> bool:
    if len(set(names.values())) < len(names) or (expected and not names):
        return False
    return not _difference(expected, _renamed(state, names))


def _fitting_prefixes(expected: Shapes, state: State) -> list[str]:
    """The prefixes without which the keys of ``state`` are those of the model."""
    anchor = max((name for name in expected if not name.endswith("num_batches_tracked")), key=len, default=None)
    prefixes = {key.removesuffix(anchor) for key in state if anchor and key.endswith(f".{anchor}")}
    stripped = {prefix: {key: key.removeprefix(prefix) for key in state} for prefix in sorted(prefixes)}
    used = {p: {key: name for key, name in names.items() if name in expected} for p, names in stripped.items()}
    return [prefix for prefix, names in used.items() if _fits(expected, state, names)]


def _switched_off(model: nn.Module, name: str) -> bool:
    """Whether a layer of the model has a place for this parameter or buffer, and is built without it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for each in (name, _without(name, _COMPILED), _without(name, _COMPILED | _OUTER)):
        owner, _, own = each.rpartition(".")
        held = [part for part in (modules.get(owner),) if part is not None]
        if any(own in named and named[own] is None for m in held for named in (m._parameters, m._buffers)):
            return True
    return False


@dataclass(frozen=True)
class _Difference:
    """Keys of the model that the weights lack, keys that the model lacks, and entries that are no such tensor."""

    missing: list[str]
    unexpected: list[str]
    shaped: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.shaped)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.shaped}
        return "; ".join(f"{len(keys)} {label}: {_shorten(keys)}" for label, keys in parts.items() if keys)


def _difference(expected: Shapes, state: State) -> _Difference:
    shapes = {key: _shape(value) for key, value in state.items()}
    return _Difference(
        # Old BatchNorm layers had no counter; load_state_dict then starts one.
        [f"{k} {v}" for k, v in expected.items() if k not in shapes and not k.endswith("num_batches_tracked")],
        [f"{k} {v}" for k, v in shapes.items() if k not in expected],
        [
            f"{k} {shapes[k] if isinstance(state[k], torch.Tensor) else type(state[k]).__name__} instead of {v}"
            for k, v in expected.items()
            if v is not None and k in shapes and shapes[k] != v
        ],
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
