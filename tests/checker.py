"""The one numeric checker: a fold is right when, in float64, the folded program computes what the module does.

net = build(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
folded = fold_exactly(net, torch.randn(2, 3, 8, 8).double())
folded = fold_exactly(net, x, left={"nonlinear", "model-output"})
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from operator import getitem
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import bnfold
from bnfold.report import Entry

#: Largest error, relative to the largest element of an output, between a float64 module and its folded program.
RELATIVE = 1e-10


class Net(nn.Module):
    """A module whose forward is ``run(self, *inputs)``, with ``parts`` as its modules, parameters and buffers."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def build(run: Callable[..., Any], *, seed: int = 0, **parts: nn.Module | Tensor) -> nn.Module:
    """A float64 ``Net`` in eval mode with weights and statistics that no fold can ignore."""
    return zoo.randomize(zoo.he_init(Net(run, **parts), seed), seed).double()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal noise, the same for the same ``seed``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fold_exactly(
    module: nn.Module,
    *args: Any,
    left: int | Collection[str] | None = 0,
    dynamic: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    relative: float = RELATIVE,
) -> bnfold.Folded:
    """Folds ``module``, which is float64 with float64 ``args``, and asserts that this was right.

    The folded program's outputs equal those of the eager module in eval mode, at the example's batch and, where
    the batch is ``dynamic``, also at batch 1 and 3; no operator was added; ``module`` is what it was before.

    Args:
        left: how many affines are left, or every reason code that the ledger gives for those that are; None for any.
        dynamic: whether the batch, axis 0 of every input of the first one's size, is dynamic.
        relative: largest error, relative to the largest element of an output.
    """
    before, modes = state_bytes(module), [m.training for m in module.modules()]
    folded = bnfold.fold(module, args, kwargs, dynamic_shapes=dynamic_shapes, static=not dynamic)
    assert_same_state(before, state_bytes(module))
    assert modes == [m.training for m in module.modules()]

    reference, program = copy.deepcopy(module).eval(), folded.module
    for batch in (None, 1, 3) if dynamic else (None,):
        given, named = other_inputs((args, dict(kwargs or {})), batch)
        with torch.no_grad():
            assert_close(program(*given, **named), reference(*given, **named), relative)

    assert count_operators(folded.program) <= count_operators(folded.captured.program), "operators were added"
    entries = folded.ledger.left
    if left is None:
        return folded
    if isinstance(left, int):
        assert len(entries) == left, describe(entries)
    else:
        assert reasons(folded) == set(left), describe(entries)
    return folded


def reasons(folded: bnfold.Folded) -> set[str]:
    """Every reason code that the ledger gives for the affines that are left."""
    return {refusal.reason for entry in folded.ledger.left for refusal in entry.refusals}


def describe(entries: Collection[Entry]) -> str:
    """The affines that are left and why, for the message of an assertion."""
    return "; ".join(f"{e.kind} {e.value}: " + ", ".join(map(str, e.refusals)) for e in entries) or "nothing is left"


def other_inputs(inputs: Any, batch: int | None) -> Any:
    """Inputs like ``inputs`` with other elements and ``batch`` samples; None keeps the number of samples."""
    first = next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim)

    def other(leaf: Tensor) -> Tensor:
        if not leaf.ndim:
            return leaf
        if batch is not None and leaf.shape[0] == first.shape[0]:
            leaf = leaf[torch.arange(batch) % len(leaf)]
        return leaf + 0.3 * torch.randn_like(leaf) if leaf.is_floating_point() else leaf.flip(-1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return pytree.tree_map_only(Tensor, other, inputs)


def assert_close(outputs: Any, wanted: Any, relative: float = RELATIVE) -> None:
    """Structure, shape and dtype are equal, and floating-point elements to ``relative`` of the largest one."""
    (found, structure), (true, same) = pytree.tree_flatten(outputs), pytree.tree_flatten(wanted)
    assert structure == same
    for a, b in zip(found, true, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        finite = b.isfinite()
        assert torch.equal(a[~finite].nan_to_num(nan=7.0), b[~finite].nan_to_num(nan=7.0))
        error, size = (a - b)[finite].abs(), b[finite].abs()
        assert not len(error) or float(error.max()) <= relative * float(size.max()), float(error.max() / size.max())


def operators(program: ExportedProgram) -> Counter[str]:
    """How often every operator that computes tensors occurs: ``{"conv2d": 2, ...}``; picking one of several is none."""
    return Counter(
        getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.target is not getitem
        and isinstance(node.meta.get("val"), (Tensor, list, tuple))
    )


def removed(folded: bnfold.Folded) -> Counter[str]:
    """The operators that folding took away, with how many of each."""
    return operators(folded.captured.program) - operators(folded.program)


def count_operators(program: ExportedProgram) -> int:
    """How many operators of a program compute tensors."""
    return sum(operators(program).values())


def state_bytes(module: nn.Module) -> dict[str, Tensor]:
    """The bytes of everything in the state dict, copied."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        for name, tensor in module.state_dict().items()
    }


def assert_same_state(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Two ``state_bytes`` are equal, bit for bit."""
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"changed: {changed}"
