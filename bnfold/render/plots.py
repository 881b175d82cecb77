"""Plots as SVG that belongs to the page it stands in: its text is text, and its colours are the page's.

A row per layer, so that any number of layers fits a phone's width. matplotlib draws with stand-in colours, which are
replaced by the page's variables: dark and light need no second picture.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from bnfold.errors import ProviderError
from bnfold.report import CheckReport, LayerRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: A BatchNorm's name, and minimum, quartiles and maximum of its scale and of its shift.
NormRow = tuple[str, Sequence[float], Sequence[float]]
#: Rows of a plot; of more layers those that stand out are drawn.
ROWS = 80
#: Units of the picture: its width, the height of a row, and the letters of a label.
_WIDTH, _ROW, _LABEL = 300, 14, 20
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
        raise ProviderError(
            "an HTML report needs matplotlib, which is not installed", hint="pip install 'bnfold[report]'"
        )


def site_plot(check: CheckReport) -> str:
    """Error over noise at every fold site, a mark per candidate; those with the largest ratios where they are many."""
    worst: dict[str, float] = {}
    for site in check.sites:
        worst[site.value] = max(worst.get(site.value, 0.0), _sized(max(site.ratio, site.channel_ratio)))
    rows = _standing_out(list(worst), [worst[value] for value in worst])
    names = {site.value: site.module for site in check.sites}
    marks = dict(zip(dict.fromkeys(site.candidate for site in check.sites), ("o", "s", "D", "^")))
    finite = [ratio for ratio in worst.values() if ratio < math.inf]
    low, high = 0.05, 2 * max([*finite, check.site_limit])

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.axvline(1, color=_MUTED, linewidth=1)
        axes.axvline(check.site_limit, color=_FAIL, linewidth=1, linestyle=(0, (4, 2)))
        for (candidate, mark), colour in zip(marks.items(), (_AFTER, _BEFORE, _THIRD, _MUTED)):
            found = {s.value: _sized(max(s.ratio, s.channel_ratio)) for s in check.sites if s.candidate == candidate}
            points = [(min(max(found[v], low), high), i) for i, v in enumerate(rows) if v in found]
            filled = mark == "o"
            axes.plot(
                *zip(*points), linestyle="", marker=mark, markersize=4.5 if filled else 5.5, label=candidate,
                color=colour, markerfacecolor=colour if filled else "none", clip_on=False,
            )  # fmt: skip
            for x, i in points:
                if x >= high:
                    axes.annotate("infinite", (x, i), (-5, 0), textcoords="offset points", ha="right", va="center")
        _decades(axes)
        axes.set_xlabel(f"error over noise (dashed: the limit, {check.site_limit:g})", loc="right")

    return _svg(
        "sites", "Error at every fold site in multiples of the unfolded model's own", draw,
        _marked(_short([names[value] or value for value in rows]), [worst[v] > check.site_limit for v in rows]),
        legend=True,
    )  # fmt: skip


def weight_plot(layers: Sequence[LayerRange]) -> str:
    """Largest weight per channel, from the smallest channel's to the largest's, before and after folding."""
    spreads = [max(layer.after.spread, layer.after.input_spread) for layer in layers]
    rows = [layers[i] for i in _standing_out(range(len(layers)), spreads)]

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        for weights, colour, shift, mark, label in (
            ([row.before for row in rows], _BEFORE, -0.17, "|", "before folding"),
            ([row.after for row in rows], _AFTER, 0.17, "o", "after folding"),
        ):
            known = [(i + shift, w) for i, w in enumerate(weights) if w is not None and w.median]
            axes.hlines([i for i, _ in known], [w.smallest for _, w in known], [w.largest for _, w in known],
                        color=colour, linewidth=1.6)  # fmt: skip
            axes.plot([w.median for _, w in known], [i for i, _ in known], linestyle="", marker=mark, markersize=4.5,
                      color=colour, label=label)  # fmt: skip
        axes.margins(x=0.06)
        _decades(axes)
        axes.set_xlabel("largest |weight| per channel: smallest, median, largest", loc="right")

    return _svg(
        "weights", "Weight ranges of every layer before and after folding", draw,
        _marked(_short([row.module or row.value for row in rows]), [row.spoiled for row in rows]), legend=True,
        height=1.25,
    )  # fmt: skip


def norm_plot(norms: Sequence[NormRow]) -> str:
    """Scale and shift of every BatchNorm over its channels: all of them, the middle half, and the median."""
    rows = [norms[i] for i in _standing_out(range(len(norms)), [max(map(abs, (*s, *t))) for _, s, t in norms])]

    def panel(part: str, summaries: Sequence[Sequence[float]]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            low, lower, middle, upper, high = zip(*summaries)
            axes.axvline(0, color=_MUTED, linewidth=1)
            axes.hlines(range(len(rows)), low, high, color=_BEFORE, linewidth=1)
            axes.hlines(range(len(rows)), lower, upper, color=_AFTER, linewidth=4)
            axes.plot(middle, range(len(rows)), linestyle="", marker="|", markersize=7, color=_INK)
            if (reach := max(map(abs, (*low, *high)))) > 20:
                axes.set_xscale("symlog", linthresh=1)
                place = 10.0 ** math.floor(math.log10(reach))
                ticks = [tick for tick in (-place, 0.0, place) if min(low) <= tick <= max(high) or tick == 0]
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
                axes.set_xticks([], minor=True)
            else:
                axes.locator_params(axis="x", nbins=3)
            axes.set_xlabel(part)

        return draw

    return _svg(
        "norms", "Scale and shift of every BatchNorm", panel("scale", [scale for _, scale, _ in rows]),
        _short([name for name, _, _ in rows]), second=panel("shift", [shift for _, _, shift in rows]),
    )  # fmt: skip


# -- parts -------------------------------------------------------------------------------------------------------------


def _svg(
    name: str,
    title: str,
    draw: Callable[[Axes], None],
    labels: Sequence[str],
    *,
    second: Callable[[Axes], None] | None = None,
    legend: bool = False,
    height: float = 1.0,
) -> str:
    """One picture: a row per label, the first on top; the same x axis above and below."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    top, bottom, left, right = 38 if legend else 20, 34, 8 + 4.9 * max(map(len, labels), default=0), 12
    tall = max(len(labels), 1) * _ROW * height + top + bottom
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, tall / 72))
        panels = figure.subplots(1, 1 if second is None else 2, squeeze=False, sharey=True)[0]
        figure.subplots_adjust(left / _WIDTH, bottom / tall, 1 - right / _WIDTH, 1 - top / tall, wspace=0.14)
        for axes, drawn in zip(panels, (draw, second)):
            assert drawn is not None
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.grid(axis="x")
            axes.set_axisbelow(True)
            drawn(axes)
            axes.tick_params(axis="x", top=True, labeltop=True, length=2, labelsize=8, pad=2)
            axes.tick_params(axis="x", which="minor", length=0)
            axes.tick_params(axis="y", length=0)
            axes.spines[:].set_visible(False)
            axes.xaxis.label.set_fontsize(8)
        panels[0].set_yticks(range(len(labels)), list(labels), fontsize=8.5)
        if legend:
            figure.legend(loc="upper left", bbox_to_anchor=(0, 1), ncols=3, fontsize=7.5, handletextpad=0.2,
                          columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return at_home(written.getvalue(), name, title)


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


def _decades(axes: Axes) -> None:
    """Plain numbers along a logarithmic axis, more of them where it covers little, none that touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.2 else (1.0, 3.0) if decades < 2.5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0e}" if value > 9999 else f"{value:g}"))


def _marked(labels: Sequence[str], bad: Sequence[bool]) -> list[str]:
    """The labels with a cross before those of what is bad: colour is not all that tells."""
    return [f"✗ {label}" if wrong else label for label, wrong in zip(labels, bad)]


def _standing_out(items: Sequence[Any], sizes: Sequence[float]) -> list[Any]:
    """Of more items than there are rows those of the largest size, in the order of the model."""
    kept = sorted(sorted(range(len(items)), key=lambda i: -sizes[i])[:ROWS])
    return [items[i] for i in kept]


def _sized(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit beside a plot: without what all begin with and most end with, their first parts as initials."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    last, often = Counter(p[-1] for p in parts).most_common(1)[0] if parts else ("", 0)
    without = [p[:-1] if p[-1] == last and len(p) > 1 else p for p in parts]
    if often > len(parts) / 2 and len(set(map(tuple, without))) == len(set(map(tuple, parts))):
        parts = without
    return [_fitting(p) for p in parts]


def _fitting(parts: list[str]) -> str:
    for found in _abbreviations(parts):
        if len(found) <= _LABEL:
            return found
    return f"{found[: _LABEL // 2 - 1]}…{found[-_LABEL // 2 :]}"


def _abbreviations(parts: list[str]) -> Iterator[str]:
    yield ".".join(parts)
    for i in range(1, len(parts)):
        yield ".".join([*(part if part.isdigit() else part[:1] for part in parts[:i]), *parts[i:]])
