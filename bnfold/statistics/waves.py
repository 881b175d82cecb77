"""Which BatchNorms wait for which: the passes in which their inputs can be measured.

The statistics of a BatchNorm are those of its inputs, which depend on the statistics of every BatchNorm before it. All
that wait for the same ones can be measured in one pass over the data. Who waits for whom is what the data flow of one
run says: every operator hands the marks of what it reads to what it writes, so that slices, in-place writes, indices
and detached tensors count too. A number that Python reads off a tensor may decide about anything that comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.statistics.batchnorms import tensors_in


@dataclass(frozen=True)
class Site:
    """The ``call``-th call of a module in one run of the model, from 0."""

    module: str
    call: int


@dataclass(frozen=True)
class Schedule:
    """The order of measurement.

    Attributes:
        waves: the sites of every pass over the data.
        circular: the modules whose inputs depend on their own statistics (a layer that is called again further on):
            their calls are measured one after another, each with the statistics of those before it.
    """

    waves: tuple[tuple[Site, ...], ...]
    circular: tuple[str, ...]

    def calls(self, module: str) -> int:
        """In how many places a module is called."""
        return sum(site.module == module for wave in self.waves for site in wave)


def schedule(run: Callable[[], Any], modules: Mapping[str, nn.Module]) -> Schedule:
    """Runs a model once and says in which passes the inputs of ``modules`` can be measured.

    Args:
        run: runs the model on an example.
        modules: the BatchNorms in question, by qualified name.
    """
    before = _trace(run, modules)  # in the order of the calls
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
    depth: dict[Site, int] = {}
    finished: dict[str, int] = {}
    for group in _in_order(reach):
        first = 1 + max((finished[name] for name in set().union(*(reach[n] for n in group)) - group), default=-1)
        inner = [site for site in before if site.module in group]
        for site in inner:
            within = [depth[source] + 1 for source in before[site] if source.module in group]
            depth[site] = max([first, *within])
        finished |= dict.fromkeys(group, max(depth[site] for site in inner))
    waves: list[list[Site]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for site in before:
        waves[depth[site]].append(site)
    circular = tuple(name for name in reach if name in reach[name])
    return Schedule(tuple(map(tuple, waves)), circular)


def _in_order(reach: Mapping[str, set[str]]) -> Sequence[set[str]]:
    """The modules, those that wait for one another together, after all that they wait for."""
    groups: list[set[str]] = []
    for name, found in reach.items():
        if not any(name in group for group in groups):
            groups.append({name} | {other for other in found if name in reach[other]})
    # The more modules something waits for, the later it comes: reach is transitive.
    return sorted(groups, key=lambda group: len(set[str]().union(*(reach[name] for name in group)) | group))


def _trace(run: Callable[[], Any], modules: Mapping[str, nn.Module]) -> dict[Site, frozenset[Site]]:
    """Every call of a module in one run, and the calls whose results its input was computed from."""
    marks, found, calls = _Marks(), dict[Site, frozenset[Site]](), dict[str, int]()

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            site = Site(name, calls.get(name, 0))
            found[site] = marks.read(tensors_in([args, kwargs]))

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            site = Site(name, calls.get(name, 0))
            calls[name] = site.call + 1
            for tensor in tensors_in(output):
                marks.write(tensor, marks.read([tensor]) | found[site] | {site})

        return entering, leaving

    handles = []
    try:
        for name, module in modules.items():
            entering, leaving = hooks(name)
            handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(module.register_forward_hook(leaving))
        with torch.no_grad(), marks:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands the marks of what an operator reads to what it writes; tensors that share storage share marks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of: dict[int, frozenset[Site]] = {}
        self._everywhere: frozenset[Site] = frozenset()

    def read(self, tensors: Any) -> frozenset[Site]:
        """The marks of any of ``tensors``."""
        return self._everywhere.union(*(self._of.get(_storage(tensor), frozenset()) for tensor in tensors))

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
        if isinstance(result, (bool, int, float, complex)):
            self._everywhere = marks
        for tensor in written:
            self.write(tensor, marks)
        return result


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse and other tensors without one: all of them share their marks
        return 0
