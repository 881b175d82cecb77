"""The walls between the parts, read off the source: who imports whom, and who knows what."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bnfold"

#: Part, which is a package or a module beside them -> the parts that it imports. The front, the data flow and what its
#: stages share come one after the other, so that no part imports one that stands above it.
ALLOWED: dict[str, str] = {
    "__init__": "_version eager errors loading options pipeline report statistics",
    "__main__": "cli",
    "pytest_plugin": "commands render",
    "cli": "_version commands errors",
    "commands": "errors files fleet gate loading options pipeline render report runtime stages store timing",
    "fleet": "_version errors files graph lowering pipeline render report runtime store",
    "pipeline": "errors files gate graph interface loading lowering onnx_flow options output report runtime stages"
    " statistics store",
    "onnx_flow": "affine errors files gate graph interface loading lowering options output passes report runtime stages"
    " statistics store",
    "output": "_version errors files gate lowering options report store",
    "stages": "_version errors gate graph interface loading options passes report runtime statistics",
    "interface": "errors graph options report",
    "options": "eager errors gate graph loading report runtime user_code",
    "eager": "aten errors gate graph loading passes report semantics",
    "loading": "errors files graph report runtime statistics user_code",
    "statistics": "affine aten errors gate graph onnx_ops report semantics user_code",
    "passes": "affine aten errors graph report semantics",
    "timing": "errors graph report runtime",
    "lowering": "errors graph",
    "gate": "affine aten errors evaluate files graph report runtime store",
    "graph": "affine aten errors evaluate onnx_ops report rounding semantics",
    "evaluate": "aten errors rounding runtime",
    "aten": "semantics",
    "onnx_ops": "affine semantics",
    "render": "_version errors report",
    "runtime": "_version errors files report user_code",
    "store": "errors files",
    "semantics": "affine",
    "report": "_version",
    "user_code": "errors",
    "files": "errors",
    "rounding": "",
    "affine": "",
    "_version": "",
    "errors": "",
}
ONNX = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxsim"}
#: Parts, modules and beginnings of such that may import those: files in, files out, and whoever runs them.
KNOWS_ONNX = (
    "evaluate.", "gate.", "graph.onnx_", "interface", "loading.onnx_file", "lowering.", "onnx_flow", "runtime.",
)  # fmt: skip
#: Who names an ATen operator outside of aten/, and what for.
KNOWS_ATEN = {
    "graph.graph": "adds a bias where a contraction takes none",
    "graph.functional": "swaps in-place operators for their twins before anything is folded",
    "passes.normalisations": "writes their arithmetic as the operator that it is",
    "passes.solution": "takes the prefix off a name that is printed",
    "interface": "likewise",
    "graph.interpret": "reads the bits of a value in its own dtype where a run is in float64",
    "lowering.translate": "writes operators that torch.onnx does not know, or misreads, by those that they stand for",
    "lowering.translations": "writes recurrent layers that torch.onnx unrolls as the operators that ONNX has",
    "graph.tracing": "keeps recurrent layers whole while they are traced",
}
#: What a command shows before it computes anything is there at once.
NO_TORCH_AT_IMPORT = (
    "__init__", "__main__", "cli", "pytest_plugin", "gate.baseline", "commands.", "fleet.", "render.", "report.",
    "errors", "files", "loading.specs", "store", "_version",
)  # fmt: skip


def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module by its dotted name below ``bnfold``; a package has that of its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


SOURCES = sources()


def part_of(module: str) -> str:
    return module.split(".")[0]


def imported(node: ast.AST) -> set[str]:
    """What one statement imports, as dotted names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        each = {f"{node.module}.{alias.name}" for alias in node.names}
        modules = {name for name in each if name.removeprefix("bnfold.") in SOURCES}
        return modules or {str(node.module)}
    return set()


def of_bnfold(names: set[str], own: str = "") -> set[str]:
    """The modules of bnfold among dotted names."""
    return {name.removeprefix("bnfold.") for name in names if name.startswith("bnfold.")} - {own}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(tree: ast.AST, *, functions: bool, types: bool) -> Iterator[ast.AST]:
    """The statements that run: of the functions too, or only on import; those for type checkers only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node) and not types:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
            continue
        yield node
        yield from walk(node, functions=functions, types=types)


def imports(module: str, *, functions: bool = True, types: bool = True) -> set[str]:
    statements = walk(SOURCES[module], functions=functions, types=types)
    return {name for node in statements for name in imported(node)}


def lazily_public() -> set[str]:
    """The modules that ``bnfold.__getattr__`` imports by name."""
    strings = (node.value for node in ast.walk(SOURCES["__init__"]) if isinstance(node, ast.Constant))
    return {name for name in of_bnfold({str(text) for text in strings}) if name in SOURCES}


def uses(module: str) -> set[str]:
    """The parts that a module imports, but for type checkers."""
    found = of_bnfold(imports(module, types=False)) | (lazily_public() if module == "__init__" else set())
    return {part_of(name) for name in found} - {part_of(module)}


def matches(module: str, names: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(name) if name[-1] in "._" else module == name for name in names)


@pytest.mark.parametrize("part", sorted({*ALLOWED, *map(part_of, SOURCES)}))
def test_a_part_imports_what_its_row_says(part: str) -> None:
    used = {other for module in SOURCES if part_of(module) == part for other in uses(module)}
    assert used == set(ALLOWED[part].split())


def test_parts_import_one_way() -> None:
    graphlib.TopologicalSorter({part: row.split() for part, row in ALLOWED.items()}).prepare()


def test_modules_import_one_way() -> None:
    """No cycle, even through imports inside functions; those for type checkers alone may close one."""
    graph = {module: of_bnfold(imports(module, types=False), own=module) - {part_of(module)} for module in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if not matches(name, KNOWS_ONNX)))
def test_only_who_reads_writes_or_runs_files_knows_onnx(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & ONNX


def test_only_aten_names_operators() -> None:
    found = set()
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            literal = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.endswith("ops.aten") or literal.startswith("aten."):
                found.add(module)
    assert {module for module in found if part_of(module) != "aten"} == set(KNOWS_ATEN)


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if matches(name, NO_TORCH_AT_IMPORT)))
def test_the_front_imports_nothing_heavy(module: str) -> None:
    """Nor does what it imports at once."""
    seen, todo = set(), {module}
    while todo:
        name = todo.pop()
        seen.add(name)
        direct = imports(name, functions=False, types=False)
        heavy = {found.split(".")[0] for found in direct} & ({"torch", "numpy", "safetensors"} | ONNX)
        assert not heavy, f"{name} imports {heavy}"
        todo |= of_bnfold(direct) - seen


def test_the_reader_of_imports_sees_them() -> None:
    """Each wall above would fall if this did not hold."""
    assert "torch" in imports("pipeline", functions=False, types=False)
    assert "stages" in of_bnfold(imports("pipeline")) and "pipeline" in of_bnfold(imports("commands"))
    assert "pipeline" not in of_bnfold(imports("commands", functions=False, types=False))
    call = "semantics.call"
    assert "graph.graph" in of_bnfold(imports(call)) and "graph.graph" not in of_bnfold(imports(call, types=False))
    assert "onnxsim" in imports("lowering.lower") and "onnxsim" not in imports("lowering.lower", functions=False)
    assert "pipeline" in lazily_public()
