"""A model before and after folding in one picture, laid out by graphviz's dot where that is installed.

What goes is dashed, what took something in is thick, and each has a sign before its name: colour is not all that tells.
Up to ``OPERATORS`` operators each is drawn by itself, in a box per module; of more, modules are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

from bnfold.errors import printable
from bnfold.render.plots import STAND_INS, at_home
from bnfold.render.words import plural
from bnfold.report import Fate, Operator

#: Operators that are drawn one by one, and boxes at most where there are more.
OPERATORS, BOXES = 160, 120
#: Seconds for a layout.
_PATIENCE = 60
MISSING = "graphviz draws the operators here, and its dot is not installed: apt-get install graphviz, or its like."
_INK, _MUTED, _LINE, _FAIL, _BEFORE, _AFTER, _THIRD = STAND_INS
#: Sign, colour and line of each fate, the most telling first: a box of many operators has that of the first it holds.
LOOKS: dict[Fate | Literal["wrong"], tuple[str, str, str, str]] = {
    "wrong": ("✗", _FAIL, "bold", "not what the model computes there"),
    "left": ("!", _FAIL, "bold", "an affine that stays"),
    "folded": ("−", _BEFORE, "dashed", "folded: no longer there"),
    "merged": ("=", _THIRD, "dashed", "merged: no longer there"),
    "changed": ("+", _AFTER, "bold", "took something in"),
    "new": ("*", _AFTER, "bold", "was not there before"),
    "kept": ("", _MUTED, "solid", "as it was"),
}


def legend(graph: Sequence[Operator], wrong: Collection[str] = ()) -> str:
    """The signs and lines of a picture of this graph in words."""
    there = {_look(operator, wrong) for operator in graph}
    looks = [look for fate, look in LOOKS.items() if fate in there]
    return "; ".join(f"{sign} {line}: {words}" for sign, _, line, words in looks if sign)


def picture(graph: Sequence[Operator], wrong: Collection[str] = ()) -> str | None:
    """An SVG element, folds of ``wrong`` modules marked; None without dot, or where it fails or takes too long."""
    dot = shutil.which("dot")
    if dot is None or not graph:
        return None
    text = "\n".join(_each(graph, wrong) if len(graph) <= OPERATORS else _boxes(graph, wrong))
    try:
        done = subprocess.run(
            [dot, "-Tsvg"], input=text, capture_output=True, text=True, timeout=_PATIENCE, check=True, encoding="utf-8"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    svg = re.sub(r"<title>.*?</title>\s*", "", done.stdout, flags=re.DOTALL)  # dot's own are the numbers of its nodes
    svg = re.sub(r'<a xlink:title="([^"]*)">', r"<title>\1</title>", svg).replace("</a>", "")
    # Names of boxes over the lines that enter there: what is drawn last lies on top.
    parts = re.split(r'(?<=class="cluster">)(.*?)(<text.*?</text>)', svg, flags=re.DOTALL)
    names = "".join(parts[2::3])
    svg = "".join(part for i, part in enumerate(parts) if i % 3 != 2).replace("</g>\n</svg>", f"{names}</g>\n</svg>")
    svg = svg.replace('font-family="Courier,monospace"', 'font-family="ui-monospace, monospace"')
    return at_home(svg, "graph", "The operators before and after folding", natural=True)


def operator_types(graph: Iterable[Operator]) -> list[tuple[str, str, str]]:
    """Kinds of operators with how many there are before and after, the most frequent first."""
    before, after = Counter(o.kind for o in graph if o.before), Counter(o.kind for o in graph if o.after)
    kinds = sorted({**before, **after}, key=lambda kind: (-before[kind], -after[kind], kind))
    return [(kind, str(before[kind]), str(after[kind])) for kind in kinds]


# -- what dot reads ----------------------------------------------------------------------------------------------------


def _look(operator: Operator, wrong: Collection[str]) -> Fate | Literal["wrong"]:
    """How an operator is drawn: by its fate, unless it is one whose fold is wrong."""
    return "wrong" if operator.module in wrong and operator.fate in ("folded", "merged") else operator.fate


def _each(graph: Sequence[Operator], wrong: Collection[str]) -> Iterator[str]:
    """A node per operator, a box per module that has several."""
    above = {operator.module.rpartition(".")[0] for operator in graph}  # what such a module does itself is in its box
    homes = [o.module if o.module in above else o.module.rpartition(".")[0] for o in graph]
    boxed = {home for home, count in Counter(homes).items() if home and count > 1}
    nodes = []
    for i, (operator, home) in enumerate(zip(graph, homes)):
        sign, colour, style, words = LOOKS[_look(operator, wrong)]
        own = operator.module[len(home) + 1 :] if home in boxed else operator.module
        lines = [f"{sign} {operator.kind}".strip(), *([own] if own and own != operator.kind else [])]
        nodes.append(_node(i, lines, colour, style, f"{operator.module or operator.kind}: {words}", operator.kind))
    return _drawn(nodes, homes, boxed, ((j, i) for i, operator in enumerate(graph) for j in operator.reads))


def _boxes(graph: Sequence[Operator], wrong: Collection[str]) -> Iterator[str]:
    """A node per module, at the greatest depth at which they are few enough, in a box per module above them."""
    depths = range(max(operator.module.count(".") for operator in graph) + 1, 0, -1)
    homes = next(
        (found for depth in depths if len(set(found := [_at(o, depth) for o in graph])) <= BOXES),
        [operator.kind if operator.kind in ("input", "output") else "" for operator in graph],
    )
    place = {name: i for i, name in enumerate(dict.fromkeys(homes))}
    ends = {home for home, operator in zip(homes, graph) if operator.kind in ("input", "output")}
    parents = [name.rpartition(".")[0] for name in place]
    nodes = []
    for (name, i), parent in zip(place.items(), parents):
        fates = Counter(_look(operator, wrong) for operator, home in zip(graph, homes) if home == name)
        _, colour, style, _ = LOOKS[next(fate for fate in LOOKS if fates[fate])]
        told = [f"{LOOKS[fate][0]} {count} {fate}" for fate, count in fates.items() if fate != "kept"]
        own = name[len(parent) + 1 :] if parent else name
        lines = [own or "the model", *([] if name in ends else [plural(sum(fates.values()), "operator")]), *told]
        nodes.append(_node(i, lines, colour, style, name or "the model", name))
    edges = {(place[homes[j]], place[homes[i]]) for i, operator in enumerate(graph) for j in operator.reads}
    return _drawn(nodes, parents, {*parents} - {""}, (edge for edge in sorted(edges) if edge[0] != edge[1]))


def _at(operator: Operator, depth: int) -> str:
    """The module of an operator, cut at a depth; what has none is by itself."""
    return ".".join(operator.module.split(".")[:depth]) or operator.kind


def _drawn(
    nodes: Sequence[str], homes: Sequence[str], boxed: Collection[str], edges: Iterable[tuple[int, int]]
) -> Iterator[str]:
    """Nodes by their homes, some of which are boxes, and the lines from one to the other."""
    yield "digraph { bgcolor=transparent; nodesep=0.15; ranksep=0.22; labeljust=l; margin=0.05;"
    yield f'fontname="Courier,monospace"; fontsize=11; color="{_LINE}"; fontcolor="{_MUTED}"; pad=0.05;'
    yield f'node [shape=box, fontname="Courier,monospace", fontsize=11, fontcolor="{_INK}", height=0.1];'
    yield 'node [margin="0.08,0.04"];'
    yield f'edge [color="{_MUTED}", arrowsize=0.5, penwidth=0.8];'
    for number, home in enumerate(dict.fromkeys(homes)):
        box = f"subgraph cluster_{number} {{ label={_quoted(home)}; tooltip={_quoted(home)};"
        inside = [node for node, its in zip(nodes, homes) if its == home]
        yield from [box, *inside, "}"] if home in boxed else inside
    yield from (f"n{j} -> n{i};" for j, i in edges)
    yield "}"


def _node(number: int, lines: Sequence[str], colour: str, style: str, told: str, kind: str) -> str:
    text = "\\n".join(_plain(line) for line in lines)
    shape = ", shape=ellipse" if kind in ("input", "output") else ""
    return f'n{number} [label="{text}", color="{colour}", style={style}, tooltip={_quoted(told)}{shape}];'


def _quoted(text: str) -> str:
    return f'"{_plain(text)}"'


def _plain(text: str) -> str:
    """For a string of dot's: what it would read as its own is escaped, what XML cannot hold is spelt out."""
    return printable(text).encode("utf-8", "backslashreplace").decode().replace("\\", "\\\\").replace('"', '\\"')
