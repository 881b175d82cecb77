"""What ``bench`` prints."""

from __future__ import annotations

from bnfold.render.page import Page
from bnfold.render.words import size
from bnfold.report import Latency, LatencyReport


def latency_report(report: LatencyReport, page: Page) -> None:
    """A line per contestant, and under what conditions."""
    inputs = ", ".join(f"{name}:{written}" for name, written in report.inputs.items())
    threads = "as many threads as each chooses" if report.threads is None else f"threads: {report.threads}"
    page.line("Measured", inputs or "no inputs", threads, f"{report.rounds} rounds after {report.warmup} calls each")
    known = dict(report.machine)
    words = [known.pop("processor", ""), f"{known.pop('cores', '?')} cores", known.pop("system", "")]
    known.pop("date", None)
    page.line("", ", ".join([*words, *(f"{name} {version}" for name, version in known.items())]))
    rows = [_row(latency, first=i == 0) for i, latency in enumerate(report.contestants)]
    page.table(("latency", "median", "p95", "ratio (95 % interval)", "speed", "load", "memory", "on"), rows)
    for note in report.notes:
        page.line("", f"note: {note}")


def _row(latency: Latency, *, first: bool) -> tuple[str, ...]:
    low, high = latency.interval
    known = f"{latency.ratio:.3f} " if latency.told_apart else "not told apart "
    ratio = f"{known}({low:.3f} to {high:.3f})"
    return (
        latency.name, seconds(latency.median), seconds(latency.p95),
        "1" if first else ratio, f"{latency.speedup:.2f}x" if latency.told_apart and not first else "",
        "" if latency.load is None else seconds(latency.load), "" if latency.memory is None else size(latency.memory),
        latency.provider,
    )  # fmt: skip


def seconds(value: float) -> str:
    """A time in the unit that suits it, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:.0f} {unit}"
    return f"{value * 1e6:.3g} µs"
