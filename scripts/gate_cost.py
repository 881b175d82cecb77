"""What the gate costs: in forward passes of one sample, and in memory against torch.onnx.export.

    python scripts/gate_cost.py --results cost.jsonl                      # 15 nets, each in processes of its own
    python scripts/gate_cost.py --results cost.jsonl --nets resnet50
    python scripts/gate_cost.py --results cost.jsonl --no-run --write docs/gate-measured.md

Nets have random weights and the published shapes. *Passes* is the processor time of ``check`` on an exported file, less
what capturing the model takes, over that of one forward pass of the module on one sample, median of five, all on one
thread. *Whole process* is the processor time of a Python that exports, with the check, over that of one that calls
``torch.onnx.export(dynamo=True)``; *memory* the ratio of their largest resident sets.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured_page import stored, write
from torch import Tensor, nn

Row = dict[str, Any]


def convmixer() -> nn.Module:
    """ConvMixer-768/32, patches of 7, kernels of 7."""

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def unit(conv: nn.Module) -> nn.Sequential:
        return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(768))

    blocks = [
        nn.Sequential(
            Residual(*unit(nn.Conv2d(768, 768, 7, groups=768, padding="same"))), *unit(nn.Conv2d(768, 768, 1))
        )
        for _ in range(32)
    ]
    return nn.Sequential(
        *unit(nn.Conv2d(3, 768, 7, 7)), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, 1000)
    )


class Logits(nn.Module):
    """A classifier of transformers as a function of pixels alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixel_values=pixels).logits


def hub(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A net of transformers by the name of its classes."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**options, num_labels=1000)
        return Logits(getattr(transformers, f"{name}ForImageClassification")(config))

    return build


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": hub("ResNet", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
    "resnet50": hub("ResNet"),
    "regnetx_002": hub(
        "RegNet",
        layer_type="x",
        depths=[1, 1, 4, 7],
        hidden_sizes=[24, 56, 152, 368],
        groups_width=8,
        embedding_size=32,
    ),
    "levit_128s": hub(
        "Levit", hidden_sizes=[128, 256, 384], num_attention_heads=[4, 6, 8], depths=[2, 3, 4], key_dim=[16, 16, 16]
    ),
    "convmixer_768_32": convmixer,
    "mobilenet_v2": hub("MobileNetV2"),
    "mobilenet_v1": hub("MobileNetV1"),
    "efficientnet_b0": hub(
        "EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280
    ),
    "regnety_016": hub(
        "RegNet",
        layer_type="y",
        depths=[2, 6, 17, 2],
        hidden_sizes=[48, 120, 336, 888],
        groups_width=24,
        embedding_size=32,
    ),
    "convnext_tiny": hub("ConvNext"),
    "poolformer_s12": hub("PoolFormer"),
    "mobilevit_s": hub("MobileViT"),
    "swiftformer_xs": hub("SwiftFormer"),
    "vit_small": hub("ViT", hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "segformer_b0": hub("Segformer"),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = NETS[name]()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(child.running_var, 0.5, 2.0)
            nn.init.normal_(child.running_mean, 0.0, 0.3)
    size = 256 if name.startswith("mobilevit") else 224
    return module.eval(), torch.randn(1, 3, size, size)


def one(name: str, what: str, folder: Path) -> Row:
    """One measurement, in this process: its processor time, its largest resident set, and for ``check`` the passes."""
    import bnfold

    module, x = build(name)
    path, found = folder / f"{name}.onnx", {}
    if what == "onnx":
        with torch.no_grad():
            batch = {0: torch.export.Dim.DYNAMIC}
            torch.onnx.export(module, (torch.cat([x, x]),), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    elif what == "export":
        report = bnfold.export(module, path, (x,), keep_failed=True)
        found = {"verdict": report.check.verdict, "problem": (report.check.problems or ("",))[0]}
    else:
        bnfold.export(module, path, (x,), check=False)
        with torch.no_grad():
            module(x)
            times = [_timed(lambda: module(x)) for _ in range(5)]
        from bnfold.graph.capture import capture

        captured = _timed(lambda: capture(module, (x,)))
        judged = _timed(lambda: found.update(verdict=bnfold.check(path, module, (x,)).verdict))
        found |= {"pass": statistics.median(times), "passes": (judged - captured) / statistics.median(times)}
    return {**found, "cpu": time.process_time(), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def table(rows: list[Row]) -> str:
    """A line per net, and the medians."""
    lines = [
        "| net | a pass, ms | passes | whole process | memory | verdict |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    by = {(r["net"], r["what"]): r for r in rows}
    passes = []
    for net in NETS:
        check, export, onnx = (by.get((net, what), {}) for what in ("check", "export", "onnx"))
        if not check:
            continue
        passes.append(check["passes"])
        ratio = [f"{export[k] / onnx[k]:.2f}" if export and onnx else "" for k in ("cpu", "peak")]
        lines.append(
            f"| {net} | {1000 * check['pass']:.0f} | {check['passes']:.0f} | {' | '.join(ratio)} | {check['verdict']} |"
        )
    if passes:
        lines += [
            "",
            f"Median {statistics.median(passes):.0f} passes, largest {max(passes):.0f}, of {len(passes)} nets.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    parser.add_argument("--what", nargs="*", default=["check", "export", "onnx"])
    parser.add_argument("--one", nargs=2, metavar=("NET", "WHAT"), help="measure here and print")
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--write", type=Path, help="a page that has a place for the table")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(one(*options.one, Path(folder))))
        return
    rows = stored(options.results)
    done = {(r["net"], r["what"]) for r in rows}
    with options.results.open("a") as out:
        for net in [] if options.no_run else options.nets:
            for what in options.what:
                if (net, what) in done:
                    continue
                command = [sys.executable, "-W", "ignore", __file__, "--one", net, what]
                ran = subprocess.run(command, capture_output=True, text=True)
                if ran.returncode:
                    print(f"{net} {what}: {ran.stderr[-800:]}", file=sys.stderr)
                    continue
                row = {"net": net, "what": what, **json.loads(ran.stdout.splitlines()[-1])}
                rows.append(row)
                print(json.dumps(row), file=out, flush=True)
    text = table(rows)
    print(text)
    if options.write:
        write(options.write, "cost", f"{len({row['net'] for row in rows})} of {len(NETS)} nets.\n\n{text}")


if __name__ == "__main__":
    main()
