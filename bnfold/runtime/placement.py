"""Where the nodes of a file really ran: read off the profile of a session of its own.

A session runs on the CPU whatever its provider does not implement, and says so nowhere but in its log and its profile.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold.report import Placement
from bnfold.runtime.runtime import Array, Device, open_session


def placement(
    model: str | os.PathLike[str] | bytes, feeds: Mapping[str, Array], *, device: Device | str = "cpu",
    optimized: bool = True, beside: Path | None = None,
) -> Placement:  # fmt: skip
    """Runs the model once on ``feeds`` with ONNX Runtime's profiler on, and counts its nodes by provider.

    All else, and the BnfoldError where the model cannot be opened or run, as for ``runtime.open_session``.
    """
    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        session = open_session(
            model, device=device, optimized=optimized, profile=Path(folder) / "profile", beside=beside
        )
        try:
            session.run(feeds)
            assigned = session.assigned()
        finally:
            path = session.end_profiling()
        events = json.loads(path.read_text(encoding="utf-8"))
    return read_profile(events, session.provider, assigned)


def read_profile(
    events: list[dict[str, Any]], wanted: str, assigned: Mapping[str, Sequence[tuple[str, str]]] | None = None
) -> Placement:
    """The placement that a profile's ``events`` tell of, in a session of the provider ``wanted``.

    Nodes that were compiled into one are one event: how many they are is read off those ``assigned`` to the provider.
    """
    ran: dict[tuple[str, str, str], None] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in args:
            name = str(event.get("name", "")).removesuffix("_kernel_time")
            ran[str(args["provider"]), name, str(args.get("op_name", ""))] = None
    counts = Counter(provider for provider, _, _ in ran)
    for provider in counts:
        counts[provider] = max(counts[provider], len((assigned or {}).get(provider, ())))
    elsewhere = tuple(f"{name} ({operator})" for provider, name, operator in ran if provider != wanted)
    return Placement(dict(counts.most_common()), elsewhere)


def placement_finding(found: Placement, wanted: str) -> tuple[str | None, str | None]:
    """What speaks against a verdict for the provider ``wanted`` that was reached so, and what only informs."""
    total = sum(found.nodes.values())
    if total and not found.nodes.get(wanted):
        return f"none of the {total} nodes ran on {wanted}: all ran on {' and '.join(found.nodes)}", None
    if found.elsewhere:
        shown = ", ".join(found.elsewhere[:5]) + (", ..." if len(found.elsewhere) > 5 else "")
        where = " and ".join(provider for provider in found.nodes if provider != wanted)
        return None, f"{len(found.elsewhere)} of {total} nodes of the file ran on {where}: {shown}"
    return None, None
