"""Reports as a page: complete, escaped, accessible, and as a real browser shows it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import CHECK, EXPORT, FAILED, LATENCY, NASTY, diagnosis, real, reports

from bnfold.render import document, graph, plots
from bnfold.report import (
    Accuracy,
    Diagnosis,
    Entry,
    ExportReport,
    Finding,
    LayerRange,
    Ledger,
    NormHealth,
    NormRange,
    Operator,
    SiteResult,
    WeightRange,
)

torch.set_num_threads(1)
VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}
DEEP = 120


class Page(HTMLParser):
    """Tags with their attributes, text, and what is nested wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._open, self.wrong = "", [], []
        self.feed(text)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self._open[-1:]:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(report: Any) -> Page:
    return Page(document(report, ".html"))


def test_a_section_is_there_once() -> None:
    check = replace(CHECK, interface=EXPORT.interface)
    names = [attributes["aria-labelledby"] for attributes in page(check).all("section")]
    assert names.count("interface") == 1 and len(set(names)) == len(names)


@functools.cache
def written(name: str) -> str:
    """The page of one of ``reports()``, drawn once for all tests."""
    return document(reports()[name], ".html")


def deep() -> ExportReport:
    """A net of many layers with long names."""
    names = [f"encoder.backbone.stages.{i // 9}.layers.{i}.block.normalization_{i % 3}" for i in range(DEEP)]
    sites = tuple(SiteResult(c, f"v{i}", n, 0.5 + i / 9, 1.0) for c in ("a", "b") for i, n in enumerate(names))
    weights = WeightRange(tuple(0.1 * k for k in range(1, 20)), 1.0)
    return replace(
        EXPORT, check=replace(EXPORT.check, sites=sites),
        ledger=Ledger(tuple(Entry(n, n, "BatchNorm2d", "batch_norm", "backward", (n[:-2],)) for n in names)),
        layers=tuple(LayerRange(n, n, weights, weights) for n in names),
        norms=tuple(NormRange(n, n, (1.0, -300.0), (0.0, 2.0)) for n in names),
    )  # fmt: skip


@pytest.mark.parametrize("name", reports())
def test_every_report_is_a_page_of_its_own(name: str) -> None:
    text = written(name)
    found = Page(text)
    assert not found.wrong and text.startswith("<!doctype html>") and found.all("html")[0]["lang"] == "en"
    assert not found.all("script") and not found.all("link") and not found.all("img") and not found.all("iframe")
    linked = [
        value for _, attributes in found.tags for key, value in attributes.items() if key.endswith(("href", "src"))
    ]
    assert all(str(value).startswith("#") for value in linked) and "@import" not in text and "url(h" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(headings))
    identifiers = [str(attributes["id"]) for _, attributes in found.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    referred = [str(v).removeprefix("#") for v in linked] + re.findall(r"url\(#([^)]+)\)", text)
    referred += [str(a["aria-labelledby"]) for _, a in found.tags if "aria-labelledby" in a]
    assert set(referred) <= set(identifiers)
    assert all(heading.get("scope") in ("col", "row") for heading in found.all("th"))
    assert all(svg["role"] == "img" for svg in found.all("svg")) and len(found.all("caption")) == len(
        found.all("table")
    )


def test_the_verdict_is_a_word_and_not_a_colour_alone() -> None:
    for name, word in (
        ("pass", "PASS"),
        ("fail", "FAIL"),
        ("inconclusive", "INCONCLUSIVE"),
        ("not judged", "NOT JUDGED"),
    ):
        found = Page(written(name)).words
        assert [w for w in ("PASS", "FAIL", "INCONCLUSIVE", "NOT JUDGED") if re.search(rf"\b{w}\b", found)] == [word]


def test_everything_asked_for_is_in_it() -> None:
    found = Page(written("fail"))
    for words in (
        "error is 70 times the noise", "What to do next", "--keep-failed", "runs on", "1, 2, 7",
        "into the layer before", "relu", "block.a, block.b", "36.9 K",
        "What stays, and why", "aten.gelu", "nothing: the algebra does not allow it",
        "Error per layer against the noise", "Weight ranges before and after folding", "per-tensor int8 hopeless",
        "Inputs and outputs", "batch, 3, 2*H", "Kinds of operators", "Scale and shift of every BatchNorm", "ab" * 32,
        "torch", "net.safetensors", "the batch is fixed",
    ):  # fmt: skip
        assert words in found.words, words
    titles = re.findall(r"<title id=[^>]*>([^<]*)", written("fail"))
    assert len(set(titles)) == 4 + bool(shutil.which("dot"))
    assert "What to do next" not in Page(written("pass")).words and "cd" * 32 in Page(written("pass")).words


def test_accuracy_of_any_fields_latency_and_health_are_shown() -> None:
    known = Accuracy(360, 0.994, 0.989, 2, 0.01, top5_before=1.0)
    words = page(replace(EXPORT, check=replace(EXPORT.check, accuracy=known))).words
    assert "Accuracy on real data" in words and "99.40%" in words and "top5 before" in words and "far flips" in words
    assert "Accuracy on real data" not in Page(written("pass")).words
    assert "1.9 to 2.1" in Page(written("bench")).words and "12.3 MB" in Page(written("bench")).words
    assert "batch-statistics" in Page(written("inspect")).words


@given(st.text(min_size=1))
@settings(deadline=None, max_examples=20)
def test_names_are_text(module: str) -> None:
    entry = Entry("bn", f"<i>{module}", "BatchNorm2d", "batch_norm", "backward", ("<script>alert(1)</script>",))
    found = page(replace(EXPORT, ledger=Ledger((entry,)), layers=(), norms=(), graph=(), check=None))
    assert not found.all("script") and not found.all("i") and not found.wrong


def test_a_nasty_name_is_text_in_plots_too() -> None:
    report = replace(
        EXPORT, layers=(LayerRange("v", "<script>$x$</script>", None, WeightRange((1.0, 2.0), 1.0)),),
        norms=(NormRange("v", "a_{$^\\frac", (1.0, 2.0), (0.0, 1.0)),), source={"source": NASTY},
    )  # fmt: skip
    found = page(report)
    assert not found.all("script") and not found.wrong and "{{ 7 * 7 }}" in found.words


def test_two_pages_of_one_report_are_equal_and_belong_to_dark_and_light() -> None:
    first, second = written("pass"), document(EXPORT, ".html")
    assert first == second
    svg = "".join(re.findall(r"<svg.*?</svg>", first, re.DOTALL))
    assert "currentColor" in svg and "var(--after)" in svg
    assert not re.findall(r"#[0-9a-f]{6}", re.sub(r'(href="|url\()#[^")]*', "", svg)), "a colour of its own"


def test_many_layers_are_drawn_row_by_row_up_to_a_limit() -> None:
    text = document(deep(), ".html")
    for title in ("Error at every fold site", "Weight ranges of every layer", "Scale and shift of every BatchNorm"):
        both = re.findall(rf"<svg[^>]*><title[^>]*>{title}.*?</svg>", text, re.DOTALL)
        assert len(both) == 2  # for a phone and for a screen
        for svg in both:
            rows = re.findall(r">([^<]*normalization_\d|[^<]*…[^<]*|[^<]*\d+\.b[^<]*)</text>", svg)
            assert len(rows) == plots.ROWS == len(set(rows))
    assert f"The {plots.ROWS} of {DEEP} that stand out most are drawn" in Page(text).words


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.b.conv", "a.c.conv"], ["b", "c"]),
        (["a", "b"], ["a", "b"]),
        (["net.conv"], ["net"]),
        (["x.weight", "x.weight"], ["weight", "weight #2"]),
        ([f"layer{i}.0.downsample.1" for i in (1, 2)], ["layer1.0.downsample", "layer2.0.downsample"]),
        (
            ["stage1.0.downsample.convolution", "stage2.0.downsample.norm"],
            ["s1.0.d.convolution", "s2.0.downsample.norm"],
        ),
        (["", "a.b"], ["", "a.b"]),
        (["stages.0.layers.11.expansion.q", "classifier"], ["s.0.l.11.expansion.q", "classifier"]),
        (["m" * 40, "classifier"], ["mmmmmmmmm…mmmmmmmmmm", "classifier"]),
    ],
)
def test_labels_fit_beside_a_plot(names: list[str], expected: list[str]) -> None:
    assert plots._short(names, 20) == expected


def test_labels_tell_apart_what_differs_wherever_it_does() -> None:
    names = [f"a{'b' * 30}{i}{'c' * 30}" for i in (1, 2)] + [f"encoder{i}.layer.{j}.x" for i in (1, 2) for j in (1, 2)]
    for letters in (20, 48):
        found = plots._short([*names, names[0]], letters)
        assert len(set(found)) == len(names) + 1 and all(len(label) < 67 for label in found)


@pytest.mark.skipif(shutil.which("dot") is None, reason="no graphviz here: apt-get install graphviz")
def test_every_operator_is_in_the_picture_with_what_became_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(graph.picture(EXPORT.graph))
    assert re.findall(r">([−=+*!]) (\w+)<", text) == [
        ("+", "conv2d"), ("−", "batch_norm"), ("!", "mul"), ("+", "conv2d"), ("=", "conv2d"), ("=", "add"), ("*", "add")
    ]  # fmt: skip
    assert text.count('class="edge"') == sum(len(operator.reads) for operator in EXPORT.graph)
    assert "block.a: took something in" in text and "<b>" not in text
    assert text.rindex("<text") > text.rindex('class="edge"'), "names of boxes lie over the lines"
    many = [Operator("conv2d", f"stage{i // 99}.{i // 3 % 33}.conv", (i - 1,) if i else (), "kept") for i in range(990)]
    text = str(graph.picture(many))
    assert len(re.findall('class="node"', text)) == 330 // 33 and "stage3" in text and "99 operators" in text
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert graph.picture(many) is None and "graphviz draws" in page(EXPORT).words


@pytest.mark.skipif(shutil.which("dot") is None, reason="no graphviz here: apt-get install graphviz")
def test_the_picture_of_a_failure_marks_the_operators_whose_folds_are_wrong() -> None:
    failed = document(replace(EXPORT, check=FAILED), ".html")
    assert ">✗ add<" in failed and ">− batch_norm<" in failed and "✗ bold: not what the model computes" in failed
    passed = document(EXPORT, ".html")
    assert ">= add<" in passed and "✗ add" not in passed and "✗ bold" not in passed
    many = [
        Operator("batch_norm", f"stage{i // 99}.{i // 3 % 33}.bn", (i - 1,) if i else (), "folded") for i in range(990)
    ]
    assert str(graph.picture(many, {"stage3.7.bn"})).count("✗ 3 wrong") == 1, "also where a box is a module"


def test_kinds_of_operators_are_counted_before_and_after() -> None:
    rows = {kind: (before, after) for kind, before, after in graph.operator_types(EXPORT.graph)}
    assert rows == {
        "conv2d": ("3", "2"), "add": ("1", "1"), "batch_norm": ("1", "0"), "gelu": ("1", "1"), "mul": ("1", "1")
    }  # fmt: skip


def test_the_page_of_a_failure_has_the_histogram_of_its_errors_and_that_of_bench_bars() -> None:
    title = "How many elements are off by how many times their noise</title>"
    assert written("fail").count(title) == 2 and title not in written("pass")
    unknown = tuple(replace(each, doublings=()) for each in FAILED.outputs)
    assert plots.histogram_plot(replace(FAILED, outputs=unknown)) == "", "integers alone have no noise"
    bars = written("bench")
    assert bars.count("Time per call</title>") == 2 and ">net.py:make</text>" in bars
    assert bars.count(" ms</text>") == 2 * len(LATENCY.contestants), "each bar has its median beside it"


def test_what_all_batchnorms_have_in_common_is_said_once() -> None:
    def said(*norms: NormHealth, modules: tuple[str, ...]) -> str:
        return " ".join(page(Diagnosis({}, norms, (Finding("train-mode", modules, "so it is"),))).words.split())

    norm = diagnosis().norms[0]
    two = said(replace(norm, module="a"), replace(norm, module="b", eps=0.5), modules=("a", "b"))
    assert f"The same for all: kind {norm.layer}" in two and "all of them note train-mode so it is" in two
    assert f"a {norm.eps:g}" in two and "b 0.5" in two, "what differs has a column"
    one = said(replace(norm, module="a"), modules=("a",))
    assert "The same for all" not in one and "all of them" not in one and "a note train-mode" in one


# -- a real browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<!doctype html><body>
<iframe id="page" src="{src}" width="{width}" height="800"></iframe>
<script>
onload = () => {{
  const doc = document.getElementById("page").contentDocument, root = doc.documentElement;
  const off = [...doc.querySelectorAll("body *")].filter(e => !e.parentElement.closest(".scroll, svg"))
    .filter(e => e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80));
  const shown = [...doc.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width);
  const labels = shown.map(svg => {{
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    const cut = texts.filter(([, r]) => r.left < box.left - 1 || r.right > box.right + 1).map(([t]) => t);
    const over = [];
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {{
      const w = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (w > 1 && h > 0.35 * Math.min(p.height, q.height)) over.push(a + " | " + b);
    }}));
    return {{cut, over, height: texts.length ? texts[0][1].height : 0}};
  }});
  document.body.textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth, off, labels,
    background: getComputedStyle(doc.body).backgroundColor, ink: getComputedStyle(doc.body).color,
  }});
  document.title = "done";
}};
</script>"""


def browse(folder: Path, report: Any, width: int, *more: str) -> tuple[dict[str, Any], str]:
    """What a browser measures of a page in a window of ``width`` pixels, and what it logged."""
    path, frame, log = folder / "report.html", folder / "frame.html", folder / "net.json"
    path.write_text(document(report, ".html"), encoding="utf-8", errors="backslashreplace")
    frame.write_text(MEASURE.format(src=path.name, width=width))
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--virtual-time-budget=5000",
         "--disable-background-networking", "--disable-component-update", "--no-first-run", f"--log-net-log={log}",
         *more, "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = re.search(r"<body>(\{.*\})\s*</body>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The browser asks for things of its own, whatever it shows; the page's requests are those that a file began.
    events = [line for line in log.read_text(errors="replace").splitlines() if '"initiator":"file://"' in line]
    requests = set(re.findall(r'"url":"((?:https?|wss?|ftp):[^"]*)"', "\n".join(events)))
    return json.loads(unescape(found.group(1))), "\n".join([*console, *requests])


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_a_deep_net_without_overflow(width: int, tmp_path: Path) -> None:
    found, trouble = browse(tmp_path, deep(), width)
    assert trouble == ""
    assert found["scroll"] <= found["client"] and found["off"] == []
    assert len(found["labels"]) == 3 + bool(shutil.which("dot"))
    for plot in found["labels"]:
        assert plot["cut"] == [] and plot["over"] == [] and plot["height"] >= 8


@needs_browser
def test_a_browser_shows_a_failure_in_dark_and_light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = replace(real(tmp_path, monkeypatch, "one channel off by 1 %"), source={"source": NASTY * 5})
    seen = []
    for folder, scheme in ((tmp_path / "dark", 0), (tmp_path / "light", 1)):
        folder.mkdir()
        found, trouble = browse(folder, report, 360, f"--blink-settings=preferredColorScheme={scheme}")
        assert trouble == "" and found["off"] == [] and all(not p["over"] and not p["cut"] for p in found["labels"])
        seen.append((found["background"], found["ink"]))
    assert seen == [("rgb(20, 23, 26)", "rgb(231, 234, 238)"), ("rgb(255, 255, 255)", "rgb(26, 29, 33)")]


@needs_browser
def test_the_measurement_sees_what_overflows_and_what_is_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the tests above: a page that is wider than its window, has text over text and asks for a file."""
    from bnfold.render import html

    bad = (
        '<p style="width:900px">x</p><svg width="90" height="20"><text y="12">one</text><text y="12">two</text></svg>'
        '<script>console.error("oh")</script><img src="http://127.0.0.1:9/x">'  # a page is not there before its images
    )
    monkeypatch.setattr(html, "page", lambda report: f"<!doctype html><body>{bad}</body>")
    found, trouble = browse(tmp_path, EXPORT, 360)
    assert found["scroll"] > found["client"] and found["off"] and found["labels"][0]["over"]
    assert "oh" in trouble and "http://127.0.0.1:9/x" in trouble
