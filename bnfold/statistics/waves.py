"""Which BatchNorms wait for which: the passes in which their inputs can be measured.

The statistics of a BatchNorm are those of its inputs, which depend on the statistics of every BatchNorm before it. All
that wait for the same ones can be measured in one pass over the data. Who waits for whom is what the data flow says:
every operator hands the marks of what it reads to what it writes, so that slices, in-place writes, indices and detached
tensors count too. What Python learns of a tensor, be it a number, a list, a NumPy array or how many values a mask left,
may decide about anything that comes later.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.errors import InputError
from bnfold.statistics.batchnorms import tensors_in

#: What hands a tensor's values to Python without an operator.
_LEAVING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}


@dataclass(frozen=True)
class Site:
    """The ``call``-th call of a module in one run of the model, from 0."""

    module: str
    call: int


@dataclass(frozen=True)
class Schedule:
    """The order of measurement."""

    waves: tuple[tuple[Site, ...], ...]  #: the sites of every pass over the data.
    #: the modules whose inputs depend on their own statistics (a layer that is called again further on): their calls
    #: are measured one after another, each with the statistics of those before it.
    circular: tuple[str, ...]

    def calls(self, module: str) -> int:
        """In how many places a module is called."""
        return sum(site.module == module for wave in self.waves for site in wave)


def schedule(before: Mapping[Site, Iterable[Site]]) -> Schedule:
    """In which passes the inputs at the sites can be measured.

    ``before``: for every site those that it waits for, in the order of the calls; of one run, or of several together.
    InputError where two layers are called in one order in one run and in the other order in another.
    """
    reach: dict[str, set[str]] = {site.module: set() for site in before}
    for site, sources in before.items():
        reach[site.module] |= {source.module for source in sources}
    changed = True
    while changed:  # what waits for a waiting one waits too; marks alone do not cross from one call to another
        changed = False
        for found in reach.values():
            more = set[str]().union(*(reach[name] for name in found)) - found
            changed = changed or bool(more)
            found |= more
    # A layer that feeds itself waits for single calls, all others for every call of what is before them.
    waits = {
        site: {*sources, *(o for o in before if o.module in reach[site.module] and site.module not in reach[o.module])}
        for site, sources in before.items()
    }
    depth: dict[Site, int] = {}
    try:
        for site in graphlib.TopologicalSorter(waits).static_order():
            depth[site] = 1 + max((depth[other] for other in waits[site]), default=-1)
    except graphlib.CycleError as error:
        names = " and ".join(f"'{name}'" for name in dict.fromkeys(site.module for site in error.args[1]))
        raise InputError(
            f"layers {names} feed each other in one order in some batches and in the other order in others",
            hint="Only the one-pass scheme (scheme='one-pass', --scheme one-pass) can measure them",
        ) from error
    waves: list[list[Site]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for site in before:
        waves[depth[site]].append(site)
    return Schedule(tuple(map(tuple, waves)), tuple(name for name in reach if name in reach[name]))


@dataclass(frozen=True)
class Trace:
    """One run of a model."""

    #: every call of a module, and the calls whose results its input was computed from.
    before: Mapping[Site, frozenset[Site]]
    #: the calls whose results Python learnt something of, by which it may decide what is called next.
    told: frozenset[Site]


def trace(
    run: Callable[[], Any],
    modules: Iterable[tuple[str, nn.Module]],
    free: Callable[[Site, nn.Module, Tensor], None] = lambda site, module, x: None,
) -> Trace:
    """Follows the data through one run of a model.

    Args:
        run: runs the model on an example.
        modules: the BatchNorms in question by qualified name; further ones of a name count as further calls of it.
        free: called with the input of every site that waits for none.
    """
    marks, found, calls = _Marks(), dict[Site, frozenset[Site]](), dict[str, int]()

    def entering(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        site = Site(name, calls.get(name, 0))
        found[site] = marks.read(tensors_in([args, kwargs]))
        if not found[site]:
            free(site, module, next(tensors_in([args, kwargs])))

    def leaving(name: str, module: nn.Module, args: Any, output: Any) -> None:
        site = Site(name, calls.get(name, 0))
        calls[name] = site.call + 1
        for tensor in tensors_in(output):
            marks.write(tensor, marks.read([tensor]) | found[site] | {site})

    handles = []
    try:
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(partial(entering, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(leaving, name)))
        with torch.no_grad(), marks, _Leaving(marks):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return Trace(found, marks.everywhere)


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands the marks of what an operator reads to what it writes; tensors that share storage share marks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of: dict[int, frozenset[Site]] = {}
        self.everywhere: frozenset[Site] = frozenset()

    def read(self, tensors: Any) -> frozenset[Site]:
        """The marks of any of ``tensors``."""
        return self.everywhere.union(*(self._of.get(_storage(tensor), frozenset()) for tensor in tensors))

    def write(self, tensor: Tensor, marks: frozenset[Site]) -> None:
        """Replaces the marks of a tensor."""
        self._of[_storage(tensor)] = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        marks = self.read(tensors_in([list(args), kwargs]))
        written = [*tensors_in(result)]
        schema = getattr(func, "_schema", None)
        for argument, value in zip(schema.arguments if schema is not None else (), args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors_in(value)
        told = torch.Tag.dynamic_output_shape in getattr(func, "tags", ())
        if told or isinstance(result, (bool, int, float, complex)):
            self.everywhere = marks
        for tensor in written:
            self.write(tensor, marks)
        return result


class _Leaving(TorchFunctionMode):
    """Marks everything that comes later when the values of a tensor go where no operator is seen."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVING:
            self._marks.everywhere = self._marks.read(tensors_in([list(args), kwargs or {}]))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse and other tensors without one: all of them share their marks
        return 0
