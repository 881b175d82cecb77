"""Checkpoints and models as training code leaves them: unwrapped, renamed, and what is left out is told."""

from __future__ import annotations

import datetime
import enum
import functools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bnfold
from bnfold.cli import cli
from bnfold.errors import InputError, UsageError
from bnfold.graph.wrapped import unwrapped
from bnfold.loading import checkpoint, fitting, inert
from bnfold.loading.load import load
from bnfold.loading.source import Request

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, *, bias: bool = True, track: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, track_running_stats=track))
        self.head = nn.Linear(8, 3)
        self.example_inputs = (torch.zeros(2, 3, 8, 8),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.backbone(x).mean((2, 3)))
        return y


class Nested(nn.Module):
    """Has a part called model, as wrappers call what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.zeros(2, 2))


def weights(seed: int = 1, prefix: str = "", model: Callable[[], nn.Module] = Net) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"{prefix}{key}": value for key, value in model().state_dict().items()}


def save(content: Any, path: Path, **more: Any) -> Path:
    torch.save(content, path, **more)
    return path


def load_weights(model: nn.Module, path: Path, **options: Any) -> list[str]:
    """As for a source whose code has built ``model``."""
    return fitting.load_weights(model, Request("", weights=path, **options))


def fits(content: Any, tmp_path: Path, *, model: nn.Module | None = None, seed: int = 1, **more: Any) -> list[str]:
    model = Net() if model is None else model
    left = load_weights(model, save(content, tmp_path / "w.pt"), **more)
    wanted = weights(seed, model=type(model))
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    return left


# ---- names -----------------------------------------------------------------------------------------------------------

RENAMED: dict[str, tuple[Any, list[str]]] = {
    "parallel": (weights(prefix="module."), []),
    "compiled": (weights(prefix="_orig_mod."), []),
    "both": (weights(prefix="module._orig_mod."), []),
    "both, in Lightning": (weights(prefix="model.module._orig_mod."), []),
    "a compiled part": ({n.replace("backbone.", "backbone._orig_mod."): v for n, v in weights().items()}, []),
    "a parallel part": ({n.replace("backbone.", "backbone.module."): v for n, v in weights().items()}, []),
    "a loss beside": ({**weights(prefix="model."), "criterion.weight": torch.ones(3)}, ["criterion.weight"]),
    "averaged": (AveragedModel(Net()).state_dict() | weights(prefix="module."), ["n_averaged"]),
    "preprocessing": ({**weights(), "pre.mean": torch.zeros(3)}, ["pre.mean"]),
    "counted": ({**weights(), "backbone.0.total_ops": torch.zeros(1), "epoch": 3}, ["backbone.0.total_ops", "epoch"]),
    "as they are, and wrapped": ({**weights(), **weights(2, "module.")}, list(weights(prefix="module."))),
}


@pytest.mark.parametrize("case", RENAMED)
def test_names_that_wrappers_made_fit_and_the_rest_is_told(case: str, tmp_path: Path) -> None:
    content, left = RENAMED[case]
    assert fits(content, tmp_path) == left
    if left:  # the twins
        with pytest.raises(InputError, match=r"none of the model's.*--strict"):
            load_weights(Net(), tmp_path / "w.pt", strict=True)
        patterns = ["criterion.*", "n_averaged", "pre.*", "*.total_ops", "epoch", "module.*"]
        if case != "averaged":
            assert fits(content, tmp_path, strict=True, ignore=patterns) == []


def test_a_part_of_the_models_own_is_no_wrapper(tmp_path: Path) -> None:
    for prefix in ("", "module.", "_orig_mod.", "module.model."):
        model = Nested()
        assert fits(weights(prefix=prefix, model=Nested), tmp_path, model=model) == []
    with pytest.raises(InputError, match="missing"):
        load_weights(Nested(), save({"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2)}, tmp_path / "w.pt"))


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_what_a_layer_is_built_without_is_no_extra(prefix: str, tmp_path: Path) -> None:
    """Left out, a bias or the running statistics would change what the model computes, and no gate could tell."""
    path = save(weights(prefix=prefix), tmp_path / "w.pt")
    for model, name in ((Net(bias=False), "backbone.0.bias"), (Net(track=False), "running_mean")):
        with pytest.raises(InputError, match=rf"built without what the weights hold: .*{name}.*--ignore"):
            load_weights(model, path)
    assert load_weights(Net(bias=False), path, ignore=["*backbone.0.bias"]) == []


def test_a_missing_key_stays_an_error(tmp_path: Path) -> None:
    for prefix in ("", "module."):
        state = weights(prefix=prefix)
        del state[f"{prefix}head.bias"]
        with pytest.raises(InputError, match="missing"):
            load_weights(Net(), save(state, tmp_path / "w.pt"), ignore=["head.bias"])


def test_what_is_left_out_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save({"state_dict": {**weights(prefix="model."), "criterion.weight": torch.ones(3)}}, tmp_path / "w.ckpt")
    source = [f"{Path(__file__)}:Net", "--weights", "w.ckpt"]
    result = CliRunner().invoke(cli, ["inspect", *source])
    assert result.exit_code == 0 and "left out of the weights" in result.stdout and "criterion.weight" in result.stdout
    result = CliRunner().invoke(cli, ["inspect", *source, "--json"])
    assert json.loads(result.stdout)["source"]["left_out"] == ["criterion.weight"]
    result = CliRunner().invoke(cli, ["export", *source, "--strict", "-o", "x.onnx"])
    assert result.exit_code == 3 and "criterion.weight" in result.stderr
    result = CliRunner().invoke(cli, ["inspect", *source, "--ignore", "criterion.*", "--strict"])
    assert "left out" not in result.stdout


# ---- what is beside the weights --------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Config(dict):  # type: ignore[type-arg]
    pass


class Rows(list):  # type: ignore[type-arg]
    pass


class Slotted:
    __slots__ = ("x",)


def slotted() -> Slotted:
    made = Slotted()
    made.x = 3
    return made


HARMLESS: dict[str, Any] = {
    "a scalar of NumPy": np.float64(0.9),
    "an array": np.arange(6.0).reshape(2, 3),
    "an array of texts": np.array(["a", "b"]),
    "an array of objects": np.array([{}, None]),
    "a path": pathlib.PurePosixPath("/d"),
    "an enum": Colour.RED,
    "a dict's child": Config(lr=0.1, inner=Config(a=1)),
    "a list's child": Rows([1, 2]),
    "a default": defaultdict(list, a=[1]),
    "slots": slotted(),
    "a date": datetime.datetime(2020, 1, 1),
    "a function": functools.partial(print, "never"),
    "a class": Config,
    "a set": {1, 2},
    "a complex number": 1 + 2j,
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_extras_are_read_without_running_anything(case: str, legacy: bool, tmp_path: Path) -> None:
    content = {"hyper_parameters": HARMLESS[case], "best": [HARMLESS[case]], "state_dict": weights()}
    path = save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert load_weights(Net(), path) == []


def test_arrays_are_weights(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in weights().items()}
    arrays["backbone.0.weight"] = np.asfortranarray(arrays["backbone.0.weight"])
    arrays["head.weight"] = arrays["head.weight"].astype(">f4")
    arrays["backbone.1.num_batches_tracked"] = np.int64(0)  # type: ignore[assignment]
    assert fits({"model": arrays}, tmp_path) == []


def test_an_absent_class_is_a_stub_and_with_its_package_missing_no_damage(tmp_path: Path) -> None:
    module = types.ModuleType("absent_library")
    module.Config = type("Config", (), {"__module__": "absent_library"})  # type: ignore[attr-defined]
    sys.modules["absent_library"] = module
    try:
        made = module.Config()
        made.lr = 0.1
        path = save({"cfg": made, "state_dict": weights()}, tmp_path / "w.ckpt")
    finally:
        del sys.modules["absent_library"]
    assert load_weights(Net(), path) == []
    with pytest.raises(InputError, match=r"absent_library.*Install it") as caught:
        load_weights(Net(), path, unsafe_pickle=True)
    assert "checksum" not in str(caught.value)


class Gadget:
    """Whatever a pickle can ask to be called with what."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_no_gadget_runs(legacy: bool, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    of_no_data = [
        Gadget(exec, f"open({str(trap)!r}, 'w').close()"), Gadget(open, str(trap), "w"), Gadget(os.mkdir, str(trap)),
        Gadget(subprocess.Popen, ["touch", str(trap)]),
        Gadget(pickle.loads, pickle.dumps(Gadget(Path.touch, trap))),
    ]  # fmt: skip
    inert_beside_weights = [
        Gadget(Path.touch, trap), Gadget(getattr, trap, "touch"), Gadget(map, Path.touch, [trap]),
        Gadget(np.save, str(trap), 1), Gadget(torch.save, 1, str(trap)),
        Gadget(torch.hub.download_url_to_file, "file:///etc/hostname", str(trap)),
        Gadget(np.memmap, str(trap), "f4", "w+", 0, (4,)),
    ]  # fmt: skip
    for gadget in (*of_no_data, *inert_beside_weights):
        path = save(
            {"state_dict": weights(), "x": gadget}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy
        )
        if gadget in of_no_data:
            with pytest.raises(InputError, match="--unsafe-pickle"):
                load_weights(Net(), path)
        else:
            assert load_weights(Net(), path) == []
        with pytest.raises(InputError, match="--unsafe-pickle"):
            load_weights(Net(), save(gadget, path, _use_new_zipfile_serialization=not legacy))
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("trap")]


def test_a_stub_does_nothing() -> None:
    stub = inert._stub("a.b.C")
    made = stub(1, two := [])
    made.__setstate__({"x": 1})
    assert made.state == {"x": 1} and stub.__module__ == "a.b" and not two


# ---- whole modules, shards, folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"epoch": 1, "model": m, "ema": None}])
def test_a_whole_module_gives_its_weights(wrap: Callable[[Any], Any], unsafe: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert fits(wrap(Net()), tmp_path, unsafe_pickle=unsafe) == []


def test_a_whole_module_is_picked_by_key(tmp_path: Path) -> None:
    path = str(save({"model": Net(), "ema": Net().half()}, tmp_path / "last.pt"))
    with pytest.raises(InputError, match=r"several models: model, ema.*--weights-key model"):
        load(path, unsafe_pickle=True)
    picked = load(path, weights_key="ema", unsafe_pickle=True).model
    assert isinstance(picked, Net) and picked.head.weight.dtype is torch.float16
    with pytest.raises(UsageError, match=r"need --weights.*--unsafe-pickle"):
        load(path, weights_key="ema")
    with pytest.raises(InputError, match=r"Net.*--unsafe-pickle"):
        load(path)


def shards(folder: Path, *, save_one: Callable[[dict[str, torch.Tensor], Path], Any], suffix: str) -> Path:
    state = weights()
    names = list(state)
    parts = {f"model-{i}-of-2.{suffix}": keys for i, keys in ((1, names[:3]), (2, names[3:]))}
    for part, keys in parts.items():
        save_one({key: state[key] for key in keys}, folder / part)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {k: part for part, keys in parts.items() for k in keys}})
    )
    return index


@pytest.mark.parametrize(("suffix", "write"), [("safetensors", safetensors.torch.save_file), ("bin", torch.save)])
def test_shards_by_their_index_and_by_their_folder(suffix: str, write: Any, tmp_path: Path) -> None:
    index = shards(tmp_path, save_one=write, suffix=suffix)
    for path in (index, checkpoint.resolve(tmp_path)):
        model = Net()
        assert load_weights(model, path) == [] and torch.equal(model.head.weight, weights()["head.weight"])
    before = checkpoint.sha256(index)
    next(tmp_path.glob(f"*1-of-2.{suffix}")).unlink()
    with pytest.raises(InputError, match="no such file"):
        load_weights(Net(), index)
    assert len(before) == 64


@pytest.mark.parametrize("name", ["../w.bin", "/etc/passwd", "sub/w.bin", "x.index.json", "", "..", "absent.bin"])
def test_an_index_names_files_beside_it_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "w.bin", folder / "sub" / "w.bin"):
        save(weights(), path)
    index = folder / "x.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights(), name)}))
    with pytest.raises(InputError, match=r"no file beside it|no such file"):
        load_weights(Net(), index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.index.json").write_text(text)
    with pytest.raises(InputError, match="no index of shards"):
        load_weights(Net(), tmp_path / "x.index.json")


def test_a_folder_must_hold_one_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds none"):
        checkpoint.resolve(tmp_path)
    save(weights(), tmp_path / "a.pt")
    assert checkpoint.resolve(tmp_path).name == "a.pt"
    save(weights(), tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"a.pt, b.pt"):
        checkpoint.resolve(tmp_path)


# ---- models ----------------------------------------------------------------------------------------------------------


def compiled_part() -> nn.Module:
    model = Net()
    model.backbone = torch.compile(model.backbone)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: torch.compile(Net()), lambda: nn.DataParallel(Net()), lambda: AveragedModel(Net()), compiled_part,
        lambda: nn.DataParallel(torch.compile(Net())),
    ],
)  # fmt: skip
def test_wrapped_models_are_unwrapped_and_stay_as_they_are(wrap: Callable[[], nn.Module]) -> None:
    model = wrap().eval()
    names = [name for name, _ in model.named_modules()]
    assert list(unwrapped(model).state_dict()) == list(Net().state_dict())
    x = torch.randn(3, 3, 8, 8)
    folded = bnfold.fold(model, (x,))
    assert folded.ledger.count() == (1, 1)
    assert isinstance(folded.apply_to(model), Net)
    assert bnfold.inspect(model, (x,)).norms[0].module == "backbone.1"
    assert [name for name, _ in model.named_modules()] == names


def test_what_is_not_wrapped_is_itself() -> None:
    model = Nested()
    assert unwrapped(model) is model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_and_a_float_input_are_told_apart(dtype: torch.dtype) -> None:
    model, x = Net().to(dtype), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"float16.*float32.*--dtype float32"):
        bnfold.fold(model, (x,))
    assert bnfold.fold(model, (x,), dtype=torch.float32).ledger.count() == (1, 1)
    assert bnfold.fold(model, (x.to(dtype),)).ledger.count() == (1, 1)

    class Casts(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.head.weight.dtype))

    assert bnfold.fold(Casts().to(dtype), (x,)).ledger.count() == (1, 1)


def test_keys_in_their_order_and_versions_go_along(tmp_path: Path) -> None:
    state = nn.DataParallel(Net()).state_dict()
    del state["module.backbone.1.num_batches_tracked"]
    with pytest.raises(InputError, match="num_batches_tracked"):
        load_weights(Net(), save(state, tmp_path / "w.pt"))
    state._metadata["module.backbone.1"]["version"] = 1  # type: ignore[attr-defined]
    assert load_weights(Net(), save(state, tmp_path / "w.pt")) == []
    assert isinstance(state, OrderedDict)
