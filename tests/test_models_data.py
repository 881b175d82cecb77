"""models/: the weights fit their definitions, the accuracies are the README's, and the files are fit to be shipped."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
NETS = ["digits_mlp", "digits_cnn", "digits_tcn", "digits_batchstats"]


def factories():
    spec = importlib.util.spec_from_file_location("digits", MODELS / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(name: str) -> nn.Module:
    net = getattr(factories(), name)()
    net.load_state_dict(load_file(MODELS / f"{name}.safetensors"), strict=True)
    return net.eval()


def batchnorms(net: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}


def readme_row(name: str) -> tuple[int, int, float]:
    """Parameters, BatchNorms and held-out accuracy in per cent, as models/README.md states them."""
    text = (MODELS / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| `{name}` \| ([\d,]+) \| (\d+) \| ([\d.]+) % \|", text, re.MULTILINE)
    assert found, f"models/README.md has no row for {name}"
    return int(found[1].replace(",", "")), int(found[2]), float(found[3])


@pytest.fixture(scope="module")
def heldout() -> tuple[Tensor, Tensor]:
    with np.load(MODELS / "digits_heldout.npz") as data:
        return torch.from_numpy(data["x"]), torch.from_numpy(data["labels"])


def test_heldout_file_is_as_documented(heldout):
    x, labels = heldout
    assert x.shape == (360, 1, 8, 8) and x.dtype == torch.float32
    assert x.min() == 0 and x.max() == 1
    assert labels.shape == (360,) and labels.dtype == torch.int64
    assert labels.bincount().min() >= 34 and len(labels.bincount()) == 10


def test_calibration_file_is_as_documented(heldout):
    with np.load(MODELS / "digits_calibration.npz") as data:
        assert data.files == ["x"] and data["x"].shape == (512, 1, 8, 8) and data["x"].dtype == np.float32
        seen = {image.tobytes() for image in data["x"]}
    assert not seen & {image.tobytes() for image in heldout[0].numpy()}


@pytest.mark.parametrize("name", NETS)
def test_readme_states_what_the_files_hold(name, heldout):
    net, (x, labels) = trained(name), heldout
    parameters, norms, per_cent = readme_row(name)
    with torch.no_grad():
        right = (net.double()(x.double()).argmax(1) == labels).sum().item()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(batchnorms(net)) == norms
    assert f"{100 * right / 360:.2f}" == f"{per_cent:.2f}"
    assert per_cent >= 98


@pytest.mark.parametrize("name", NETS)
def test_weights_are_tied_to_their_width(name):
    narrow = getattr(factories(), name)(width=8)
    with pytest.raises(RuntimeError, match="size mismatch"):
        narrow.load_state_dict(load_file(MODELS / f"{name}.safetensors"))
    (example,) = narrow.example_inputs
    assert narrow.eval()(example).shape == (2, 10)


@pytest.mark.parametrize("name", NETS)
def test_batchnorm_statistics_are_real_and_well_conditioned(name):
    tracked = [norm for norm in batchnorms(trained(name)).values() if norm.running_var is not None]
    assert tracked
    for norm in tracked:
        assert norm.running_var.min() > 1e-3 and norm.running_var.max() < 10
        assert norm.running_mean.abs().max() < 10
        # A fresh BatchNorm has zeros and ones here, which would make any fold trivial.
        assert norm.running_mean.std() > 0 and norm.running_var.std() > 0
        assert not norm.affine or norm.weight.abs().min() > 0.5


def test_mlp_also_takes_flat_pixels(heldout):
    x, _ = heldout
    net = trained("digits_mlp")
    assert torch.equal(net(x), net(x.flatten(1)))


def test_tcn_also_takes_sequences(heldout):
    x, _ = heldout
    net = trained("digits_tcn")
    assert torch.equal(net(x), net(x[:, 0]))
    assert {conv.dilation for conv in net.modules() if isinstance(conv, nn.Conv1d)} == {(1,), (2,), (4,)}
    assert "same" in {conv.padding for conv in net.modules() if isinstance(conv, nn.Conv1d)}


def test_cnn_holds_the_idioms_it_is_for(heldout):
    x, _ = heldout
    net = trained("digits_cnn")
    norms = batchnorms(net)
    assert [name for name, norm in norms.items() if not norm.affine] == ["block1.bn2"]
    assert [name for name, norm in norms.items() if norm.momentum is None] == ["pointwise.1"]
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert any(conv.groups == conv.in_channels > 1 for conv in convolutions)
    assert any(isinstance(module, nn.ConvTranspose2d) for module in net.modules())
    assert all(module.inplace for module in net.modules() if isinstance(module, nn.ReLU))

    seen: dict[str, Tensor] = {}
    net.tail_norm.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0]))
    net.pool.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
    net(x)
    # The last BatchNorm stands between an activation and the pool: nothing before it is linear.
    assert seen["before"].min() == 0
    assert torch.equal(net.tail_norm(seen["before"]), seen["pooled"])


def test_batchstats_depends_on_its_batch_and_the_others_do_not(heldout):
    x, _ = heldout
    untracked = [norm for norm in batchnorms(trained("digits_batchstats")).values() if not norm.track_running_stats]
    assert len(untracked) == 1
    for name in NETS:
        net = trained(name)
        alone, together = net(x[:2]), net(x[:20])[:2]
        assert torch.allclose(alone, together, atol=1e-4) == (name != "digits_batchstats")


def test_program_equals_the_weights_and_keeps_its_batch_dynamic(heldout):
    x, _ = heldout
    program = torch.export.load(MODELS / "digits_mlp.pt2")
    assert torch.equal(program.module()(x), trained("digits_mlp")(x))
    assert torch.ops.aten.batch_norm.default in {node.target for node in program.graph.nodes}


def test_program_names_no_path():
    with zipfile.ZipFile(MODELS / "digits_mlp.pt2") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for name, data in content.items():
        assert b"stack_trace" not in data, name
        assert b".py" not in data, name
        for folder in (b"/home/", b"/root/", b"/usr/", b"site-packages", str(ROOT).encode()):
            assert folder not in data, f"{name} holds {folder!r}"


def test_models_folder_stays_small():
    shipped = [path for path in MODELS.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) < 600_000


def script(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train_digits.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_training_script_documents_itself():
    run = script("--help")
    assert run.returncode == 0
    assert all(option in run.stdout for option in ("--out", "--seed", "--epochs", "--only"))


def test_training_script_writes_the_same_split_and_loadable_weights(tmp_path, heldout):
    run = script("--only", "digits_mlp", "--epochs", "1", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"digits_heldout.npz", "digits_calibration.npz", "digits_mlp.safetensors", "digits_mlp.pt2"}
    with np.load(tmp_path / "digits_heldout.npz") as data:
        assert torch.equal(torch.from_numpy(data["x"]), heldout[0])
    with np.load(tmp_path / "digits_calibration.npz") as data, np.load(MODELS / "digits_calibration.npz") as shipped:
        assert np.array_equal(data["x"], shipped["x"])
    factories().digits_mlp().load_state_dict(load_file(tmp_path / "digits_mlp.safetensors"))


def test_training_script_refuses_an_unknown_net(tmp_path):
    run = script("--only", "digits_rnn", "--out", str(tmp_path))
    assert run.returncode == 2 and "digits_rnn" in run.stderr
    assert not any(tmp_path.iterdir())
