"""What there is to know of every BatchNormalization of an ONNX file, in the form that those of a model have."""

from __future__ import annotations

from bnfold.graph.onnx_call import OnnxCall
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.onnx_ops.scaling import trains
from bnfold.report import Finding, NormHealth
from bnfold.statistics.findings import layer_findings, model_findings
from bnfold.statistics.layers import Layer, summed

_NAMES = ("weight", "bias", "running_mean", "running_var")


def file_layers(graph: OnnxGraph) -> list[Layer]:
    """The BatchNormalizations, in the file's order; of one that uses batch statistics gamma and beta alone."""
    found = []
    for value in graph.values():
        call = OnnxCall(graph, value)
        if call.operator != "BatchNormalization" or call.item not in (None, 0):
            continue
        slots = dict(zip(_NAMES, list(call.arguments)[1:5]))
        if trains(call):
            slots = {name: slot for name, slot in slots.items() if not name.startswith("running")}
        constants = {name: call.constant(slot) for name, slot in slots.items() if call.is_constant(slot)}
        stored = {n: c.flatten().to(graph.dtype(call[slots[n]])) for n, c in constants.items() if c is not None}
        health = NormHealth(
            module=graph.module(value), layer="BatchNormalization", kind="batch_norm", functional=False,
            channels=next((tensor.numel() for tensor in stored.values()), None),
            eps=float(call.attribute("epsilon", 1e-5)), momentum=1.0 - float(call.attribute("momentum", 0.9)),
            affine=True, track_running_stats="running_mean" in stored, training=trains(call), batches_tracked=None,
            calls=1, dtype=next((str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()), ""),
        )  # fmt: skip
        if len({constant.numel() for constant in stored.values()}) == 1:
            found.append(summed(Layer(health, stored)))
    return found


def findings_of(layers: list[Layer]) -> list[Finding]:
    """What is wrong with them."""
    return [finding for layer in layers for finding in layer_findings(layer)] + model_findings(layers)
