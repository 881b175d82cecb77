"""The commands as a user runs them: what they print, what they write, and the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

from bnfold import pipeline, render
from bnfold._version import __version__
from bnfold.cli import cli
from bnfold.errors import EXIT_CODES
from bnfold.render.words import next_steps
from bnfold.report import REASONS, CheckReport, Entry, ExportReport, FileReport, Ledger, OutputResult, Refusal

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
DIGITS = f"{MODELS / 'digits.py'}"
COMMANDS = ("bench", "bisect", "calibrate", "check", "doctor", "export", "fold", "fleet", "inspect")

NETS = """
import torch
from torch import nn

def block(ins, outs): return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs))

class Small(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(block(3, width), nn.ReLU(), block(width, 2), nn.Dropout(0.5))
        for norm in (self[0][1], self[2][1]):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
        self.example_inputs = (torch.randn(2, 3, 6, 6),)

class Rich(nn.Module):
    "Two inputs, one of them keyword-only; a dict that holds a tuple."
    def __init__(self):
        super().__init__()
        self.image, self.vector = block(3, 4), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    def forward(self, image, *, vector):
        y = self.image(image).mean((2, 3)) + self.vector(vector)
        return {"logits": y, "pair": (y.relu(), y.argmax(1))}

def small(width=4):
    torch.manual_seed(0)
    return Small(width)
def rich(): return Rich()
def chatty():
    print("on stdout")
    import sys, warnings, logging
    print("on stderr", file=sys.stderr)
    warnings.warn("a warning")
    logging.getLogger("torch.onnx").warning("a log line")
    return Small()
"""


def bnfold(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment or None)


def passes(*arguments: str | Path, **environment: str) -> str:
    """What a run prints that is expected to succeed."""
    result = bnfold(*arguments, **environment)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def process(*arguments: str, **extra: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bnfold", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, **extra)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The export of the trained convolutional net: the file, what was printed, and the report."""
    folder = tmp_path_factory.mktemp("digits")
    printed = passes(
        "export", f"{DIGITS}:digits_cnn", "--weights", MODELS / "digits_cnn.safetensors",
        "--data", MODELS / "digits_heldout.npz", "-o", folder / "net.onnx", "--report", folder / "r.json",
    )  # fmt: skip
    return folder / "net.onnx", printed, json.loads((folder / "r.json").read_text())


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_of_a_trained_net_passes_and_says_what_it_did(digits: tuple[Path, str, dict[str, Any]]) -> None:
    path, printed, report = digits
    lines = printed.splitlines()
    assert "61 K parameters, weights digits_cnn.safetensors" in lines[0]
    assert "11 of 11 BatchNorm" in printed
    assert "10 into the layer before, 1 into the layer after through relu, adaptive_avg_pool2d, flatten" in printed
    assert "CPUExecutionProvider" in printed and "PASS" in printed and "FAIL" not in printed
    assert re.search(r"top-1 on 360 labelled samples: 99\.4% before, 99\.4% after, 0 flips", printed)
    assert report["check"]["accuracy"]["flips"] == 0 and report["passed"]
    before, after = report["operators"]
    assert f"{before} operators before, {after} after" in printed and after <= before - 11
    (worst,) = re.findall(r"12 fold sites: worst ratio ([\d.]+) \(limit 6\)", printed)
    assert float(worst) == pytest.approx(report["check"]["site_ratio"], rel=0.06)
    (ratio,) = re.findall(r"ratio ([\d.]+) \(limit 4\)   PASS", printed)
    assert float(ratio) == pytest.approx(report["check"]["ratio"], rel=0.06)
    (wrote,) = [line for line in lines if line.startswith("Wrote")]
    size = path.stat().st_size
    model = onnx.load(path)
    assert f"{size / 1000:.3g} KB, opset {model.opset_import[0].version}, {len(model.graph.node)} operators" in wrote
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_nothing_but_the_file_and_its_report_is_left_in_the_folder(digits: tuple[Path, str, dict[str, Any]]) -> None:
    assert sorted(entry.name for entry in digits[0].parent.iterdir()) == ["net.onnx", "r.json"]


def test_no_path_of_the_user_is_in_the_files(nets: Path, tmp_path: Path) -> None:
    for command, name in (("export", "net.onnx"), ("fold", "net.pt2")):
        passes(command, f"{nets}:small", "-o", tmp_path / name, "--no-check")
        content = (tmp_path / name).read_bytes()
        assert os.fsencode(nets.parent) not in content and b"site-packages" not in content


@pytest.mark.parametrize(("command", "suffix"), [("export", ".onnx"), ("fold", ".pt2")])
def test_two_runs_write_the_same_bytes(command: str, suffix: str, nets: Path, tmp_path: Path) -> None:
    first, second = tmp_path / f"net{suffix}", tmp_path / "again" / f"net{suffix}"
    second.parent.mkdir()
    for path in (first, second):
        passes(command, f"{nets}:small", "-o", path, "--no-check")
    assert first.read_bytes() == second.read_bytes()


def test_export_of_an_exported_program(tmp_path: Path) -> None:
    printed = passes("export", MODELS / "digits_mlp.pt2", "-o", tmp_path / "net.onnx")
    assert "1 of 1 BatchNorm" in printed and "PASS" in printed
    assert {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}.isdisjoint({"BatchNormalization"})


def test_a_batch_norm_without_running_statistics_stays_with_a_reason_and_a_way_out(tmp_path: Path) -> None:
    weights = MODELS / "digits_batchstats.safetensors"
    printed = passes("export", f"{DIGITS}:digits_batchstats", "--weights", weights, "-o", tmp_path / "net.onnx")
    assert "2 of 3 BatchNorm" in printed and "Left     1 of 3 BatchNorm" in printed
    assert re.search(r"bn2 +BatchNorm2d +batch-statistics +bn2", printed)
    assert " ".join(REASONS["batch-statistics"][1].split()) in " ".join(printed.split())


def test_two_inputs_a_keyword_a_dictionary_and_a_tuple(nets: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    specs = ["--input", "image[N,3,6,6]", "--input", "vector[N,5]", "--dynamic", "N=1..9"]
    printed = passes("export", f"{nets}:rich", *specs, "-o", path)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["image", "vector"]
    assert [value.name for value in graph.output] == ["logits", "pair.0", "pair.1"]
    assert all(f"{name}: noise" in printed for name in ("logits", "pair.0", "pair.1"))
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_arguments_of_the_factory_and_static_shapes(nets: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    passes("export", f"{nets}:small", "--arg", "width=7", "--static", "--opset", "19", "-o", path, "--no-check")
    model = onnx.load(path)
    shapes = {tuple(value.dims) for value in model.graph.initializer}
    assert (7, 3, 3, 3) in shapes and model.opset_import[0].version == 19
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 6, 6]


def test_no_fold_leaves_the_batch_norms_in(nets: Path, tmp_path: Path) -> None:
    for flag, left in (("--no-fold", 2), ("--no-simplify", 0)):
        passes("export", f"{nets}:small", flag, "-o", tmp_path / "net.onnx", "--no-check")
        operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
        assert operators.count("BatchNormalization") == left


def test_external_data_lies_beside_the_file(nets: Path, tmp_path: Path) -> None:
    printed = passes("export", f"{nets}:small", "--arg", "width=32", "--external-data", "-o", tmp_path / "net.onnx")
    (data,) = tmp_path.glob("net.*.data")
    assert f"weights in {data.name}" in printed and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("arguments", [["-o", "net.onnx"], []])
def test_a_dry_run_judges_and_writes_nothing(
    arguments: list[str], nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = passes("export", f"{nets}:small", "--dry-run", *arguments)
    assert "PASS" in printed and "nothing was written" in printed and not list(tmp_path.iterdir())


# -- verdicts that are no pass -----------------------------------------------------------------------------------------


def with_verdict(monkeypatch: pytest.MonkeyPatch, verdict: str) -> None:
    """Makes the gate say ``verdict``, on the true numbers."""
    from dataclasses import replace

    judge = pipeline.Gate.judge

    def judged(self: pipeline.Gate) -> CheckReport:
        return replace(judge(self), verdict=verdict, problems=("the first thing", "the second thing"))

    monkeypatch.setattr(pipeline.Gate, "judge", judged)


@pytest.mark.parametrize(
    ("verdict", "code", "command", "suffix"),
    [("fail", 1, "export", ".onnx"), ("fail", 1, "fold", ".pt2"), ("inconclusive", 7, "fold", ".pt2")],
)
def test_without_a_pass_the_destination_is_untouched(
    verdict: str, code: int, command: str, suffix: str, nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_verdict(monkeypatch, verdict)
    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"before")
    result = bnfold(command, f"{nets}:small", "-o", path)
    assert result.exit_code == code
    assert "problem: the first thing\n" in result.stdout and "problem: the second thing\n" in result.stdout
    assert verdict.upper() in result.stdout and "nothing was written" in result.stdout
    assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if verdict == "inconclusive":
        return
    kept = bnfold(command, f"{nets}:small", "-o", path, "--keep-failed")
    assert kept.exit_code == code and path.read_bytes() == b"before"
    assert (tmp_path / f"net.failed{suffix}").is_file() and "net.failed" in kept.stdout
    quiet = bnfold(command, f"{nets}:small", "-o", path, "--quiet")
    assert quiet.exit_code == code and quiet.stdout == ""
    assert quiet.stderr.startswith("error: ") and "the first thing" in quiet.stderr


def next_commands(printed: str) -> list[list[str]]:
    """What is proposed, as arguments of the program."""
    commands = [line.partition("python -m bnfold ")[2] for line in printed.splitlines()]
    return [shlex.split(command) for command in commands if command]


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_what_is_proposed_runs_as_it_stands(
    verdict: str, nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, path = tmp_path / "my weights.safetensors", tmp_path / "wide.onnx"
    wide = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
    narrow = nn.Sequential(nn.Conv2d(6, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2))
    state = nn.Sequential(wide, nn.ReLU(), narrow).state_dict()
    save_file({f"ema.{name}": value for name, value in state.items()}, weights)
    model = ("--weights", weights, "--strip-prefix", "ema.", "--arg", "width=6", "--dtype", "float16")
    model = (*model, "--input", "input:float32[N,3,8,8]", "--dynamic", "N=1..8")
    np.savez(tmp_path / "samples.npz", input=np.zeros((12, 3, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    with_verdict(monkeypatch, verdict)
    run = bnfold("export", f"{nets}:small", *model, "--no-merge", "--seed", "3", "-o", path, "--report", "r.json")
    proposed = next_commands(run.stdout)
    assert [words[0] for words in proposed] == ["export", *(["bisect"] if verdict == "fail" else ["export"]), "check"]
    kept = next(words for words in proposed if "--keep-failed" in words)
    assert bnfold(*kept).exit_code == run.exit_code and (tmp_path / "wide.failed.onnx").is_file()
    for words in (words for words in proposed if words is not kept):
        assert bnfold(*words).exit_code == (0 if words[0] == "bisect" else run.exit_code), words
        # Without what was given it would not have run, or would have judged another model.
        cut = words.index("--arg")
        assert bnfold(*words[:cut], *words[cut + 2 :]).exit_code == 3
    assert all(("--no-merge" in words) is (words[0] == "export") for words in proposed)
    given = json.loads((tmp_path / "r.json").read_text())["source"]["given"]
    assert given["source"] == "nets.py:small" and given["output"] == "wide.onnx", "no folder of whoever ran it"
    assert ["--weights", "my weights.safetensors"] in given["options"]["check"]


def test_a_pass_proposes_nothing(nets: Path, tmp_path: Path) -> None:
    printed = passes("export", f"{nets}:small", "-o", tmp_path / "net.onnx", "--report", tmp_path / "r.json")
    assert not next_commands(printed)
    assert "given" not in json.loads((tmp_path / "r.json").read_text())["source"]


def test_a_wrong_file_fails_the_check_and_the_right_one_passes(digits: tuple[Path, str, dict[str, Any]]) -> None:
    path, _, _ = digits
    net = f"{DIGITS}:digits_cnn"
    assert "Verdict  PASS" in passes("check", path, net, "--weights", MODELS / "digits_cnn.safetensors")
    other = bnfold("check", path, net)
    assert other.exit_code == 1 and "Verdict  FAIL" in other.stdout and "problem: " in other.stdout


# -- fold, inspect, doctor ---------------------------------------------------------------------------------------------


def test_the_folded_program_is_the_model(nets: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    printed = passes("fold", f"{nets}:small", "-o", path)
    assert "2 of 2 BatchNorm" in printed and "PASS" in printed and "2 fold sites" in printed
    program = torch.export.load(path)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    assert "0 BatchNorm" not in printed and "no BatchNorm" in passes("inspect", path)
    x = torch.randn(5, 3, 6, 6)
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    model = namespace["small"]().eval()
    with torch.no_grad():
        truth = model.double()(x.double())
        error = (program.module()(x).double() - truth).norm() / truth.norm()
    assert float(error) < 4 * torch.finfo(torch.float32).eps


def test_inspect_shows_the_plan_and_writes_nothing(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = passes("inspect", f"{nets}:small")
    assert re.search(r"0\.1 +BatchNorm2d +0\.0", printed) and re.search(r"2\.1 +BatchNorm2d +2\.0", printed)
    assert not list(tmp_path.iterdir())
    document = json.loads(passes("inspect", f"{nets}:small", "--json"))
    assert [entry["into"] for entry in document["plan"]["ledger"]["entries"]] == [["0.0"], ["2.0"]]
    assert document["plan"]["check"] is None and document["plan"]["file"] is None


def test_doctor_tells_versions_and_exits_5_on_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfold.runtime import doctor
    from bnfold.runtime.doctor import Finding

    printed = passes("doctor")
    assert f"torch {torch.__version__}" in printed and f"bnfold {__version__}" in printed
    assert json.loads(passes("doctor", "--json"))[0]["level"] == "ok"
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("problem", "it is broken [x]", "Mend it")])
    result = bnfold("doctor")
    assert result.exit_code == 5 and "it is broken [x]" in result.stdout and "Mend it" in result.stdout


# -- streams -----------------------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_progress_to_stderr(nets: Path, tmp_path: Path) -> None:
    result = bnfold("export", f"{nets}:chatty", "-o", tmp_path / "net.onnx")
    assert result.exit_code == 0
    assert [line.split(" ... ")[0] for line in result.stderr.splitlines()] == [
        "load", "capture", "fold", "lower", "write", "check"
    ]  # fmt: skip
    assert all(re.fullmatch(r"\w+ \.\.\. \d+\.\d s", line) for line in result.stderr.splitlines())
    assert result.stdout.startswith("Loaded") and "on stdout" not in result.stdout


@pytest.mark.slow
def test_debug_shows_what_the_model_prints_and_warns(nets: Path) -> None:
    done = process("inspect", f"{nets}:chatty", "--debug")
    assert done.returncode == 0
    assert all(text in done.stderr for text in ("on stdout", "on stderr", "a warning", "a log line"))
    assert "on stdout" not in done.stdout


def test_json_is_one_document_and_quiet_prints_nothing(nets: Path, tmp_path: Path) -> None:
    result = bnfold("export", f"{nets}:chatty", "-o", tmp_path / "net.onnx", "--json", "--quiet")
    document = json.loads(result.stdout)
    assert result.stderr == "" and document["passed"] and document["file"]["path"] == str(tmp_path / "net.onnx")
    quiet = bnfold("export", f"{nets}:chatty", "-o", tmp_path / "net.onnx", "-q")
    assert (quiet.stdout, quiet.stderr, quiet.exit_code) == ("", "", 0)


def test_the_report_file_is_the_json(nets: Path, tmp_path: Path) -> None:
    result = bnfold("inspect", f"{nets}:small", "--json", "--report", tmp_path / "r.json")
    stored, printed = json.loads((tmp_path / "r.json").read_text()), json.loads(result.stdout)
    assert stored == printed and stored["plan"]["ledger"]["entries"]


def test_a_reader_that_leaves_early_changes_nothing(nets: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bnfold", "inspect", f"{nets}:small"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=600)
    os.close(write)
    assert done.returncode == 0
    assert all(" ... " in line for line in done.stderr.splitlines()), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_an_error(nets: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bnfold", "inspect", f"{nets}:small", "-v"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 6 and done.stderr.splitlines()[-1].startswith("error: the report could not be printed")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_is_one_line_and_130(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nopen(__file__ + '.began', 'w').close()\ntime.sleep(900)\n")
    command = [sys.executable, "-m", "bnfold", "export", f"{slow}:make", "-o", str(tmp_path / "net.onnx")]
    # A shell starts its background jobs with interrupts ignored, and children inherit that.
    started = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes, **started) as running:
        try:
            for _ in range(6000):
                if (tmp_path / "slow.py.began").exists():
                    break
                time.sleep(0.1)
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=600)
        finally:
            running.kill()
    assert (running.returncode, out, err) == (130, "", "error: interrupted\n")
    assert not (tmp_path / "net.onnx").exists()


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_is_there_without_torch_or_onnx() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir', 'numpy'}"
    for command in ((), *((name,) for name in COMMANDS)):
        script = (
            f"import sys\nfrom bnfold.cli import cli\n"
            f"try: cli([*{command!r}, '--help'])\n"
            f"except SystemExit as end: code = end.code\n"
            f"print(code, sorted({heavy} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.stdout.splitlines()[-1] == "0 []", done
        if not command:
            assert "Usage" in done.stdout


def test_help_lists_commands_exit_codes_and_kinds_of_source() -> None:
    text = passes("--help")
    assert all(re.search(rf"^ +{code} +{re.escape(meaning)}$", text, re.M) for code, meaning in EXIT_CODES.items())
    assert all(re.search(rf"^  {name} ", text, re.M) for name in COMMANDS) and set(COMMANDS) == set(cli.commands)
    assert all(kind in text for kind in ("file.py:factory", "pkg.module:factory", "net.pt2", "timm:", "hf:"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_explains_itself(name: str) -> None:
    text = " ".join(passes(name, "--help").split())
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help and " ".join(parameter.help.split())[:30] in text
            assert max(parameter.opts, key=len) in text


def test_python_m_bnfold_is_the_command_line() -> None:
    done = process("--version")
    assert done.returncode == 0 and __version__ in done.stdout
    assert shutil.which("bnfold", path=str(Path(sys.executable).parent))


# -- rendering ---------------------------------------------------------------------------------------------------------

BRACKETS = "net[bold]s.py:make[/x]"
LEFT = Entry(
    "mul", "blocks[red].0.norm_of_the_second_branch", "BatchNorm2d", "batch_norm", "left",
    refusals=(Refusal("nonlinear", "blocks.0.act[x]", "aten.gelu"), Refusal("several-readers", "head", "aten.add")),
)  # fmt: skip
BARE = Entry("add_3", "", "", "add", "left", refusals=(Refusal("model-output", ""),))
CHECK = CheckReport(
    "fail", "CPUExecutionProvider", 16, (1, 2, 7),
    (OutputResult("ONNX Runtime", "out[0]", 1.23456e-7, 4.56789e-3, 37000.5, 5e4, 16),
     OutputResult("folded torch", "out[0]", 1.23456e-7, 1e-7, 0.9, 1.0, 16)),
    problems=tuple(f"problem number {i}" for i in range(12)),
)  # fmt: skip
REPORT = ExportReport(
    {"source": BRACKETS, "weights": "w[1].pt", "parameters": 1_234_567}, Ledger((LEFT, BARE)), CHECK, None, (12, 12)
)


def shown(report: ExportReport, width: int, monkeypatch: pytest.MonkeyPatch, *, verbose: bool = False) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    return render.text(
        lambda page: render.printed(report, page, destination="out.onnx", verbose=verbose),
        sys.stdout,
    )


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120, 200])
def test_lines_wrap_without_cutting_a_number_or_a_name(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(REPORT, width, monkeypatch)
    copied = [line for line in text.splitlines() if line.lstrip().startswith(("python -m bnfold", "bnfold."))]
    assert len(copied) == len(next_steps(REPORT)) > 0, "what is to be copied is in one piece"
    assert all(len(line) <= width for line in text.splitlines() if line not in copied)
    assert all(re.fullmatch(r" {9}|[A-Z][a-z]+ +", line[:9]) for line in text.splitlines()), text
    words = " ".join(text.split())
    for whole in (BRACKETS, "w[1].pt", "1.23 M parameters", "noise 1.2e-07", "error 4.6e-03", "(limit 4) FAIL",
                  "ratio 3.7e+04", "nonlinear", "several-readers"):  # fmt: skip
        assert whole in words, text
    if width >= 60:
        assert "blocks[red].0.norm_of_the_second_branch" in words and "blocks.0.act[x] (aten.gelu)" in words


def test_bare_affines_are_summed_up_and_listed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    brief, full = (shown(REPORT, 120, monkeypatch, verbose=verbose) for verbose in (False, True))
    assert "0 of 1 other multiplications and additions" in brief and "add_3" not in brief and "add_3" in full
    assert "folded torch" not in brief and "folded torch" in full
    assert "problem number 11" not in brief and "4 more problems" in brief and "problem number 11" in full


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b[" not in shown(REPORT, 80, monkeypatch)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;31m" in shown(REPORT, 80, monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in shown(REPORT, 80, monkeypatch)


@pytest.mark.parametrize(
    ("size", "text"), [(397, "397 bytes"), (1000, "1 KB"), (248_787, "249 KB"), (999_999, "1000 KB"), (1.2e9, "1.2 GB")]
)
def test_sizes(size: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    report = replace(REPORT, check=None, file=FileReport("n.onnx", int(size), 1, 20, 0))
    assert f"{text}, opset 20, 1 operator\n" in shown(report, 120, monkeypatch)


def test_a_bar_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, render.Progress(terminal, quiet=False) as progress:
        progress("load", 0, 1)
        progress("check", 0, 1)
        progress("truth", 1, 4)
        progress._bar.refresh()
    seen = ""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(leader, 65536):
            seen += chunk.decode()
    os.close(leader)
    assert "check: truth" in seen and "\x1b[" in seen and "load ..." not in seen


def test_numbers_of_the_data_reach_the_gate(nets: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input=np.random.default_rng(0).normal(size=(20, 3, 6, 6)).astype(np.float32))
    document = json.loads(passes("fold", f"{nets}:small", "--data", tmp_path / "d.npz", "--dry-run", "--json"))
    assert document["check"]["samples"] >= 10 and document["check"]["passed"]
