"""The walls between the modules, read off the source: who imports whom, and who knows what."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bnfold"
#: Packages that only sort modules by what they are for: each module has its own row.
SHELVES = {"loading", "graph", "passes", "lowering", "gate", "runtime", "statistics", "eager", "evaluate"}

#: Module -> what it may import of bnfold. cli -> pipeline -> stages -> shared vocabulary; stages do not import one
#: another. A package stands for all of its modules, which may import one another.
ALLOWED: dict[str, str] = {
    # the front
    "__init__": "_version calibration eager errors options pipeline report structure",
    "__main__": "cli",
    "cli": "_version commands errors",
    "pytest_plugin": "commands render report",
    "commands": "baseline bench doctor errors files fleet inputs load normalize options pipeline render report"
    " sharding specs stages store",
    "fleet": "_version errors lower pipeline providers render report store threads",
    "render": "_version doctor errors report",
    "doctor": "_version runtime",
    "bench": "contestants model_file report runtime threads",
    "contestants": "capture copies errors runtime scripted",
    # the data flow
    "pipeline": "batches bisection calibrated_file calibration diagnose errors file_graph gate interface lower program"
    " model_file onnx_flow options parts program_file report runtime schemes stages store structure user_code wrapped",
    "sharding": "batches calibration errors gate options parts report runtime schemes stages",
    "stages": "_version assumed baseline capture data decisions drawing equalize errors folding graph inputs interface"
    " load lower merge model_file names onnx_file options ranges report runner runtime specs store stored wrapped",
    "drawing": "capture functional report",
    "interface": "capture errors names options report",
    "options": "capture eager errors gate load report runner user_code wrapped",
    # the stages, each with the parts that are its own
    # One ONNX file against another
    "onnx_flow": "affine data diagnose drawing equalize errors file_bisection file_gate file_layers folding lower merge"
    " onnx_file onnx_graph options report runtime stages store",
    "onnx_graph": "affine call errors graph names onnx_call onnx_operator onnx_ops onnx_shapes report semantics"
    " weights",
    "onnx_operator": "evaluator",
    "onnx_call": "call onnx_graph",  # onnx_graph only as a type
    "onnx_shapes": "errors evaluator onnx_inference subject weights",
    "onnx_inference": "",
    "onnx_ops": "affine onnx_call semantics",
    "file_gate": "candidates claims deployed engines errors evaluator evidence judge model_file models original report"
    " runtime samples session subject",
    "onnx_file": "errors model_file specs",
    "load": "onnx_file capture checkpoint copies errors files fitting hubs"
    " inert normalize program_file script_file structure user_code weights_file wrapped",
    "hubs": "errors files normalize",
    "normalize": "errors",
    "user_code": "errors",
    "structure": "calibrated_file capture copies errors report weights_file",
    "weights_file": "errors files",
    "eager": "blueprint candidates capture copies errors expression folding gate graph interpret judge models outside"
    " probing report"
    " samples structure",
    "probing": "capture copies report structure",
    "expression": "aten blueprint graph plan report semantics",
    "blueprint": "capture graph interpret",
    "program_file": "allowed checkpoint errors program",
    "script_file": "checkpoint errors scripted",
    "allowed": "",
    "fitting": "calibrated_file checkpoint errors inert",
    "inert": "",
    "wrapped": "copies errors",
    "checkpoint": "errors files inert",
    "inputs": "errors scripted specs",
    "assumed": "copies inputs scripted specs",
    "specs": "errors",
    "capture": "asking copies dimensions errors functional names program regions scripted stale tracing",
    "asking": "dimensions errors failures tracing",
    "tracing": "copies failures whole_layers",
    "copies": "errors",
    "dimensions": "",
    "whole_layers": "",
    "scripted": "allowed errors",
    "failures": "errors",
    "regions": "",
    "threads": "",
    "stale": "errors failures",
    "functional": "errors",
    "bodies": "errors functional graph program regions report",
    "folding": "affine bodies choices gauges graph normalisations plan reasons report rewriter semantics sizes solution"
    " threads",
    "normalisations": "affine aten graph semantics",
    "plan": "gauges graph report semantics solution",
    "solution": "affine gauges graph semantics",
    "choices": "gauges graph semantics",
    "reasons": "gauges graph report rewriter semantics",
    "gauges": "affine call graph rewriter semantics sizes",
    "rewriter": "affine graph semantics",
    "equalize": "choices gauges graph plan report rewriter semantics solution",
    "ranges": "affine aten capture graph interpret report semantics sizes",
    "merge": "graph kernels linear report semantics",
    "linear": "graph kernels rewriter semantics",
    "kernels": "semantics",
    "lower": "errors names program translate",
    "translate": "errors translations whole_layers",
    "translations": "",
    "gate": "accuracy adversarial affine candidates capture claims data deployed devices effort engines errors"
    " evaluator evidence interpret judge matching model_file models outside parts program report runner runners runtime"
    " samples sites stored threads",
    "file_bisection": "bisection candidates errors file_gate file_graph judge models",
    "bisection": "affine candidates capture claims deployed engines errors evidence file_graph functional gate judge"
    " matching model_file models report runtime samples sites stored",
    "file_graph": "model_file",
    "operator_bounds": "attributes subject",
    "optimizers": "",
    "decisions": "aten",
    "sites": "affine claims evidence judge models report",
    "accuracy": "candidates capture data errors evidence interpret judge metrics models names outside parts report"
    " samples stored",
    "parts": "metrics",
    "metrics": "report",
    "data": "errors stored",
    "stored": "errors files",
    "adversarial": "capture draw functional interpret models report samples",
    "devices": "candidates models placement report",
    "engines": "interpret report runtime",
    "runners": "capture engines evidence models names runner runtime subject",
    "candidates": "capture engines errors models placement report runtime",
    "matching": "capture errors names runtime",
    "baseline": "errors files report store",
    "judge": "decisions errors evidence models report samples subject",
    "samples": "dimensions draw stored",
    "draw": "",
    "store": "errors files",
    "claims": "evaluator models samples subject",
    "original": "claims errors evaluator evidence models runtime samples subject",
    "deployed": "alone candidates claims by_operator errors evaluator evidence judge models optimizers outside subject",
    "evidence": "",
    "models": "aten capture decisions errors evidence functional interpret names samples subject",
    "outside": "candidates evidence judge models runners",
    "effort": "capture samples",
    # ONNX files in float64
    "evaluator": "aten attributes deciding errors limits model_file nodes rounding subject weights",
    "weights": "errors subject",
    "limits": "",
    "nodes": "attributes operators subject",
    "by_operator": "attributes errors evaluator evidence operator_bounds operators subject",
    "alone": "by_operator errors evaluator runtime subject",
    "operators": "attributes recurrent resize windows",
    "windows": "attributes",
    "recurrent": "attributes",
    "resize": "attributes",
    "deciding": "aten attributes",
    "attributes": "",
    "subject": "session",
    "runtime": "arithmetic device providers session",
    "placement": "report runtime",
    "providers": "device errors session",
    "arithmetic": "device session",
    "session": "device errors files",
    "device": "",
    "model_file": "errors files",
    "runner": "errors user_code",
    # the health of BatchNorms, and statistics from data
    "diagnose": "batches batchnorms capture copies data distance errors findings interpret layers report",
    "file_layers": "findings layers onnx_call onnx_graph onnx_ops report",
    "findings": "layers report",
    "layers": "aten batchnorms graph report",
    "distance": "moments",
    "calibration": "batches batchnorms capture copies errors moments report schemes user_code",
    "schemes": "batches batchnorms errors moments waves",
    "calibrated_file": "batchnorms weights_file",
    "batches": "data errors scripted stored",
    "waves": "batchnorms errors",
    "batchnorms": "report",
    "moments": "",
    # the vocabulary, and the graph that folding and merging edit
    "graph": "affine aten call functional interpret names program semantics sizes",
    "call": "graph semantics",  # graph only as a type
    "aten": "affine call semantics sizes",
    "sizes": "",
    "semantics": "affine",
    "affine": "",
    "interpret": "rounding",
    "rounding": "",
    "program": "affine errors names",
    "names": "",
    "report": "_version",
    "files": "errors",
    "errors": "",
    "_version": "",
}
ONNX = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxsim"}
KNOWS_ONNX = {
    "model_file",
    "lower",
    "translate",
    "translations",
    "session",
    "providers",
    "arithmetic",
    "candidates",
    "claims",
    "by_operator",
    "alone",
    "gate",
    "evaluator",
    "weights",
    "nodes",
    "deciding",
    "onnx_file",
    *("drawing", "onnx_flow", "onnx_graph", "onnx_inference", "onnx_operator", "onnx_shapes"),
}
#: Who names an ATen operator outside of aten/, and what for.
KNOWS_ATEN = {
    "graph": "adds a bias where a contraction takes none",
    "functional": "swaps in-place operators for their twins before anything is folded",
    "normalisations": "writes their arithmetic as the operator that it is",
    "plan": "takes the prefix off a name that is printed",
    "drawing": "likewise",
    "interpret": "reads the bits of a value in its own dtype where a run is in float64",
    "lower": "takes unused statistics from a batch_norm that torch.onnx would misread",
    "translate": "writes operators that torch.onnx does not know by those that they stand for",
    "translations": "writes recurrent layers that torch.onnx unrolls as the operators that ONNX has",
    "whole_layers": "keeps recurrent layers whole while they are traced",
}
NO_TORCH_AT_IMPORT = {
    "__init__",
    "__main__",
    "cli",
    "pytest_plugin",
    "baseline",
    "commands",
    "fleet",
    "render",
    "report",
    "errors",
    "files",
    "specs",
    "store",
    "_version",
}


def module_of(parts: Sequence[str]) -> str | None:
    """The row that a dotted path below ``bnfold`` belongs to; None for a package of rows and for names in modules."""
    if parts[0] not in SHELVES:
        return parts[0]
    return parts[1] if len(parts) > 1 else None


def sources() -> dict[str, list[ast.Module]]:
    """The syntax trees of every module, those of a package that stands for its modules together."""
    found: dict[str, list[ast.Module]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = module_of(parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if name == "__init__" and len(parts) > 1:
            assert len(tree.body) == 1, f"{path}: what a package of modules holds is its docstring"
        elif name is not None:
            found.setdefault(name, []).append(tree)
    return found


SOURCES = sources()


def imported(node: ast.AST) -> set[str]:
    """What one statement imports, as dotted names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        inner = node.module == "bnfold" or str(node.module) in {f"bnfold.{shelf}" for shelf in SHELVES}
        return {f"{node.module}.{alias.name}" for alias in node.names} if inner else {str(node.module)}
    return set()


def of_bnfold(names: set[str], own: str = "") -> set[str]:
    found = {module_of(name.split(".")[1:]) for name in names if name.startswith("bnfold.")}
    return {name for name in found if name is not None} - {own}


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
    return {
        name
        for tree in SOURCES[module]
        for node in walk(tree, functions=functions, types=types)
        for name in imported(node)
    }


def lazily_public() -> set[str]:
    """The modules that ``bnfold.__getattr__`` imports by name."""
    strings = (node.value for tree in SOURCES["__init__"] for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return of_bnfold({str(text) for text in strings})


def test_every_module_has_its_row() -> None:
    assert set(SOURCES) == set(ALLOWED)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    used = of_bnfold(imports(module), own=module) | (lazily_public() if module == "__init__" else set())
    assert used <= set(ALLOWED[module].split()), f"{module} imports {used - set(ALLOWED[module].split())}"


def test_imports_run_one_way() -> None:
    """No cycle, even through imports inside functions; those for type checkers alone may close one."""
    graph = {module: of_bnfold(imports(module, types=False), own=module) for module in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(set(SOURCES) - KNOWS_ONNX))
def test_only_the_stages_after_folding_know_onnx(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & ONNX


def test_only_aten_names_operators() -> None:
    found = set()
    for module, trees in SOURCES.items():
        for node in (node for tree in trees for node in ast.walk(tree)):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            literal = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.endswith("ops.aten") or literal.startswith("aten."):
                found.add(module)
    assert found - {"aten"} == set(KNOWS_ATEN)


@pytest.mark.parametrize("module", sorted(NO_TORCH_AT_IMPORT))
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
    assert "graph" in of_bnfold(imports("call")) and "graph" not in of_bnfold(imports("call", types=False))
    assert "onnxsim" in imports("lower") and "onnxsim" not in imports("lower", functions=False)
    assert "pipeline" in lazily_public()
