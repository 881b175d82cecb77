"""Models by name: what each library is asked for, what its configuration says, and what is said when it is not there.

transformers is real and reads folders that are written here. timm and torchvision are stand-ins with the signatures of
timm 1.0 and torchvision 0.2x, and real models behind them.
"""

from __future__ import annotations

import copy
import enum
import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from zoo import randomize

import bnfold
from bnfold import InputError, ProviderError, UsageError
from bnfold.cli import cli
from bnfold.loading.load import load, put_in_front
from bnfold.loading.source import Normalization

torch.set_num_threads(1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1]}
PREPROCESSOR = {"size": {"shortest_edge": 32}, "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# -- transformers ------------------------------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    classes = {
        "ResNet": SMALL,
        "RegNet": {**SMALL, "groups_width": 4},
        "MobileNetV2": {"depth_multiplier": 0.25},
        "EfficientNet": {
            "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**classes[name])
    return randomize(getattr(transformers, f"{name}ForImageClassification")(config))


def save(model: Any, folder: Path, preprocessor: dict[str, Any] | None = PREPROCESSOR) -> Path:
    model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("ResNet"), tmp_path_factory.mktemp("hub") / "resnet")


@pytest.mark.parametrize(("name", "count"), [("ResNet", 16), ("RegNet", 17), ("EfficientNet", 25)])
def test_a_folder_of_transformers_is_exported_end_to_end(name: str, count: int, tmp_path: Path) -> None:
    folder = save(build(name), tmp_path / "model")
    loaded = load(f"hf:{folder}")
    report = bnfold.export(loaded.model, tmp_path / "net.onnx", loaded.args, loaded.kwargs, device="cpu", seed=1)
    assert report.passed, report.check and report.check.problems
    assert report.ledger.count() == (count, count)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.name for value in graph.input] == ["pixel_values"]
    assert [value.name for value in graph.output] == ["logits"]


def test_a_folder_gives_its_class_its_inputs_and_its_provenance(resnet: Path) -> None:
    loaded = load(f"hf:{resnet}")
    assert type(loaded.model).__name__ == "ResNetForImageClassification" and not loaded.model.training
    assert loaded.args == () and list(loaded.kwargs) == ["pixel_values"]
    assert loaded.kwargs["pixel_values"].shape == (2, 3, 32, 32)
    assert loaded.normalization == Normalization(MEAN, STD)
    assert loaded.provenance.source == "hf:resnet" and loaded.provenance.weights == "model.safetensors"
    assert loaded.provenance.sha256 is not None and len(loaded.provenance.sha256) == 64
    out = loaded.model(**loaded.kwargs)
    assert isinstance(out, dict) and list(out) == ["logits"]
    torch.testing.assert_close(dict(loaded.model.named_parameters()), dict(build("ResNet").named_parameters()))


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        ({"size": 40}, (40, 40)),
        ({"size": [40, 48]}, (40, 48)),
        ({"size": {"height": 40, "width": 48}}, (40, 48)),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}, (32, 32)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, (40, 40)),
        ({"size": {"longest_edge": 40}}, None),
        ({"size": "large"}, None),
        (None, None),
    ],
)
def test_the_size_is_the_preprocessors(preprocessor: Any, size: tuple[int, int] | None, tmp_path: Path) -> None:
    loaded = load(f"hf:{save(build('ResNet'), tmp_path / 'net', preprocessor)}")
    if size is None:
        assert loaded.args is None and not loaded.kwargs
    else:
        assert loaded.kwargs["pixel_values"].shape == (2, 3, *size)
    assert loaded.normalization is None


def test_without_a_preprocessor_the_configuration_says_the_size(tmp_path: Path) -> None:
    assert load(f"hf:{save(build('EfficientNet'), tmp_path, None)}").kwargs["pixel_values"].shape == (2, 3, 32, 32)


def test_inputs_other_than_images(tmp_path: Path) -> None:
    from transformers import ASTConfig, ASTForAudioClassification, BertConfig, BertForSequenceClassification

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForSequenceClassification(BertConfig(vocab_size=30, **tiny))
    ids = load(f"hf:{save(bert, tmp_path / 'bert', None)}").kwargs["input_ids"]
    assert ids.shape == (2, 16) and ids.dtype == torch.int64 and int(ids.max()) < 30
    ast = ASTForAudioClassification(ASTConfig(max_length=64, num_mel_bins=32, patch_size=16, **tiny))
    sound = {"sampling_rate": 16000, "num_mel_bins": 32, "max_length": 64}
    assert load(f"hf:{save(ast, tmp_path / 'ast', sound)}").kwargs["input_values"].shape == (2, 64, 32)
    assert load(f"hf:{save(ast, tmp_path / 'ast2', {'sampling_rate': 100})}").kwargs["input_values"].shape == (2, 100)


def test_arguments_go_to_the_configuration(resnet: Path) -> None:
    fresh = load(f"hf:{resnet}", factory_args={"num_labels": 7, "pretrained": "false"})
    assert fresh.model.classifier[1].out_features == 7  # type: ignore[union-attr]
    assert fresh.provenance.weights is None and fresh.provenance.sha256 is None
    with pytest.raises(InputError, match=r"2 of its weights have another shape: classifier\.1\.bias"):
        load(f"hf:{resnet}", factory_args={"num_labels": 7})
    with pytest.raises(UsageError, match="no 'colour'"):
        load(f"hf:{resnet}", factory_args={"colour": 7})


def test_weights_of_the_users_own(resnet: Path, tmp_path: Path) -> None:
    other = build("ResNet")
    with torch.no_grad():
        other.classifier[1].bias += 1  # type: ignore[union-attr,index]
    torch.save(other.state_dict(), tmp_path / "w.pt")
    loaded = load(f"hf:{resnet}", weights=tmp_path / "w.pt")
    assert torch.equal(loaded.model.classifier[1].bias, other.classifier[1].bias)  # type: ignore[union-attr,index]
    assert loaded.provenance.weights == "w.pt"
    with pytest.raises(UsageError, match="contradict"):
        load(f"hf:{resnet}", weights=tmp_path / "w.pt", factory_args={"pretrained": True})


def test_weights_that_are_missing_are_not_made_up(resnet: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(build("ResNet"), tmp_path / "net")
    state = load_file(folder / "model.safetensors")
    del state["classifier.1.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 of its weights are missing: classifier\.1\.weight"):
        load(f"hf:{folder}")


def test_half_floats_are_widened(tmp_path: Path) -> None:
    folder = save(build("ResNet").bfloat16(), tmp_path / "net")
    loaded = load(f"hf:{folder}")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_folders_that_are_none(tmp_path: Path, resnet: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json in the folder"):
        load(f"hf:{tmp_path / 'empty'}")
    for name in ("./nothing", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(InputError, match="there is no such folder"):
            load(f"hf:{name}")
    folder = save(build("ResNet"), tmp_path / "net")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        load(f"hf:{folder}")
    (folder / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(InputError, match="none-such"):
        load(f"hf:{folder}")


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"code of its own.*path/to/file\.py:factory"):
        load(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()


def test_the_folder_itself_is_no_destination(resnet: Path) -> None:
    before = (resnet / "model.safetensors").read_bytes()
    result = run("fold", f"hf:{resnet}", "--eager", "-o", resnet / "model.safetensors")
    assert result.exit_code == 2 and "the output is the source" in result.stderr
    assert (resnet / "model.safetensors").read_bytes() == before


def test_a_folded_class_goes_through_a_file(resnet: Path, tmp_path: Path) -> None:
    assert run("fold", f"hf:{resnet}", "--eager", "-o", tmp_path / "f.safetensors").exit_code == 0
    result = run("export", f"hf:{resnet}", "--weights", tmp_path / "f.safetensors", "-o", tmp_path / "n.onnx", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["ledger"]["entries"] == []


# -- normalisation -----------------------------------------------------------------------------------------------------


class Unpadded(nn.Module):
    """Takes images; its first convolution pads nothing."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.Linear(4, 2)
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize(("padding", "left"), [(0, 0), (1, 1)])
def test_a_normalisation_folds_where_nothing_is_padded(padding: int, left: int) -> None:
    plain, model, x = Unpadded(padding), Unpadded(padding), torch.rand(2, 3, 8, 8)
    put_in_front(model, Normalization(MEAN, STD), (x,), {}, where="")
    torch.testing.assert_close(model(x), plain(Normalization(MEAN, STD).apply(x)))
    assert list(model.state_dict()) == list(plain.state_dict()) and type(model) is Unpadded
    ledger = bnfold.fold(model, (x,)).ledger
    assert [e.value for e in ledger.entries] == ["sub", "div", "batch_norm"] and len(ledger.left) == left
    reasons = [refusal.reason for entry in ledger.left for refusal in entry.refusals]
    assert reasons == ["model-input", "zero-padding"] * left


def test_the_configurations_normalisation_on_the_command_line(resnet: Path, tmp_path: Path) -> None:
    result = run("export", f"hf:{resnet}", "--normalize", "-v", "-o", tmp_path / "n.onnx")
    assert result.exit_code == 0, result.stderr
    assert "1 of 2 other multiplications" in result.stdout and "zero-padding" in result.stdout
    raw = load(f"hf:{resnet}", normalize=True).kwargs["pixel_values"]
    assert float(raw.min()) + 1e-6 >= 0 and float(raw.max()) <= 1 + 1e-6
    plain = load(f"hf:{resnet}")
    normalized = load(f"hf:{resnet}", normalize=True)
    torch.testing.assert_close(
        normalized.model(pixel_values=raw)["logits"], plain.model(**plain.kwargs)["logits"], rtol=1e-4, atol=1e-5
    )
    failed = run("fold", f"hf:{resnet}", "--normalize", "--eager", "-o", tmp_path / "n.safetensors")
    assert failed.exit_code == 2 and "contradict" in failed.stderr


def test_a_normalisation_by_hand(tmp_path: Path) -> None:
    models = Path(__file__).parent.parent / "models"
    digits = (f"{models / 'digits.py'}:digits_mlp", "--weights", models / "digits_mlp.safetensors")
    result = run("export", *digits, "--mean-std", "0.13/0.31", "-o", tmp_path / "n.onnx")
    assert result.exit_code == 0 and "2 of 2 other multiplications" in result.stdout
    for text, words in {
        "0.5": "there is no slash",
        "a/b": "could not convert",
        "0.5/0": "standard deviations positive",
        "1,2/1,2,3": "do not go together",
    }.items():
        failed = run("export", *digits, "--mean-std", text, "-o", tmp_path / "n.onnx")
        assert failed.exit_code == 2 and words in failed.stderr
    failed = run("export", *digits, "--mean-std", "1,2/1,2", "-o", tmp_path / "n.onnx")
    assert failed.exit_code == 3 and "takes 1 channels and is to be normalised by 2" in failed.stderr
    failed = run("export", *digits, "--normalize", "-o", tmp_path / "n.onnx")
    assert failed.exit_code == 2 and "nothing says how" in failed.stderr
    failed = run("export", models / "digits_mlp.pt2", "--mean-std", "0/1", "-o", tmp_path / "n.onnx")
    assert failed.exit_code == 2 and "cannot be normalised" in failed.stderr


def test_only_images_are_normalised() -> None:
    class Two(nn.Module):
        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return ids.float().mean() + x

    ids, x = torch.ones(2, 3, dtype=torch.int64), torch.rand(2, 3, 4, 4)
    model = Two()
    put_in_front(model, Normalization((0.5,), (2.0,)), (ids, x), {}, where="")
    torch.testing.assert_close(model(ids, x=x), 1 + (x - 0.5) / 2)
    with pytest.raises(InputError, match="takes no images"):
        put_in_front(nn.Linear(3, 3), Normalization((0.5,), (2.0,)), (torch.rand(2, 3),), {}, where="")


def test_a_name_that_is_taken_stays() -> None:
    model = Unpadded()
    model.normalize_std = 3.0  # type: ignore[assignment]
    put_in_front(model, Normalization(MEAN, STD), (torch.rand(2, 3, 8, 8),), {}, where="")
    assert model.normalize_std == 3.0 and model.normalize_input_std.flatten().tolist() == pytest.approx(STD)


class Children(nn.Module):
    """Calls whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


ROOTS: dict[str, Callable[[], nn.Module]] = {
    "Sequential": sequential,
    "its own children": Children,
    "GraphModule": lambda: torch.fx.symbolic_trace(sequential()),
}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_normalisation_is_nobodys_child(root: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, x = randomize(ROOTS[root]()).eval(), torch.rand(2, 3, 8, 8)
    expected = plain((x - 0.5) / 0.25)
    names = [name for name, _ in plain.named_modules()]
    model, keys = copy.deepcopy(plain), list(plain.state_dict())
    put_in_front(model, Normalization((0.5,), (0.25,)), (x,), {}, where="")
    assert torch.equal(model(x), expected) and not torch.allclose(model(x), plain(x))
    assert [name for name, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    report = bnfold.export(model, tmp_path / "n.onnx", (x,), dtype=dtype)
    assert report.passed and not report.ledger.left and report.ledger.count() == (1, 1)
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.to(dtype).numpy()})
    # Normalised once, not twice and not at all: those are far away. How near it must be is the gate's to say.
    expected, twice = expected.detach(), plain((((x - 0.5) / 0.25) - 0.5) / 0.25).detach()
    wrong = min(float((other - expected).abs().max()) for other in (twice, plain(x).detach()))
    assert float((torch.tensor(found).float() - expected).abs().max()) < wrong / 30


# -- timm --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """``timm`` and ``timm.data``; yields the calls of ``create_model``."""
    calls: list[dict[str, Any]] = []
    package, data = ModuleType("timm"), ModuleType("timm.data")

    def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        calls.append({"model_name": model_name, "pretrained": pretrained, **kwargs})
        if "colour" in kwargs:
            raise TypeError("ResNet.__init__() got an unexpected keyword argument 'colour'")
        model = Unpadded()
        model.pretrained_cfg = {  # type: ignore[assignment]
            "input_size": (3, 24, 24), "mean": MEAN, "std": STD, "num_classes": 2, "tag": "a1_in1k",
        }  # fmt: skip
        return model

    def resolve_model_data_config(
        model: nn.Module, args: Any = None, pretrained_cfg: Any = None, **_: Any
    ) -> dict[str, Any]:
        known: Any = model.pretrained_cfg
        return {name: known[name] for name in ("input_size", "mean", "std")} | {"interpolation": "bicubic"}

    package.create_model = create_model  # type: ignore[attr-defined]
    package.list_models = lambda filter="", **_: ["resnet18", "resnet50", "convnext_tiny"]  # type: ignore[attr-defined]
    data.resolve_model_data_config = resolve_model_data_config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    yield calls


def test_timm(timm: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("export", "timm:resnet18", "--normalize", "-o", tmp_path / "n.onnx")
    assert result.exit_code == 0, result.stderr
    assert timm == [{"model_name": "resnet18", "pretrained": False}]
    shape = [d.dim_value for d in onnx.load(tmp_path / "n.onnx").graph.input[0].type.tensor_type.shape.dim]
    assert shape[1:] == [3, 24, 24]
    assert "2 of 2 other multiplications" in result.stdout


def test_timm_with_options(timm: list[dict[str, Any]]) -> None:
    loaded = load("timm:resnet18.a1_in1k", factory_args={"pretrained": "true", "num_classes": 2})
    assert timm == [{"model_name": "resnet18.a1_in1k", "pretrained": True, "num_classes": 2}]
    assert loaded.provenance.weights == "a1_in1k" and loaded.provenance.source == "timm:resnet18.a1_in1k"
    assert loaded.args is not None and loaded.args[0].shape == (2, 3, 24, 24)
    assert loaded.normalization == Normalization(MEAN, STD)
    grey = load("timm:resnet18", factory_args={"in_chans": 1, "img_size": 16})
    assert grey.args is not None and grey.args[0].shape == (2, 1, 16, 16) and grey.normalization is None


def test_timm_knows_its_names(timm: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"no such model\. Did you mean resnet"):
        load("timm:resnet19")
    with pytest.raises(InputError, match=r"TypeError: ResNet.*'colour'"):
        load("timm:resnet18", factory_args={"colour": 3})
    load("timm:hf-hub:timm/resnet18.a1_in1k")
    assert timm[-1]["model_name"] == "hf-hub:timm/resnet18.a1_in1k"


# -- torchvision -------------------------------------------------------------------------------------------------------


@dataclass
class Preset:
    crop_size: list[int] | None
    resize_size: list[int] | None
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Weights:
    url: str
    transforms: Any
    meta: Any


class ImageWeights(enum.Enum):
    """torchvision's WeightsEnum: members carry a Weights, whose fields are theirs, and DEFAULT names one of them."""

    IMAGENET1K_V1 = Weights("v1", lambda: Preset([20], [30], list(MEAN), list(STD)), None)
    IMAGENET1K_V2 = Weights("v2", lambda: Preset([24], [30], list(MEAN), list(STD)), None)
    DEFAULT = IMAGENET1K_V2

    def __getattr__(self, name: str) -> Any:
        if name in ("url", "transforms", "meta"):
            return object.__getattribute__(self.value, name)
        raise AttributeError(name)


class VideoWeights(enum.Enum):
    DEFAULT = Weights("v", lambda: Preset([12, 16], [20, 20], list(MEAN), list(STD)), {"min_temporal_size": 5})

    __getattr__ = ImageWeights.__getattr__


class NoWeights(enum.Enum):
    """A model that was never trained has an enumeration without members."""


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        calls.append(("resnet18", {"weights": weights, **kwargs}))
        return Unpadded()

    def fcn(*, weights: Any = None, weights_backbone: Any = "IMAGENET1K_V1", **kwargs: Any) -> nn.Module:
        calls.append(("fcn", {"weights": weights, "weights_backbone": weights_backbone, **kwargs}))
        return Unpadded()

    builders: dict[str, Any] = {"resnet18": resnet18, "fcn": fcn, "video": resnet18, "untrained": resnet18}
    known = {"resnet18": ImageWeights, "fcn": ImageWeights, "video": VideoWeights, "untrained": NoWeights}
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    functions: dict[str, Any] = {
        "list_models": lambda module=None, include=None, exclude=None: sorted(builders),
        "get_model_builder": lambda name: builders[name.lower()],
        "get_model_weights": lambda name: known[name.lower()],
        "get_model": lambda name, **config: builders[name.lower()](**config),
    }
    for name, function in functions.items():
        setattr(models, name, function)
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    yield calls


def test_torchvision(torchvision: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    result = run("export", "torchvision:resnet18", "--normalize", "-o", tmp_path / "n.onnx")
    assert result.exit_code == 0, result.stderr
    assert torchvision == [("resnet18", {"weights": None})] and "2 of 2 other" in result.stdout
    shape = [d.dim_value for d in onnx.load(tmp_path / "n.onnx").graph.input[0].type.tensor_type.shape.dim]
    assert shape[1:] == [3, 24, 24]


def test_torchvision_with_weights(torchvision: list[tuple[str, dict[str, Any]]]) -> None:
    loaded = load("torchvision:resnet18", factory_args={"pretrained": True, "num_classes": 2})
    assert torchvision[-1] == ("resnet18", {"weights": ImageWeights.IMAGENET1K_V2, "num_classes": 2})
    assert loaded.provenance.weights == "IMAGENET1K_V2" and loaded.normalization == Normalization(MEAN, STD)
    for named in ("IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        loaded = load("torchvision:resnet18", factory_args={"weights": named})
        assert torchvision[-1][1]["weights"] is ImageWeights.IMAGENET1K_V1
        assert loaded.args is not None and loaded.args[0].shape == (2, 3, 20, 20)
    with pytest.raises(InputError, match=r"no weights 'V3'\. It has IMAGENET1K_V1, IMAGENET1K_V2"):
        load("torchvision:resnet18", factory_args={"weights": "V3"})
    with pytest.raises(UsageError, match="contradict"):
        load("torchvision:resnet18", factory_args={"weights": "DEFAULT", "pretrained": True})
    with pytest.raises(InputError, match=r"Did you mean resnet18\?"):
        load("torchvision:resnet81")


def test_torchvision_fetches_no_backbone_unasked(torchvision: list[tuple[str, dict[str, Any]]]) -> None:
    load("torchvision:fcn")
    assert torchvision[-1] == ("fcn", {"weights": None, "weights_backbone": None})
    load("torchvision:fcn", factory_args={"weights_backbone": "IMAGENET1K_V1"})
    assert torchvision[-1][1]["weights_backbone"] == "IMAGENET1K_V1"


def test_torchvision_videos_and_models_that_say_nothing(torchvision: list[tuple[str, dict[str, Any]]]) -> None:
    loaded = load("torchvision:video")
    assert loaded.args is not None and loaded.args[0].shape == (2, 3, 5, 12, 16)
    loaded = load("torchvision:untrained")
    assert loaded.args is None and loaded.normalization is None


# -- libraries that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [
        ("timm:resnet18", "timm", "timm"),
        ("torchvision:resnet18", "torchvision", "torchvision"),
        ("hf:org/net", "transformers", "hf"),
    ],
)
def test_a_library_that_is_missing(source: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ProviderError, match=rf"pip install 'bnfold\[{extra}\]'"):
        load(source)
    result = run("inspect", source)
    assert result.exit_code == 5 and "pip install" in result.stderr and "Traceback" not in result.stderr


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files\nand so on")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(InputError, match=r"^hf:org/net: OSError: We couldn't connect to .* to load the files$"):
        load("hf:org/net")
