"""Which edits of a fold a model's own class can express.

A fold edits values of a graph, and a class has parameters and submodules:

- a slot reads a stored tensor, or a view of it: that tensor changes, if whatever else reads it changes alike;
- a slot was empty (a convolution without bias): its module gains the parameter, if it has a place for it;
- a value is gone, and its module computes nothing else: an Identity takes the module's place, or the one child that
  does compute something (the activation of a BatchNorm with its activation);
- a multiply or an add in a larger forward is gone: its parameter becomes 1 or 0.

Everything else is a conflict, named by the affine and the way it went.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfold import aten
from bnfold.eager.blueprint import Blueprint, Inside, Read
from bnfold.graph.graph import Graph
from bnfold.passes.solution import Edit
from bnfold.report import Change, Outcome, Refusal
from bnfold.semantics import Scaling

Conflicts = dict[tuple[str, Outcome], Refusal]
#: What takes the place of the constant of a multiply or add that is gone.
_NEUTRAL = {"mul": 1.0, "div": 1.0, "add": 0.0}


@dataclass(frozen=True, eq=False)
class Expression:
    """A fold as a class expresses it: the changes of its structure, and new values (float64) of tensors by name."""

    changes: tuple[Change, ...]
    tensors: dict[str, Tensor]


class Attempt:
    """A fold, whose ``journal`` says how it edited ``graph``, put to a class; ``held``: what must stay, and why."""

    def __init__(self, blueprint: Blueprint, graph: Graph, journal: Sequence[Edit], held: Mapping[str, str]) -> None:
        self._class, self._graph, self._journal, self._held = blueprint, graph, journal, held
        #: Names of what the output depends on.
        self._alive = {node.name for node in graph.cone(graph.graph.output_node())}
        self._nodes = {node.name: node for node in graph.values()}
        #: Values that are gone -> what took their place, and the edit that did it.
        self._gone = {edit.site: (edit.by, edit) for edit in journal}
        self._edited: dict[Read, list[Edit]] = defaultdict(list)
        for edit in journal:
            for read in edit.constants:
                self._edited[read].append(edit)
        self._conflicts: Conflicts = {}
        self._changes: dict[str, Change] = {}
        self._tensors: dict[str, Tensor] = {}

    def run(self) -> Expression | Conflicts:
        """The fold as the class expresses it; else the edits that it cannot express, and why."""
        known = self._class.values
        for edit in self._journal:
            for value in edit.adds:
                self._blame([edit], value, "an addition would have to go where the class has none")
        replaced: dict[str, Change | str] = {}
        for value, (_, edit) in self._gone.items():
            if value in known:
                self._remove(value, edit, replaced)
        done: set[str] = set()
        for value, slot in list(self._edited):
            if value in known and value in self._alive:
                self._write(value, slot, done)
        return self._conflicts or Expression(tuple(self._changes.values()), self._tensors)

    def _blame(self, edits: Iterable[Edit], value: str, why: str) -> None:
        known = self._class
        here = value in known.values
        where = (known.module(value) if here else "") or type(known.model).__name__
        operator = known.graph.call(known.values[value]).operator if here else ""
        for edit in edits:
            self._conflicts.setdefault((edit.site, edit.direction), Refusal("inexpressible", where, operator, why))

    # -- values that are gone --------------------------------------------------------------------------------------

    def _remove(self, value: str, edit: Edit, replaced: dict[str, Change | str]) -> None:
        path = self._class.module(value)
        if path not in replaced:
            replaced[path] = self._replacement(path)
        change = replaced[path]
        if isinstance(change, Change):
            self._changes[path] = change
            return
        neutral = self._neutral(value)
        if isinstance(neutral, str):
            # Of a module that should go as a whole, why it cannot is more to the point.
            own = [item.value for item in self._class.inside[path] if item.child is None]
            self._blame([edit], value, change if path and all(v in self._gone for v in own) else neutral)
        else:
            name, number = neutral
            self._tensors[name] = torch.full_like(self._class.tensors[name], number)

    def _replacement(self, path: str) -> Change | str:
        """What takes the place of a module; in words why nothing can."""
        if path in self._held:
            return self._held[path]
        known, inside = self._class, self._class.inside[path]
        more = f"the forward of {known.class_of(path)} computes more than that"
        kept = [item for item in inside if item.value in self._alive]
        if not path or any(item.child is None for item in kept):
            return more
        if not known.is_plain(path):
            return f"{known.class_of(path)} takes or returns more than one tensor"
        if known.read_elsewhere(path):
            return "its parameters are also read elsewhere"
        children = {item.child for item in kept if item.child is not None}
        if not children:
            return Change(path, "identity")
        calls = {(item.call, item.child_call) for item in kept}
        once = len({call for call, _ in calls}) == len(calls) == len({item.call for item in inside})
        stays = known.owner(next(iter(children)))
        name = next((name for name, module in known.owner(path).named_children() if module is stays), None)
        if len(children) > 1 or not once or name is None or not self._ends_in(inside, {item.value for item in kept}):
            return more
        return Change(path, "child", name)

    def _ends_in(self, inside: Sequence[Inside], kept: set[str]) -> bool:
        """Whether all that leaves a module is what its remaining child makes."""
        here = {item.value for item in inside}
        for value in here - kept:
            readers = {reader.name for reader in self._class.graph.readers(self._class.values[value])}
            by = value
            while by in self._gone:
                by = self._gone[by][0]
            if readers - here and by not in kept:
                return False
        return True

    def _neutral(self, value: str) -> tuple[str, float] | str:
        """The stored tensor that makes a multiply or an add do nothing, and its value; in words why there is none."""
        known = self._class
        found = self._does_nothing(value)
        if found is None:
            path = known.module(value)
            again = path and len({item.call for item in known.inside[path]})
            if again and again > 1 and not any(item.child for item in known.inside[path]):
                return f"the module is called {again} times, and not every call can do without it"
            semantics = aten.semantics(known.graph.call(known.values[value]))
            function = isinstance(semantics, Scaling) and semantics.kind == "batch_norm"
            how = "calls it as a function" if function else "computes it in a larger forward"
            return f"{known.class_of(path)} {how}"
        slot, number = found
        home = known.home(value, slot)
        if isinstance(home, str):
            return home
        alike = all(self._does_nothing(reader) == (place, number) for reader, place in home.readers)
        if alike and all(reader in self._gone for reader, _ in home.readers):
            return home.name, number
        return f"'{home.name}' is used {len(home.readers)} times, and not every use can go"

    def _does_nothing(self, value: str) -> tuple[str, float] | None:
        """The slot of a multiply's or an add's constant, and the number in it that makes it do nothing."""
        call = self._class.graph.call(self._class.values[value])
        semantics = aten.semantics(call)
        if not isinstance(semantics, Scaling) or semantics.kind not in _NEUTRAL:
            return None
        if semantics.kind == "add" and semantics.affine.has_scale:  # c - x
            return None
        slot = "other" if semantics.slot == "self" else "self"
        return (slot, _NEUTRAL[semantics.kind]) if slot in call.arguments else None  # -x has no constant

    # -- constants that change -------------------------------------------------------------------------------------

    def _write(self, value: str, slot: str, done: set[str]) -> None:
        home = self._class.home(value, slot)
        if isinstance(home, str):
            self._blame(self._edited[value, slot], value, home)
            return
        if home.name in done:
            return
        done.add(home.name)
        live = [read for read in home.readers if read[0] in self._alive]
        now = self._class.tensors.get(home.name)
        found = [new for read in live if (new := self._stored(read, now)) is not None]
        edits = [edit for read in live for edit in self._edited.get(read, [])]
        if len(found) < len(live) or not all(torch.equal(found[0], other) for other in found[1:]):
            several = f"is used {len(live)} times, and each use would need its own"
            self._blame(edits, value, f"'{home.name}' {several if len(live) > 1 else 'would need another shape'}")
            return
        dtype = self._graph.dtype(self._graph.call(self._nodes[value]).at(slot))
        if now is not None and now.dtype != dtype:
            self._blame(edits, value, f"'{home.name}' is of {now.dtype} and would be rounded")
            return
        if now is None:
            module, _, parameter = home.name.rpartition(".")
            self._changes[home.name] = Change(module, "parameter", parameter, tuple(found[0].shape))
        self._tensors[home.name] = found[0]

    def _stored(self, read: Read, now: Tensor | None) -> Tensor | None:
        """What a stored tensor must be for a slot to read its new constant; None where it must not change."""
        home = self._class.home(*read)
        if read not in self._edited or isinstance(home, str):
            return None
        constant = self._graph.call(self._nodes[read[0]]).constant(read[1])
        return None if constant is None else home.stored(constant, None if now is None else now.shape)
