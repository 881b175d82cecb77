"""Lowering: a folded program -> ONNX, with nothing between our pass and the gate folding unseen.

torch.onnx.export's own optimiser folds Conv-BN (ignoring the training flag), so it stays off, and onnxsim sees a
skeleton whose large initializers are graph inputs: what it cannot see it cannot fold, and it takes the same time for
any size of weights.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from bnfold.errors import LowerError
from bnfold.graph.names import output_names
from bnfold.graph.program import with_outputs
from bnfold.lowering.translate import quiet, translate

#: Initializers above this many bytes are hidden from onnxsim.
SKELETON_BYTES = 1024
#: What onnxsim (0.8) computes new weights by, in their own dtype: an affine that is left has to stay.
_FOLDS = (
    "fuse_bn_into_conv", "fuse_mul_into_conv", "fuse_preceding_mul_into_conv", "fuse_matmul_into_conv",
    "fuse_reduce_sum_into_conv", "fuse_consecutive_mul",
)  # fmt: skip
#: What ONNX Runtime's layout optimisation moves past a Pad, or takes away.
_MOVABLE = {"Transpose", "Identity", "Squeeze", "Unsqueeze", "Reshape"}


@dataclass(frozen=True)
class Lowered:
    """An ONNX model in memory: ``model``, and for the program's ``sites`` that it still holds their names in it."""

    model: ir.Model
    sites: dict[str, str]

    @property
    def nodes(self) -> int:
        """Number of operators."""
        return len(self.model.graph)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return int(self.model.opset_imports[""])

    @property
    def batch_norms(self) -> int:
        """Number of BatchNormalization operators, those in subgraphs among them."""
        nodes = ir.traversal.RecursiveGraphIterator(self.model.graph)
        return sum(node.op_type == "BatchNormalization" for node in nodes)

    @property
    def weight_bytes(self) -> int:
        """Size of the initializers."""
        return sum(v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None)


def lower(
    program: ExportedProgram,
    *,
    opset: int | None = None,
    simplify: bool = True,
    dims: Mapping[str, str] | None = None,
    inputs: Mapping[str, str] | None = None,
    outputs: Iterable[str] | None = None,
    sites: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Lowered:
    """Writes ``program`` as ONNX.

    Args:
        opset: version of the default operator set; torch.onnx's default where None.
        dims: symbolic dimension -> the name it gets in the file.
        inputs: new names for inputs, by the names that they have in ``program``.
        sites: values whose names must survive into the file where the values do.
        metadata: entries for the file's ``metadata_props``.

    Raises:
        LowerError: torch.onnx cannot translate an operator, an input is to have the name of a weight, or
            onnx.checker rejects the result.
    """
    named = zip(program.graph_signature.output_specs, output_names(program), strict=True)
    # torch.onnx leaves out an output that is None.
    own = [(s, name) for s, name in named if not isinstance(s.arg, ConstantArgument) or s.arg.value is not None]
    for spec, name in own:
        if isinstance(spec.arg, ConstantArgument):
            raise LowerError(
                f"the model's output '{name}' is {spec.arg.value!r}, no tensor", hint="Leave it out of what it returns"
            )
    returned = {spec.arg.name for spec, _ in own}
    tagged = [name for name in dict.fromkeys(sites) if name not in returned]
    model = translate(with_outputs(program, tagged), opset)
    graph = model.graph
    for value, name in zip(list(graph.outputs)[len(own) :], tagged):
        value.name = f"site:{name}"
    while len(graph.outputs) > len(own):
        graph.outputs.pop()  # onnx_ir (1.1) leaves what a slice deletes marked as an output
    _strip(model)
    _tidy(model)
    if simplify:
        model = _simplify(model)
    _keep_pads(model.graph)
    _own_outputs(model.graph)
    _name_outputs(model.graph, list(outputs or [name for _, name in own]))
    _name_nodes(model.graph)
    kept = _untagged(model.graph)
    _name_dimensions(model.graph, dims or {})
    _rename_inputs(model.graph, inputs or {})
    kept |= {spec.arg.name: v.name or "" for (spec, _), v in zip(own, model.graph.outputs)}
    model.metadata_props.update(metadata or {})
    model.producer_name, model.producer_version = "bnfold", ""
    return Lowered(model, kept)


def save(lowered: Lowered, path: Path, *, external: str | None = None) -> None:
    """Writes the model to ``path``, its weights to ``external`` beside it where given, and has onnx.checker read it.

    Raises:
        LowerError: onnx.checker rejects the file.
    """
    ir.save(lowered.model, path, external_data=external, size_threshold_bytes=SKELETON_BYTES)
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise LowerError(f"onnx.checker rejects the file: {error}", hint="Please report this model") from error
    except onnx.shape_inference.InferenceError as error:
        raise _rejected(str(error)) from error


def _rejected(text: str) -> LowerError:
    """What onnx's shape inference says of a file, and the module that it says it of: nodes are named after theirs."""
    found = re.search(r"op_type: ?(\w+), node name: ?([^)]*)\): (.*)", text, re.S)
    if found is None:
        return LowerError(f"onnx's shape inference rejects the file: {text}", hint="Please report this model")
    operator, node, reason = found.groups()
    module = node.rpartition("/")[0]
    return LowerError(
        f"onnx's shape inference rejects the {operator} that it is written as: {reason.rpartition('] ')[2]}",
        where=f"module '{module}'" if module else f"node '{node}'",
        hint="Its sizes may hold for the example alone: fix them with --static or numbers in --input, else please "
        "report this model",
    )


def relocate(path: Path, data: str, digest: str) -> None:
    """Points the external weights of a staged file to their final name and notes their SHA-256 in the metadata."""
    model = onnx.load_model(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data
    model.metadata_props.add(key="bnfold.data_sha256", value=digest)
    path.write_bytes(model.SerializeToString())


def _strip(model: ir.Model) -> None:
    """Takes out stack traces and paths; keeps the module that each node came from."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.metadata_props.clear()
        node.doc_string = None
        module = scopes[-2] if len(scopes) > 1 else ""
        if module and not module.startswith("_empty_nn_module_stack"):
            node.metadata_props["module"] = module.split("@")[0]
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


def _tidy(model: ir.Model) -> None:
    from onnxscript.optimizer import fold_constants

    with quiet():
        # It stops at an operator that it has a fault with; what it has done until then stands, onnxsim does the rest.
        with contextlib.suppress(RuntimeError):
            fold_constants(model)
        passes.IdentityEliminationPass()(model)
        for graph in model.graph.subgraphs():
            _own_outputs(graph)  # onnx_ir (1.1) has a body return a value from around it, which ONNX does not allow
        for run in (
            passes.CommonSubexpressionEliminationPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.RemoveUnusedNodesPass(),
            passes.NameFixPass(),
        ):
            run(model)


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """A file of others, simplified by onnxsim, which sees no large weights.

    Raises:
        LowerError: onnxsim fails.
    """
    proto: onnx.ModelProto = ir.to_proto(_simplify(ir.from_proto(model)))
    return proto


def _simplify(model: ir.Model) -> ir.Model:
    """onnxsim on the skeleton; its verdict about large weights is impossible, since it does not have them."""
    import onnxsim

    modules = {v.name: n.metadata_props.get("module") for n in model.graph for v in n.outputs}
    hidden: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > SKELETON_BYTES and not _is_zero_bias(tensor):
            hidden[name] = tensor
            value.shape, value.dtype = ir.Shape(tensor.shape), tensor.dtype
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
    skeleton = ir.to_proto(model)
    try:
        with quiet():
            small, _ = onnxsim.simplify(skeleton, skipped_optimizers=list(_FOLDS))
    except Exception as error:
        raise LowerError(
            f"onnxsim failed: {type(error).__name__}: {str(error).splitlines()[0]}", hint="Try --no-simplify"
        ) from error
    simplified = ir.from_proto(small)
    simplified.metadata_props.clear()
    for value in list(simplified.graph.inputs):
        if value.name in hidden:
            simplified.graph.inputs.remove(value)
            if value.uses():
                value.const_value = hidden[value.name]
                simplified.graph.register_initializer(value)
    for node in simplified.graph:
        module = next((m for v in node.outputs if (m := modules.get(v.name))), None)
        if module:
            node.metadata_props["module"] = module
    return simplified


def _is_zero_bias(tensor: ir.TensorProtocol) -> bool:
    """Whether adding a tensor changes nothing, which onnxsim can only know of what it sees."""
    return len(tensor.shape) == 1 and not tensor.numpy().any()


def _keep_pads(graph: ir.Graph) -> None:
    """Pads with -0.0 in front of a maximum.

    ONNX Runtime (1.31) lets a MaxPool do what a Pad before it does, and pads with -inf where that one padded with zeros
    (its ``Pad_Fusion``); it takes no -0.0 for a zero. Transpositions in between it moves out of the way first.
    """
    for node in graph:
        data = node.inputs[0] if node.op_type == "MaxPool" else None
        while data is not None and data.producer() is not None and data.producer().op_type in _MOVABLE:
            data = data.producer().inputs[0]
        pad = data.producer() if data is not None else None
        if pad is None or pad.op_type != "Pad" or data is None or data.dtype is None:
            continue
        if pad.attributes.get_string("mode", "constant") != "constant":
            continue
        value = pad.inputs[2] if len(pad.inputs) > 2 else None
        if value is None or (value.const_value is not None and not value.const_value.numpy().any()):
            zero = ir.tensor(np.array(-0.0, data.dtype.numpy()), name=f"{data.name}_zero")
            constant = ir.Value(name=zero.name, shape=ir.Shape(()), type=ir.TensorType(zero.dtype), const_value=zero)
            graph.register_initializer(constant)
            pad.resize_inputs(max(len(pad.inputs), 3))
            pad.replace_input_with(2, constant)
            if value is not None and not value.uses():
                graph.initializers.pop(value.name or "", None)


def _own_outputs(graph: ir.Graph) -> None:
    """Gives every output a node of its own: an input, a constant or another output keeps its name."""
    seen = set[ir.Value]()
    for i, value in enumerate(list(graph.outputs)):
        maker = value.producer()
        if maker is None or maker.graph is not graph or value in seen:
            node = ir.node("Identity", [value])
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
            graph.outputs[i].shape, graph.outputs[i].type = value.shape, value.type
        seen.add(value)


def _name_outputs(graph: ir.Graph, names: list[str]) -> None:
    """Names outputs after the model's structure; what is called so inside of the graph makes way."""
    own = set(graph.outputs)
    for value in (v for node in graph for v in node.outputs if v not in own and v.name in names):
        value.name = f"{value.name}_value"
    for value, name in zip(graph.outputs, names):
        value.name = f"{name}_out" if name in graph.initializers else name


def _name_nodes(graph: ir.Graph) -> None:
    """Names nodes after their modules, with a number where a module has several of a kind."""
    counts = Counter[str]()
    for node in graph:
        base = "/".join(filter(None, (node.metadata_props.get("module"), node.op_type)))
        node.name = f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1


def _untagged(graph: ir.Graph) -> dict[str, str]:
    """Gives the tagged values that are still there names without the tag, and returns these."""
    made = [value for node in graph for value in node.outputs]
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *made)}
    found: dict[str, str] = {}
    for value in made:
        if value.name and value.name.startswith("site:"):
            site = value.name.removeprefix("site:")
            # An operator's decomposition may have taken the name for a value of its own.
            found[site] = value.name = next(n for n in (site, f"{site}_value", f"{site}:0") if n not in taken)
            taken.add(value.name)
    return found


def _name_dimensions(graph: ir.Graph, dims: Mapping[str, str]) -> None:
    """Names dynamic sizes as the user knows them."""
    pattern = re.compile("|".join(rf"\b{re.escape(s)}\b" for s in sorted(dims, key=len, reverse=True)) or r"$^")

    def named(size: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim:
        if isinstance(size, int) or size.value is None:
            return size
        text = pattern.sub(lambda found: dims[found.group()], str(size.value))
        # A size that the model's code fixed may come as the name "3": that would claim a dynamic dimension.
        return int(text) if text.isdecimal() else text

    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([named(size) for size in value.shape])


def _rename_inputs(graph: ir.Graph, names: Mapping[str, str]) -> None:
    taken = {value.name for value in (*graph.outputs, *graph.initializers.values())}
    if clash := next((new for old, new in names.items() if new in taken), None):
        hint = "Choose another name"
        raise LowerError(f"a weight or an output is called '{clash}'", where="--input-names", hint=hint)
    for value in (value for node in graph for value in node.outputs if value.name in names.values()):
        value.name = f"{value.name}_value"
    for value in graph.inputs:
        value.name = names.get(value.name or "", value.name)
