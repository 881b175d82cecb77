"""Plots as SVG that belongs to the page it stands in: its text is text, and its colours are the page's.

A row per layer, so that any number of layers fits a phone's width; each is drawn twice, for a phone and for a screen or
paper, and the page shows the one that fits. matplotlib draws with stand-in colours, which are replaced by the page's
variables: dark and light need no second picture.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from bnfold.errors import ProviderError, printable
from bnfold.render.words import site_verdict
from bnfold.report import CheckReport, LatencyReport, LayerRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: Draws on axes, with about so many ticks along x.
_Draw = Callable[["Axes", int], None]
#: A BatchNorm's name, and minimum, quartiles and maximum of its scale and of its shift.
NormRow = tuple[str, Sequence[float], Sequence[float]]
#: Rows of a plot; of more layers those that stand out are drawn.
ROWS = 80
#: Points of a row's height; by name, points of a picture's width and the letters of a label.
_ROW = 14
_WIDTHS = {"narrow": (300, 20), "wide": (690, 48)}
#: Colours that libraries draw with, and those of the page that take their place.
STAND_INS = {
    "#000001": "currentColor", "#000002": "var(--muted)", "#000003": "var(--line)", "#000004": "var(--fail)",
    "#000005": "var(--before)", "#000006": "var(--after)", "#000007": "var(--third)",
}  # fmt: skip
_INK, _MUTED, _LINE, _FAIL, _BEFORE, _AFTER, _THIRD = STAND_INS
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bnfold", "svg.fonttype": "none", "font.size": 8, "font.family": "DejaVu Sans",
    "text.color": _INK, "axes.edgecolor": _LINE, "axes.labelcolor": _INK, "xtick.color": _MUTED,
    "ytick.color": _INK, "xtick.labelcolor": _MUTED, "grid.color": _LINE, "grid.linewidth": 0.6,
    "axes.unicode_minus": False, "legend.frameon": False,
}  # fmt: skip


def require_matplotlib() -> None:
    """Raises ProviderError where matplotlib is missing."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None or find_spec("jinja2") is None:
        what = "an HTML report needs matplotlib, which is not installed"
        raise ProviderError(what, hint="pip install 'bnfold[report]'")


def site_plot(check: CheckReport) -> str:
    """Error over noise at every fold site, a mark per candidate; those with the largest ratios where they are many."""
    worst: dict[str, float] = {}
    for site in check.sites:
        worst[site.value] = max(worst.get(site.value, 0.0), _sized(max(site.ratio, site.channel_ratio)))
    rows = _standing_out(list(worst), [worst[value] for value in worst])
    names = {site.value: site.module for site in check.sites}
    wrong = {site.value for site in check.sites if site_verdict(site, check) == "fail"}
    marks = dict(zip(dict.fromkeys(site.candidate for site in check.sites), ("o", "s", "D", "^")))
    finite = [ratio for ratio in worst.values() if ratio < math.inf]
    low, high = 0.05, 2 * max([*finite, check.site_limit])

    def draw(axes: Axes, ticks: int) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.axvline(1, color=_MUTED, linewidth=1)
        axes.axvline(check.site_limit, color=_FAIL, linewidth=1, linestyle=(0, (4, 2)))
        for (candidate, mark), colour in zip(marks.items(), (_AFTER, _BEFORE, _THIRD, _MUTED)):
            found = {s.value: _sized(max(s.ratio, s.channel_ratio)) for s in check.sites if s.candidate == candidate}
            points = [(min(max(found[v], low), high), i) for i, v in enumerate(rows) if v in found]
            size, face = (4.5, colour) if mark == "o" else (5.5, "none")
            _marks(axes, points, mark, size, colour, label=candidate, markerfacecolor=face, clip_on=False)
            for x, i in points:
                if x >= high:
                    axes.annotate("infinite", (x, i), (-5, 0), textcoords="offset points", ha="right", va="center")
        _decades(axes.xaxis, ticks)
        axes.set_xlabel(f"error over noise (dashed: the limit, {check.site_limit:g})", loc="right")

    return _svg(
        "sites", "Error at every fold site in multiples of the noise", draw,
        [names[value] or value for value in rows], bad=[v in wrong for v in rows], legend=True,
    )  # fmt: skip


def histogram_plot(check: CheckReport) -> str:
    """How many elements of the outputs are off by how many times their noise; empty where nothing was counted."""
    counts: dict[str, list[int]] = {}
    for each in check.outputs:
        if each.doublings:
            known = counts.get(each.candidate, [])
            counts[each.candidate] = [*map(sum, zip_longest(known, each.doublings, fillvalue=0))]
    if not counts:
        return ""
    highest, most = max(2.0 ** max(map(len, counts.values())), 2 * check.site_limit), max(map(max, counts.values()))

    def draw(axes: Axes, ticks: int) -> None:
        axes.set_xscale("log")
        axes.set_xlim(0.4, highest)
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * most)
        for i, ((name, count), colour) in enumerate(zip(counts.items(), (_AFTER, _BEFORE, _THIRD, _MUTED))):
            edges = [2 ** (k - 0.95 + 0.9 * (i + end) / len(counts)) for k in range(len(count)) for end in (0, 1)]
            widths = [right - left for left, right in zip(edges[::2], edges[1::2])]
            axes.bar(edges[::2], count, widths, align="edge", color=colour, label=name)
        axes.axvline(check.site_limit, color=_FAIL, linewidth=1, linestyle=(0, (4, 2)))
        _decades(axes.xaxis, ticks)
        _decades(axes.yaxis, 4)
        axes.grid(axis="y")
        axes.set_xlabel(f"error over noise of one element (dashed: the limit, {check.site_limit:g})", loc="right")

    return _svg("histogram", "How many elements are off by how many times their noise", draw, None, legend=True)


def latency_plot(report: LatencyReport) -> str:
    """Time per call of each: the median as a bar, the interval of the ratio as a line, 95 % below as a tick."""
    first = report.contestants[0].median

    def draw(axes: Axes, ticks: int) -> None:
        for i, each in enumerate(report.contestants):
            middle, low, high = (1e3 * first * ratio for ratio in (each.ratio, *each.interval))
            axes.barh(i, 1e3 * each.median, 0.6, color=_AFTER if i == 0 else _BEFORE)
            if high > low:
                axes.errorbar(middle, i, xerr=[[middle - low], [high - middle]], color=_INK, capsize=3, linewidth=1.2)
            _marks(axes, [(1e3 * each.p95, i)], "|", 9, _MUTED)
            end = 1e3 * max(each.median, each.p95, first * each.interval[1])
            axes.annotate(f"{1e3 * each.median:.3g} ms", (end, i), (5, 0), textcoords="offset points", va="center")
        # Room for the words behind the longest.
        axes.set_xlim(0, (1.5 if ticks < 10 else 1.2) * axes.get_xlim()[1])
        axes.locator_params(axis="x", nbins=ticks)
        axes.set_xlabel("milliseconds per call", loc="right")

    return _svg(
        "latency-plot", "Time per call", draw, [each.name for each in report.contestants], height=1.6, between="/"
    )


def weight_plot(layers: Sequence[LayerRange]) -> str:
    """Largest weight per channel, from the smallest channel's to the largest's, before and after folding."""
    spreads = [max(layer.after.spread, layer.after.input_spread) for layer in layers]
    rows = [layers[i] for i in _standing_out(range(len(layers)), spreads)]

    def draw(axes: Axes, ticks: int) -> None:
        axes.set_xscale("log")
        for weights, colour, shift, mark, label in (
            ([row.before for row in rows], _BEFORE, -0.17, "|", "before folding"),
            ([row.after for row in rows], _AFTER, 0.17, "o", "after folding"),
        ):
            known = [(i + shift, w) for i, w in enumerate(weights) if w is not None and w.median]
            axes.hlines([i for i, _ in known], [w.smallest for _, w in known], [w.largest for _, w in known],
                        color=colour, linewidth=1.6)  # fmt: skip
            _marks(axes, [(w.median, i) for i, w in known], mark, 4.5, colour, label=label)
        axes.margins(x=0.06)
        _decades(axes.xaxis, ticks)
        axes.set_xlabel("largest |weight| per channel: smallest, median, largest", loc="right")

    return _svg(
        "weights", "Weight ranges of every layer before and after folding", draw,
        [row.module or row.value for row in rows], bad=[row.spoiled for row in rows], legend=True, height=1.25,
    )  # fmt: skip


def norm_plot(norms: Sequence[NormRow]) -> str:
    """Scale and shift of every BatchNorm over its channels: all of them, the middle half, and the median."""
    rows = [norms[i] for i in _standing_out(range(len(norms)), [max(map(abs, (*s, *t))) for _, s, t in norms])]

    def panel(part: str, summaries: Sequence[Sequence[float]]) -> _Draw:
        def draw(axes: Axes, ticks: int) -> None:
            low, lower, middle, upper, high = zip(*summaries)
            axes.axvline(0, color=_MUTED, linewidth=1)
            axes.hlines(range(len(rows)), low, high, color=_BEFORE, linewidth=1)
            axes.hlines(range(len(rows)), lower, upper, color=_AFTER, linewidth=4)
            _marks(axes, [*zip(middle, range(len(rows)))], "|", 7, _INK)
            if (reach := max(map(abs, (*low, *high)))) > 20:
                axes.set_xscale("symlog", linthresh=1)
                top = math.floor(math.log10(reach))
                powers = [10.0**power for power in range(top, -1, -max(1, math.ceil(4 * top / ticks)))]
                places = [-power for power in powers] + [0.0] + powers[::-1]
                shown = [place for place in places if min(low) <= place <= max(high) or place == 0]
                axes.set_xticks(shown, [f"{place:g}" for place in shown], minor=False)
                axes.set_xticks([], minor=True)
            else:
                axes.locator_params(axis="x", nbins=max(3, ticks // 2))
            axes.set_xlabel(part)

        return draw

    return _svg(
        "norms", "Scale and shift of every BatchNorm", panel("scale", [scale for _, scale, _ in rows]),
        [name for name, _, _ in rows], second=panel("shift", [shift for _, _, shift in rows]),
    )  # fmt: skip


# -- parts -------------------------------------------------------------------------------------------------------------


def _svg(
    name: str,
    title: str,
    draw: _Draw,
    names: Sequence[str] | None,
    *,
    bad: Sequence[bool] = (),
    second: _Draw | None = None,
    legend: bool = False,
    height: float = 1.0,
    between: str = ".",
) -> str:
    """A picture for either width: a row per name, the first on top; the same x axis above and below.

    Args:
        draw: draws on axes, with about so many ticks.
        names: of the rows; None where there are none, and y is a number.
        bad: rows with a cross before their name: colour is not all that tells.
        second: draws a second panel on the same rows.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = []
    for kind, (width, letters) in _WIDTHS.items():
        labels = _short([printable(name) for name in names or []], letters, between)
        labels = [f"✗ {label}" if wrong else label for label, wrong in zip(labels, bad or [False] * len(labels))]
        top, bottom, left, right = 38 if legend else 20, 34, 12 + 5.3 * max(map(len, labels), default=4), 14
        tall = (max(len(labels), 1) * _ROW * height if names is not None else 110) + top + bottom
        with rc_context(_STYLE):
            figure = Figure(figsize=(width / 72, tall / 72))
            panels = figure.subplots(1, 1 if second is None else 2, squeeze=False, sharey=True)[0]
            figure.subplots_adjust(left / width, bottom / tall, 1 - right / width, 1 - top / tall, wspace=0.14)
            for axes, drawing in zip(panels, (draw, second)):
                assert drawing is not None
                if names is not None:
                    axes.set_ylim(len(labels) - 0.4, -0.6)
                axes.grid(axis="x")
                axes.set_axisbelow(True)
                drawing(axes, 6 if kind == "narrow" else 14)
                axes.tick_params(
                    axis="x", top=names is not None, labeltop=names is not None, length=2, labelsize=8, pad=2
                )
                axes.tick_params(axis="x", which="minor", length=0)
                axes.tick_params(axis="y", length=0)
                axes.spines[:].set_visible(False)
                axes.xaxis.label.set_fontsize(8)
            if names is not None:
                panels[0].set_yticks(range(len(labels)), list(labels), fontsize=8.5)
            if legend:
                figure.legend(loc="upper left", bbox_to_anchor=(0, 1), ncols=2 if kind == "narrow" else 3,
                              fontsize=7.5, handletextpad=0.2, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
            written = io.StringIO()
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn.append(f'<div class="{kind}">{at_home(written.getvalue(), f"{name}-{kind}", title)}</div>')
    return "".join(drawn)


def at_home(svg: str, name: str, title: str, *, natural: bool = False) -> str:
    """An SVG file as an element of a page: ids of its own, the page's colours, a title for those who do not see it.

    ``natural``: as wide as it is drawn, and not as the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in STAND_INS.items():
        svg = svg.replace(stand_in, colour)
    head, rest = svg.split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    box += f' width="{float(box.split()[2]):.0f}"' if natural else ""
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-labelledby="{name}-title"'
    return f'{opening}><title id="{name}-title">{escape(title)}</title>{rest}'


def _marks(axes: Axes, places: Sequence[tuple[float, float]], mark: str, size: float, colour: str, **more: Any) -> None:
    x, y = [x for x, _ in places], [y for _, y in places]
    axes.plot(x, y, linestyle="", marker=mark, markersize=size, color=colour, **more)


def _decades(axis: Axis, ticks: int) -> None:
    """Plain numbers along a logarithmic axis, more of them where it covers little, none that touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = ((1.0, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0))
    subs = next((each for each in steps if len(each) * math.log10(high / low) < ticks), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=ticks + 2))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0e}" if value > 9999 else f"{value:g}"))


def _standing_out(items: Sequence[Any], sizes: Sequence[float]) -> list[Any]:
    """Of more items than there are rows those of the largest size, in the order of the model."""
    kept = sorted(sorted(range(len(items)), key=lambda i: -sizes[i])[:ROWS])
    return [items[i] for i in kept]


def _sized(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio


def _short(names: Sequence[str], letters: int, between: str = ".") -> list[str]:
    """Names that fit beside a plot: without what all begin with and most end with, their first parts as initials.

    Two names are never one: where so many letters do not tell them apart there are more, and what has the very same
    name, such as a layer that is called twice, gets a number.
    """
    parts = [name.split(between) for name in names]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    last, often = Counter(p[-1] for p in parts).most_common(1)[0] if parts else ("", 0)
    without = [p[:-1] if p[-1] == last and len(p) > 1 else p for p in parts]
    if often > len(parts) / 2 and len(set(map(tuple, without))) == len(set(map(tuple, parts))):
        parts = without
    longest = max((len(between.join(p)) for p in parts), default=0)
    different = len(set(map(tuple, parts)))
    for length in range(letters, max(letters, longest) + 1):
        found = [_fitting(p, length, between) for p in parts]
        if len(set(found)) == different:
            break
    seen: Counter[str] = Counter()
    for i, label in enumerate(found if parts else []):
        seen[label] += 1
        found[i] = f"{label} #{seen[label]}" if seen[label] > 1 else label
    return found if parts else []


def _fitting(parts: list[str], letters: int, between: str) -> str:
    for i in range(max(len(parts), 1)):
        found = between.join([*map(_initial, parts[:i]), *parts[i:]])
        if len(found) <= letters:
            return found
    return f"{found[: letters // 2 - 1]}…{found[-letters // 2 :]}"


def _initial(part: str) -> str:
    """``layer12`` -> ``l12``."""
    return part[:1] + part[len(part.rstrip("0123456789")) :] if not part.isdigit() else part
