"""Writing a fold back into the model's own class: changed weights, new biases, Identity where a BatchNorm was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.eager.blueprint import Blueprint
from bnfold.eager.expression import Attempt, Conflicts, Expression
from bnfold.errors import FoldError, InputError
from bnfold.gate.findings import Findings
from bnfold.gate.gate import LIMIT
from bnfold.gate.judge import Judge, run_cases
from bnfold.gate.models import Model
from bnfold.gate.outside import TorchCandidate, judge_outside
from bnfold.gate.samples import batches
from bnfold.graph.capture import Captured
from bnfold.graph.copies import copied, eval_copy
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import constant_of
from bnfold.loading.structure import restructure
from bnfold.passes.folding import DIRECTIONS, Folder
from bnfold.report import Change, Entry, Ledger
from bnfold.report.progress import silent


@dataclass(frozen=True)
class WrittenBack:
    """A fold that a model's own class expresses."""

    #: a copy of the model, of the same class and in eval mode, with the fold in its weights and structure.
    module: nn.Module
    ledger: Ledger  #: of this fold; its ``changes`` let ``prepare`` give another instance the structure of ``module``.
    program: ExportedProgram  #: the same fold as a program.

    @property
    def refused(self) -> tuple[Entry, ...]:
        """The affines that could be folded in a graph, and that the class cannot express without."""
        return tuple(e for e in self.ledger.left if any(r.reason == "inexpressible" for r in e.refusals))


def write_back(captured: Captured, model: nn.Module | ExportedProgram) -> WrittenBack:
    """Folds ``captured`` as far as the class of ``model`` can express it, and writes that into a copy of ``model``.

    Nothing is merged. What is left out is planned around, so that the rest is a fold in its own right. InputError where
    ``model`` is a program, which has no class, or is not what was captured; FoldError where the copy is not equal to
    it.
    """
    if isinstance(model, ExportedProgram) or captured.eager is None:
        hint = "Give the module that it was exported from, or fold to .pt2"
        raise InputError("an exported program has no class to write a fold into", hint=hint)
    _refuse_other(captured, model)
    graph, ledger, expression = _expressible(captured)
    program = graph.finish()
    written = copied(eval_copy(model))
    if captured.masters is not None:
        written = written.to(_dtype(captured))
    modules = dict(written.named_modules(remove_duplicate=False))  # by their names before any takes another's place
    restructure(written, expression.changes)
    _fill(modules, expression.tensors)
    changes = (*expression.changes, *_statistics(written))
    result = WrittenBack(written, replace(ledger, changes=changes), program)
    _verify(captured, written)
    return result


def _expressible(captured: Captured) -> tuple[Graph, Ledger, Expression]:
    """The fold without what the class cannot express: found by trying, as one affine may rest on another."""
    blueprint = Blueprint(captured)
    excluded: Conflicts = {}
    held: dict[str, str] = {}
    while True:
        graph = Graph(captured.program, captured.masters)
        graph.materialise()
        folder = Folder(graph, excluded)
        ledger = folder.run()
        found = Attempt(blueprint, graph, folder.journal(), held).run()
        if not isinstance(found, Expression):
            if found.keys() <= excluded.keys():  # whichever way they go
                found = {(site, way): refusal for (site, _), refusal in found.items() for way in DIRECTIONS}
            excluded |= found
        elif staying := held_in_place(captured, found.changes):
            held |= staying
        else:
            return graph, ledger, found


def _refuse_other(captured: Captured, model: nn.Module) -> None:
    """Raises InputError where ``model`` does not hold what was captured."""
    assert captured.eager is not None
    if not _same_class(model, captured.eager):
        what = f"this is a {type(model).__name__}, and a {type(captured.eager).__name__} was folded"
        raise InputError(what, hint="Give the model that was folded")
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name in captured.program.state_dict:
        now = own.get(name)
        then = (captured.masters or {}).get(name, constant_of(captured.program, name))
        if now is None or now.shape != then.shape or not _same(now.detach(), then.detach()):
            what = f"'{name}' is not what it was when the model was folded"
            raise InputError(what, where=type(model).__name__, hint="Fold the model as it is now")


def _same_class(one: nn.Module, other: nn.Module) -> bool:
    """Every GraphModule is of a class of its own, whose forward is its code."""
    if isinstance(one, GraphModule) and isinstance(other, GraphModule):
        return bool(one.code == other.code)
    return type(one) is type(other)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or one.data_ptr() == other.data_ptr() or _equal(one.to("cpu"), other.to("cpu"))


def _dtype(captured: Captured) -> torch.dtype:
    floats = (t.dtype for t in captured.program.state_dict.values() if t.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _statistics(model: nn.Module) -> tuple[Change, ...]:
    """Those of the BatchNorms that stay: calibration may have given them what their class builds them without."""
    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    return tuple(Change(name, "statistics") for name, norm in norms if norm.running_mean is not None)


@torch.no_grad()
def _fill(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Gives tensors their folded values, rounded once; a tensor under several names stays one."""
    for name, value in tensors.items():
        owner, _, own_name = name.rpartition(".")
        getattr(modules[owner], own_name).copy_(value)


def _verify(captured: Captured, written: nn.Module) -> None:
    """Raises FoldError unless the written module computes what the unfolded model does."""
    made = batches(captured.program, captured.names, captured.flat, sizes=captured.sizes)
    model, findings = Model(captured), Findings()
    cases, reason = run_cases(model, made[:2], findings, silent)
    if cases:
        judge = Judge(model, cases, findings, LIMIT)
        judge_outside(judge, TorchCandidate("it", replace(captured, eager=written).run_eager))
        judge.report("it")
    else:
        findings.problems.append(f"it runs on no input: {reason}")
    if findings.problems:
        what = f"the fold does not hold in the model's class: {findings.problems[0]}"
        raise FoldError(what, where=type(written).__name__, hint="Fold to .pt2 instead, and please report this model")


# -- whether a model's code lets a module go: it may read its attributes, ask for its class, hold it twice, or hook it -


def held_in_place(captured: Captured, changes: Sequence[Change]) -> dict[str, str]:
    """The modules among ``changes`` that must stay, by name, and why in words.

    In a copy each new module takes the old one's place, with the new one's class and attributes, and computes what the
    old one did. Code that only calls the module then computes the same; other code fails, differs, or goes past it.
    """
    swaps = [change for change in changes if change.kind != "parameter"]
    if not swaps:
        return {}
    expected = captured.run_eager(captured.flat)
    why = _objection(captured, swaps, expected)
    if why is None:
        return {}
    found = {change.module: _objection(captured, [change], expected) for change in swaps}
    # Where each alone can go and all together cannot, none does.
    return {name: one for name, one in found.items() if one} or {change.module: why for change in swaps}


def _objection(captured: Captured, changes: Sequence[Change], expected: Sequence[Any]) -> str | None:
    """What the model's code has against ``changes``, on the example inputs; None where it is nothing."""
    assert captured.eager is not None
    model = eval_copy(captured.eager)
    through: set[int] = set()
    past: list[nn.Module] = []
    kinds: set[str] = set()

    def probe(old: nn.Module, new: nn.Module) -> nn.Module:
        def forward(*args: Any, **kwargs: Any) -> Any:
            through.add(id(old))
            return old.forward(*args, **kwargs)  # its hooks go with it

        old.register_forward_pre_hook(lambda module, args: past.append(old))
        kinds.add(type(new).__name__)
        return _computing(new, forward)

    restructure(model, changes, probe)
    instead = f"with {' and '.join(sorted(kinds))} in its place the model"
    try:
        with torch.compiler.set_stance("force_eager"):
            found = replace(captured, eager=model).run_eager(captured.flat)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{instead} fails: {type(error).__name__}: {lines[0]}"
    if past:
        return "the model's code also holds it elsewhere than under its name"
    if len(through) < len(changes) or not all(map(_equal, found, expected)):
        return f"{instead} computes something else"
    copies, themselves = (_left_behind(captured, changes, copied) for copied in (True, False))
    if not all(map(_equal, copies, themselves)):
        return f"{instead} writes to a value in place that it had a new one of"
    return None


def _left_behind(captured: Captured, changes: Sequence[Change], copied: bool) -> list[Any]:
    """Outputs, and inputs as they are afterwards, with ``changes``: each new module acts on its argument or a copy.

    What it returns may be its argument, where the old one made a new tensor.
    """

    def probe(old: nn.Module, new: nn.Module) -> nn.Module:
        return _computing(new, lambda x: new.forward(x.clone() if copied else x))

    assert captured.eager is not None
    model = eval_copy(captured.eager)
    restructure(model, changes, probe)
    flat = tuple(value.clone() if isinstance(value, Tensor) else value for value in captured.flat)
    return [*replace(captured, eager=model).run_eager(flat), *flat]


def _computing(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A copy of a module without its hooks and with another forward."""
    made = copy.copy(module)
    made._forward_hooks, made._forward_pre_hooks, made.forward = OrderedDict(), OrderedDict(), forward
    return made


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    return one.shape == other.shape and bool(((one == other) | (torch.isnan(one) & torch.isnan(other))).all())
