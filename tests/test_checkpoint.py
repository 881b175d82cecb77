import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from bnfold.errors import InputError
from bnfold.loading import checkpoint, fitting
from bnfold.loading.checkpoint import Kind, identify, unpickle, verify_archive
from bnfold.loading.source import Request

torch.set_num_threads(1)


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, width, 3), bn=nn.BatchNorm2d(width), head=nn.Linear(width, 2)))


def weights(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"{prefix}{key}": value for key, value in net().state_dict().items()}


def holds(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Payload:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def save(content: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def load_weights(model: nn.Module, path: Path, **options: Any) -> list[str]:
    """As for a source whose code has built ``model``."""
    return fitting.load_weights(model, Request("", weights=path, **options))


# ---- good files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path: Path, name: str, legacy: bool) -> None:
    model, path = net(), save(weights(1), tmp_path / name, legacy=legacy)
    assert identify(path) is (Kind.LEGACY if legacy else Kind.TORCH)
    load_weights(model, path)
    assert holds(model, weights(1))
    assert model.training


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(weights(1), path, metadata={"epoch": "3"})
    model = net()
    load_weights(model, path)
    assert identify(path) is Kind.SAFETENSORS
    assert holds(model, weights(1))


def test_the_file_is_not_held_by_the_model(tmp_path: Path) -> None:
    path = save(weights(1), tmp_path / "w.pt")
    model = net()
    load_weights(model, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert holds(model, weights(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights(1).items()}
    model = net()
    load_weights(model, save(half, tmp_path / "w.pt"))
    assert model.conv.weight.dtype is torch.float32
    assert torch.equal(model.conv.weight, half["conv.weight"].float())


@pytest.mark.parametrize(
    "wrap",
    [
        *[lambda state, key=key: {key: state, "epoch": 3} for key in checkpoint.WRAPPERS],
        lambda state: {"state_dict": {"module": state}},
        lambda state: {"state_dict": state, "epoch": torch.tensor(3), "optimizer": {"state": {0: {}}, "lr": 0.1}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, arch="net")},
        lambda state: {"model": OrderedDict(state), "ema": None, "best": 0.5},
        lambda state: {"model": state, "exp_avg": dict(state)},
        lambda state: {"model": state, "ema": {"decay": torch.tensor(0.9)}},
    ],
)
def test_wrapped_weights_are_found(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = net()
    load_weights(model, save(wrap(weights(1)), tmp_path / "w.pt"))
    assert holds(model, weights(1))


@pytest.mark.parametrize(
    ("key", "seed"), [("model", 1), ("ema.module", 2), ("ema", 2), ("mine", 3), ("a.b.deep", 4), ("state.0", 5)]
)
def test_a_key_picks_the_weights(tmp_path: Path, key: str, seed: int) -> None:
    content = {
        "model": weights(1),
        "ema": {"module": weights(2)},
        "mine": weights(3),
        "a.b": {"deep": weights(4)},
        "state": {"0": weights(5)},
    }
    model = net()
    load_weights(model, save(content, tmp_path / "w.pt"), weights_key=key)
    assert holds(model, weights(seed))


@pytest.mark.parametrize("prefix", ["a.b.", "online_model.", "net."])
def test_a_prefix_is_stripped_when_asked_and_offered_when_not(tmp_path: Path, prefix: str) -> None:
    path = save(weights(1, prefix), tmp_path / "w.pt")
    with pytest.raises(InputError) as caught:
        load_weights(net(), path)
    assert str(caught.value).endswith(f"--strip-prefix {prefix} makes it fit")
    model = net()
    load_weights(model, path, strip_prefix=prefix)
    assert holds(model, weights(1))


def test_stripping_keeps_the_versions_of_the_modules(tmp_path: Path) -> None:
    state = nn.DataParallel(net()).state_dict()
    del state["module.bn.num_batches_tracked"]
    path = save(state, tmp_path / "w.pt")
    # A BatchNorm that says it is of the version with a counter must bring one.
    with pytest.raises(InputError, match=r"num_batches_tracked"):
        load_weights(net(), path, strip_prefix="module.")
    state._metadata["module.bn"]["version"] = 1  # type: ignore[attr-defined]
    load_weights(net(), save(state, path), strip_prefix="module.")


def test_old_batch_norm_without_a_counter(tmp_path: Path) -> None:
    state = weights(1)
    del state["bn.num_batches_tracked"]
    model = net()
    load_weights(model, save(state, tmp_path / "w.pt"))
    assert torch.equal(model.bn.weight, state["bn.weight"])
    del state["bn.running_mean"]
    with pytest.raises(InputError, match=r"1 missing: bn.running_mean \(4,\)"):
        load_weights(net(), save(state, tmp_path / "w.pt"))


class Renaming(nn.Module):
    """Translates an old key, as torch's own modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}new"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_modules_own_translation_of_old_keys_runs(tmp_path: Path) -> None:
    model = Renaming()
    load_weights(model, save({"old": torch.ones(2)}, tmp_path / "w.pt"))
    assert torch.equal(model.new, torch.ones(2))


class Stateful(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_extra_state_is_part_of_a_state_dict(tmp_path: Path) -> None:
    model = Stateful(2, 2)
    load_weights(model, save(Stateful(2, 2).state_dict(), tmp_path / "w.pt"))
    assert model.calls == 3


def test_lazy_modules_take_the_shapes_of_their_weights(tmp_path: Path) -> None:
    model = nn.LazyLinear(2)
    load_weights(model, save(nn.Linear(5, 2).state_dict(), tmp_path / "w.pt"))
    assert model.weight.shape == (2, 5)


# ---- weights that do not fit -----------------------------------------------------------------------------------------


def edited(**changes: Any) -> dict[str, Any]:
    state = {**weights(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


MISFITS: list[tuple[Any, dict[str, Any], str]] = [
    (edited(conv__weight=torch.zeros(5, 3, 3, 3)), {}, r"conv.weight \(5, 3, 3, 3\) instead of \(4, 3, 3, 3\)"),
    (edited(extra=torch.zeros(2), head__bias=None), {}, r"1 missing: .*; 1 unexpected: extra .*Check that the model"),
    (edited(extra=torch.zeros(2)), {"strict": True}, r"1 keys of the weights are none of the model's: extra.*--ignore"),
    (edited(head__bias=None), {}, r"1 missing: head.bias \(2,\)"),
    (edited(**{f"x{i}": torch.zeros(1) for i in range(9)}), {"strict": True}, r"9 keys .*: x0, x1, x2, \.\.\.\."),
    (edited(conv__weight=3), {}, r"conv.weight int instead of \(4, 3, 3, 3\)"),
    (edited(head__bias="text"), {}, r"head.bias str instead of \(2,\)"),
    ({"other": torch.zeros(1)}, {}, "8 missing"),
    ({**weights(0, "module."), **weights(1, "model.")}, {}, "--strip-prefix model. or module. makes it fit"),
    ({**weights(0, "a."), **weights(1, "b.")}, {}, "--strip-prefix a. or b. makes it fit"),
    (weights(), {"strip_prefix": "module."}, "no key of the weights begins with 'module.'. The first key is 'conv"),
    ({**weights(), **weights(1, "m.")}, {"strip_prefix": "m."}, "two keys become one"),
    ({"model": weights(), "ema": weights(1)}, {}, "several .* fit the model: model, ema. Pick .* --weights-key model"),
    ({"model": weights(0, "module."), "ema": weights(1)}, {}, "several .* fit the model: model, ema"),
    ({"all": {"model": weights(), "ema": weights(1)}}, {"weights_key": "all"}, "several .* --weights-key all.model"),
    ({"model": {"a": torch.ones(1)}, "ema": {"b": torch.ones(1)}}, {}, "none .* fits the model: model, ema"),
    ({"mine": weights()}, {}, "no state dict here: the content holds 'mine'.*--weights-key"),
    ({"model": weights()}, {"weights_key": "ema"}, "no key 'ema' in the checkpoint. It has model"),
    ({"model": weights()}, {"weights_key": "model.deep"}, "no key 'deep'"),
    ({"model": weights(), "epoch": 3}, {"weights_key": "epoch"}, "no state dict here: the content is no mapping"),
    ({"epoch": 3}, {"weights_key": "epoch.x"}, "no key 'x': the entry is a int"),
    ({}, {}, "no state dict here"),
    ({0: torch.zeros(1)}, {}, "no state dict here"),
    ([torch.zeros(1)], {}, r"no state dict here: the content is no mapping \(list\)"),
    (torch.zeros(3), {}, r"no mapping \(Tensor\)"),
]


@pytest.mark.parametrize(("content", "options", "says"), MISFITS)
def test_weights_that_do_not_fit(tmp_path: Path, content: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_weights(net(), save(content, tmp_path / "w.pt"), **options)


# ---- files that are not what they should be --------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
FOREIGN: list[tuple[str, bytes, str]] = [
    ("w.pt", b"", "the file is empty"),
    ("w.pt", LFS, "git-lfs pointer.*git lfs pull"),
    ("w.pt", b"<!DOCTYPE html><html></html>", "web page"),
    ("w.pt", b"\n <html>", "web page"),
    ("w.pt", b"hello, world\n", "a text file"),
    ("w.pt", "grüße ".encode() * 100, "a text file"),
    ("w.pt", b"\x89PNG\r\n\x1a\n\0\0", "PNG image"),
    ("w.pt", b"\xff\xd8\xff\xe0", "JPEG image"),
    ("w.pt", b"\x89HDF\r\n\x1a\n\0", "HDF5"),
    ("w.bin", b"GGUF\3\0\0\0", "GGUF"),
    ("w.pt", b"\x1f\x8b\x08\0", "gzip"),
    ("w.pt", b"\x93NUMPY\1\0", "a NumPy array"),
    ("w.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX file"),
    ("w.h5", b"\0\1\2", "HDF5"),
    ("w.keras", b"PK\x03\x04", "Keras"),
    ("w.tflite", b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
    ("w.pb", b"\n\x0b\n\1x", "TensorFlow"),
    ("w.pkl", pickle.dumps({"a": 1}), "plain pickle"),
    ("w.pt", bytes(range(128, 256)), "unknown or damaged"),
    ("w.pt", b"PK\x03\x04" + b"\0" * 60, "cut short or damaged"),
    ("w.safetensors", (10**12).to_bytes(8, "little") + b'{"a":', "header is cut short or damaged"),
    ("w.safetensors", (8).to_bytes(8, "little") + b'{"a": 1}', "safetensors file is cut short or damaged"),
]


@pytest.mark.parametrize(("name", "content", "says"), FOREIGN)
def test_foreign_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        load_weights(net(), path)
    assert caught.value.where == str(path)
    assert caught.value.hint


def test_no_file_at_all(tmp_path: Path) -> None:
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "saved_model.pb").touch()
    for name, says in [("none.pt", "no such file"), ("", "a folder"), ("tf", "TensorFlow SavedModel")]:
        with pytest.raises(InputError, match=says):
            identify(tmp_path / name)


def rezip(path: Path, *, compress: bool = False, add: dict[str, bytes] | None = None, drop: str = "") -> Path:
    """The archive with some members changed."""
    with zipfile.ZipFile(path) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for member, content in members:
            if not drop or drop not in member.filename:
                archive.writestr(member.filename, content)
        for name, content in (add or {}).items():
            archive.writestr(name, content)
    return path


def test_a_compressed_bomb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rezip(save({"w": torch.zeros(1_000_000)}, tmp_path / "w.pt"), compress=True)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was reached"))
    with pytest.raises(InputError, match="compressed members"):
        unpickle(path, identify(path))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Entries of the directory may all point at one member: a bomb without compression."""
    path = save({"w": torch.zeros(1000)}, tmp_path / "w.pt")
    with zipfile.ZipFile(path, "a") as archive:
        member = next(member for member in archive.infolist() if member.filename.endswith("data/0"))
        archive.writestr("w/extra", b"")
        archive.filelist += [member] * 5
    with pytest.raises(InputError, match="more bytes than the file has"):
        verify_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = save(weights(), tmp_path / "w.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/data.pkl", b"")
    with pytest.raises(InputError, match="two members of one name"):
        verify_archive(path)


def test_every_flipped_byte_of_the_tensors_is_seen(tmp_path: Path) -> None:
    path = save({"w": torch.arange(16.0) + 0.5}, tmp_path / "w.pt")
    good = path.read_bytes()
    at = good.index(torch.arange(16.0).add(0.5).numpy().tobytes())
    assert torch.equal(unpickle(path, Kind.TORCH)["w"], torch.arange(16.0) + 0.5)
    for offset in range(0, 64, 7):
        bad = bytearray(good)
        bad[at + offset] ^= 0x10
        path.write_bytes(bad)
        assert torch.load(path)["w"].shape == (16,)  # torch itself sees nothing
        with pytest.raises(InputError, match=r"checksum of .*data/0 is wrong"):
            unpickle(path, Kind.TORCH)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
def test_truncated_torch_files(tmp_path: Path, legacy: bool, part: float) -> None:
    path = save(weights(), tmp_path / "w.pt", legacy=legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(InputError, match=r"cut short|damaged|cannot be loaded"):
        load_weights(net(), path)


@pytest.mark.parametrize("part", [0.01, 0.2, 0.9])
def test_truncated_safetensors(tmp_path: Path, part: float) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(weights(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(InputError, match="cut short or damaged"):
        load_weights(net(), path)


def test_archives_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for member, says in [
        ("x.npy", "a NumPy archive"),
        ("readme.txt", "a zip archive of something else"),
        ("serialized_exported_program.json", "torch 2.7 or older"),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"x")
        with pytest.raises(InputError, match=says):
            identify(path)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_weights(net(), rezip(save(weights(), path), drop="data/0"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_answered_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(net().eval()), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"TorchScript archive.*as the source itself"):
        load_weights(net(), tmp_path / "w.pt")


def test_an_exported_program_is_no_checkpoint(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(2, 2),)), tmp_path / "w.pt2")
    with pytest.raises(InputError, match=r"exported program, not weights\. Give it as the source"):
        load_weights(net(), tmp_path / "w.pt2")


# ---- nothing in a file is executed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"model": weights(), "note": bad}])
def test_a_pickle_runs_no_code_unless_allowed(tmp_path: Path, legacy: bool, wrap: Callable[[Any], Any]) -> None:
    trap = tmp_path / "created"
    path = save(wrap(Payload(trap)), tmp_path / "w.pt", legacy=legacy)
    with pytest.raises(InputError, match=r"posix.open|nt.open") as caught:
        load_weights(net(), path)
    assert "can run any code" in str(caught.value)
    assert "--unsafe-pickle" in str(caught.value)
    assert not trap.exists()
    # The twin: the payload is real, and the flag is what holds it back.
    unpickle(path, identify(path), unsafe=True)
    assert trap.exists()


@pytest.mark.parametrize("unsafe", [False, True])
def test_weights_beside_pickled_objects_load(tmp_path: Path, unsafe: bool) -> None:
    path = save({"model": weights(1), "path": Path("x")}, tmp_path / "w.pt")
    model = net()
    load_weights(model, path, unsafe_pickle=unsafe)
    assert holds(model, weights(1))


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert checkpoint.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")
