"""What a stranger's .pt2 may hold: operators that compute on tensors and numbers alone."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnfold.aten import TABLE
from bnfold.errors import InputError
from bnfold.graph import allowed
from bnfold.graph.allowed import is_allowed
from bnfold.loading.program_file import load_program, save_program

torch.set_num_threads(1)
#: What an argument of an allowed operator may be, and what the text among them chooses. None names a file.
TYPES = {"Tensor", "number", "int", "float", "bool", "complex", "Device", "Generator", "str", "AnyEnumType", "Any", "t"}
TEXTS = {
    *("norm", "interpolation", "driver", "rounding_mode", "UPLO", "reduce", "side", "mode", "equation", "indexing"),
    *("approximate", "ord", "padding", "padding_side", "pad_mode", "assert_msg"),
    *("self", "a", "b", "substr", "el", "string", "separator"),  # TorchScript's own operators on texts
}


def test_docstring_examples_run() -> None:
    assert doctest.testmod(allowed).failed == 0


def test_every_row_of_the_table_is_allowed() -> None:
    assert not [name for name in TABLE if not is_allowed(f"torch.ops.{name}.default")]


def test_no_allowed_operator_takes_more_than_tensors_and_numbers() -> None:
    names = allowed._ALLOWED["aten"]
    assert all(hasattr(torch.ops.aten, name) for name in names)
    for name in filter(lambda name: hasattr(torch.ops.aten, name), (*names, *(f"{name}_" for name in names))):
        packet = getattr(torch.ops.aten, name)
        for argument in (a for overload in packet.overloads() for a in getattr(packet, overload)._schema.arguments):
            kind = str(argument.type)
            for outer in ("Optional[", "List["):
                kind = kind.replace(outer, "").replace("]", "")
            assert kind in TYPES or kind.startswith("Dict["), f"{name}: {argument.name} is a {argument.type}"
            assert kind != "str" or argument.name in TEXTS, f"{name}: {argument.name}"


@pytest.mark.parametrize(
    "target",
    [
        *(
            "torch.ops.aten.from_file.default",
            "torch.ops.image.write_file.default",
            "torch.ops.image.read_file.default",
        ),
        *("torch.ops.aten.save.default", "torch.ops.aten.set_.source_Storage", "torch.ops.aten.resize_.default"),
        *("torch.ops.aten.data_ptr.default", "torch.ops.aten.warn.default", "torch.ops.prim.Print.default"),
        *("torch.ops.higher_order.call_torchbind", "torch.ops.higher_order.triton_kernel_wrapper_mutation"),
        *("torch.ops.higher_order.with_effects", "torch.ops.inductor.accumulate_grad_.default"),
        *("torch.ops.load_library", "torch.load", "torch.hub.load", "torch.sym_max.__globals__", "math.nan.real"),
        *("torch.ops.torch.sym_max.default", "torch.ops.math.sqrt.default", "torch.ops._operator.add.default"),
        *("_operator.call", "_operator.attrgetter", "_operator.methodcaller", "_operator.setitem", "os.system", ""),
        *(
            "aten.relu.default",
            "torch.ops.aten.relu.default.x",
            "torch.ops.aten.relu\n",
            " torch.ops.aten.relu.default",
        ),
        *("torch.ops.aten.__init__.default", "torch.ops.aten._", "#torch.ops.aten.from_file.default"),
    ],
)
def test_what_is_not_on_the_list_is_refused(target: str) -> None:
    assert not is_allowed(target)


def program(operator: Any, *arguments: Any, **more: Any) -> torch.export.ExportedProgram:
    """A program of a convolution and a BatchNorm, and one call of ``operator``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.net(x) + torch.zeros(4).sum()
            return y

    made = torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),))
    graph = made.graph_module.graph
    for node in [node for node in graph.nodes if "zeros" in str(node.target)]:
        with graph.inserting_before(node):
            new = graph.call_function(operator, arguments, more)
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    made.graph_module.recompile()
    return made


def test_a_program_that_maps_a_file_is_refused_before_torch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "evil.pt2"
    victim.write_text("sixteen bytes ok")
    made = program(torch.ops.aten.from_file.default, str(victim), True, 4, dtype=torch.float32)
    torch.export.save(made, path)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch.export.load was reached"))
    with pytest.raises(InputError, match=r"aten.from_file.default.*--unsafe-pickle"):
        load_program(path)
    assert victim.read_text() == "sixteen bytes ok"


def test_the_same_program_without_it_loads(tmp_path: Path) -> None:
    torch.export.save(program(torch.ops.aten.ones.default, [4]), tmp_path / "good.pt2")
    loaded = load_program(tmp_path / "good.pt2")
    save_program(loaded, tmp_path / "again.pt2")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.module()(x), load_program(tmp_path / "again.pt2").module()(x))
