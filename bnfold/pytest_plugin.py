"""pytest plugin: a regression test of a model's ONNX export in three lines.

    def test_net(onnx_gate):
        onnx_gate(net(), (x,), data="heldout.npz")

The fixture exports to a temporary folder (or judges a file that is there already: ``path="net.onnx"``), fails with the
rendered report where the verdict is no pass, and compares with the baseline that is kept beside the test.
``pytest --bnfold-update`` writes the baselines.

pytest imports this module in every run of the environment, so it imports nothing of torch's.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bnfold.report import CheckReport, ExportReport

#: Beside the test file.
FOLDER = "bnfold-baselines"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--bnfold-update``."""
    parser.getgroup("bnfold").addoption(
        "--bnfold-update", action="store_true", help=f"write the baselines of onnx_gate, in {FOLDER} beside each test"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keeps torch's log out of what a failing test of ``onnx_gate`` shows; ``caplog`` and log files have all of it."""
    plugin = session.config.pluginmanager.get_plugin("logging-plugin")
    if plugin is not None:
        plugin.report_handler.addFilter(_shown)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Notes whether the test uses ``onnx_gate``."""
    _shown.gated = "onnx_gate" in getattr(item, "fixturenames", ())


class _Shown(logging.Filter):
    gated = False

    def filter(self, record: logging.LogRecord) -> bool:
        # torch.__trace writes records without a message, for a handler of its own, whatever is disabled.
        return not record.name.startswith(("torch.", "onnx_ir", "onnxscript") if self.gated else "torch.__trace")


_shown = _Shown()


@pytest.fixture
def onnx_gate(request: pytest.FixtureRequest, tmp_path: Path) -> OnnxGate:
    """Exports a model, or takes an ONNX file, and fails the test where the file does not equal the model.

    See ``OnnxGate.__call__`` for what it takes.
    """
    update = bool(request.config.getoption("--bnfold-update"))
    return OnnxGate(request.path, _item_name(request.node), tmp_path, update=update)


@dataclass
class OnnxGate:
    """The gate of one test."""

    test: Path
    name: str
    folder: Path
    update: bool
    _calls: int = field(default=0)

    def __call__(
        self,
        model: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        path: str | Path | None = None,
        data: Any = None,
        baseline: bool = True,
        **options: Any,
    ) -> ExportReport | CheckReport:
        """Exports ``model`` and fails the test with the report where the verdict is no pass.

        Args:
            model: a torch.nn.Module in any mode, or an ExportedProgram; not touched.
            args: positional example inputs, as for ``torch.export.export``.
            kwargs: keyword example inputs.
            path: judge this ONNX file instead of exporting one.
            data: samples, as ``--data`` takes them. A relative path, and that of ``path``, begins at the test file.
            baseline: compare with the baseline beside the test; each call within a test has its own.
            options: of ``bnfold.export`` or ``bnfold.check``: ``device=``, ``dtype=``, ``dynamic_shapes=``, ...

        Returns:
            The report. An exported file lies at ``report.file.path`` until pytest clears its temporary folder.

        Raises:
            pytest.fail.Exception: the verdict is no pass, the model cannot be exported, or there is no baseline: it is
                written by ``pytest --bnfold-update`` alone, because a test that makes its own cannot fail.
        """
        import bnfold
        from bnfold.commands.running import quiet

        self._calls += 1
        options["data"] = self._beside(data) if isinstance(data, (str, Path)) else data
        suffix = f"-{self._calls}" if self._calls > 1 else ""
        if baseline:
            kept = self.test.parent / FOLDER / self.test.stem / f"{self.name}{suffix}.json"
            if self.update:
                kept.parent.mkdir(parents=True, exist_ok=True)
            options |= {"baseline": kept, "update_baseline": self.update}
        report: ExportReport | CheckReport | None = None
        problem = ""
        try:
            with quiet():
                if path is not None:
                    report = bnfold.check(self._beside(path), model, args, kwargs, **options)
                else:
                    report = bnfold.export(model, self.folder / f"model{suffix}.onnx", args, kwargs, **options)
        except bnfold.BnfoldError as error:  # one line, made to be read; its traceback is bnfold's
            problem = str(error)
        if report is None:
            pytest.fail(problem, pytrace=False)
        if not report.passed:
            pytest.fail(_rendered(report), pytrace=False)
        return report

    def _beside(self, path: str | Path) -> Path:
        """A path that begins at the test file; one that is not there is left to begin at the current folder."""
        beside = self.test.parent / path
        return beside if beside.exists() or not Path(path).exists() else Path(path)


def _item_name(node: Any) -> str:
    """The test's name without its file, as a file name; what is lost in that is made up for by a digest."""
    full = node.nodeid.partition("::")[2] or node.name
    name = re.sub(r"[^\w.\[\]=,+-]+", "-", full)[:120]
    return name if name == full else f"{name}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _rendered(report: ExportReport | CheckReport) -> str:
    import io

    from bnfold.render import in_a_line, printed, text

    shown = text(lambda page: printed(report, page, destination="the export"), io.StringIO())
    return f"{in_a_line(report) or 'nothing was judged'}\n{shown}"
