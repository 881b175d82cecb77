"""Does once, before processes are forked, what every command would do in its first seconds."""

from __future__ import annotations

import logging
import runpy
import warnings


def warm() -> None:
    """Imports what an export imports, and lowers a tiny net: torch and onnxscript fill their tables on first use."""
    import matplotlib.backends.backend_svg
    import matplotlib.font_manager  # noqa: F401
    import torch
    from torch import nn

    from bnfold import pipeline
    from bnfold.graph.threads import torch_threads
    from bnfold.lowering.lower import lower
    from bnfold.render import html, junit  # noqa: F401

    runpy.run_module("bnfold")  # what obeys a command, which it does under the name of __main__ alone

    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)).eval()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    # Threads do not survive a fork: no operator may have started any.
    with warnings.catch_warnings(), torch_threads(1):
        warnings.simplefilter("ignore")
        folded = pipeline.fold(net, (torch.zeros(2, 1, 4, 4),))
        lower(folded.program, opset=None, simplify=True, dims=folded.captured.dims, sites=[], metadata={})
    logging.disable(before)
