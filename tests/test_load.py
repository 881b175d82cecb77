import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from bnfold.errors import InputError, UsageError
from bnfold.loading import checkpoint
from bnfold.loading.load import load
from bnfold.loading.specs import parse_factory_arg

torch.set_num_threads(1)

NET = """
import torch
from torch import nn
import blocks

class Net(nn.Module):
    def __init__(self, width=4, depth=1):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.block = blocks.Block(width)
    def forward(self, x):
        return self.block(self.first(x))

def make(width=4):
    return Net(width)

def late(width=4):
    import lazily
    return lazily.wrap(Net(width))

ready = Net(5)
number = 3
example = torch.ones(2, 3)

def with_tensor(): return Net(), example
def with_list(): return Net(), [example]
def with_args(): return Net(), (example,)
def with_kwargs(): return Net(), (), {"x": example}
def a_list(): return [Net()]
def a_dict(): return {"model": Net()}
def nothing(): pass
def four(): return Net(), (), {}, 1
def bad_args(): return Net(), 5
def bad_kwargs(): return Net(), (), [1]
def scripted(): return torch.jit.trace(nn.ReLU(), example)
def raises(): return helper()
def helper(): raise KeyError("no such\\nblock")
def exits(): raise SystemExit(3)
def inside_torch(): return nn.Linear("a", "b")
def positional(width, /): return Net(width)
def empty(): return ()
"""
BLOCK = """
from torch import nn
class Block(nn.Linear):
    def __init__(self, width):
        super().__init__(width, {})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project to work in: nets/net.py with a neighbour that it imports."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.py").write_text(NET)
    (tmp_path / "nets" / "blocks.py").write_text(BLOCK.format(2))
    (tmp_path / "nets" / "lazily.py").write_text("def wrap(model):\n    return model\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if name.startswith(("nets", "pkg_", "bnfold_source_")) or name in ("blocks", "lazily"):
            del sys.modules[name]


def program(path: Path, *, dynamic: bool = True) -> Path:
    batch = {0: torch.export.Dim("N", min=1, max=64)} if dynamic else {}
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval()
    torch.export.save(torch.export.export(model, (torch.ones(2, 3, 5),), dynamic_shapes=(batch,)), path)
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return program(tmp_path_factory.mktemp("pt2") / "net.pt2").read_bytes()


# ---- factories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nets/net.py:make", "nets/net.py:Net", "nets/net.py:late", "./nets/net.py:make"])
def test_a_factory_in_a_file(folder: Path, source: str) -> None:
    path = list(sys.path)
    loaded = load(source, factory_args={"width": 6})
    assert isinstance(loaded.model, nn.Module)
    assert loaded.model.first.out_features == 6
    assert loaded.model.training
    assert (loaded.args, loaded.kwargs) == (None, {})
    assert loaded.provenance.parameters == 3 * 6 + 6 + 6 * 2 + 2
    assert (loaded.provenance.source, loaded.provenance.weights, loaded.provenance.sha256) == (source, None, None)
    assert sys.path == path


def test_each_file_sees_its_own_neighbours(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "net.py").write_text(NET)
    (folder / "other" / "blocks.py").write_text(BLOCK.format(9))
    assert [load(f"{name}/net.py:make").model.block.out_features for name in ("nets", "other", "nets")] == [2, 9, 2]


def test_an_edited_file_is_read_again(folder: Path) -> None:
    load("nets/net.py:make")
    (folder / "nets" / "net.py").write_text(NET.replace("width=4", "width=7"))
    assert load("nets/net.py:make").model.first.out_features == 7


def test_the_class_can_be_found_by_what_pickles_or_inspects_it(folder: Path) -> None:
    model = load("nets/net.py:make").model
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_a_factory_in_a_package(folder: Path) -> None:
    (folder / "pkg_a").mkdir()
    (folder / "pkg_a" / "__init__.py").write_text("from torch import nn\ndef top():\n    return nn.Linear(1, 1)\n")
    (folder / "pkg_a" / "deep.py").write_text("from . import top\ndef make():\n    return top()\n")
    path = list(sys.path)
    assert load("pkg_a.deep:make").provenance.parameters == 2
    assert load("pkg_a:top").provenance.source == "pkg_a:top"
    assert load("torch.nn:ReLU").provenance.parameters == 0
    assert sys.path == path
    with pytest.raises(InputError, match=r"a file inside a package is given as pkg.module:factory"):
        load("pkg_a/deep.py:make")


def test_an_instance_is_copied(folder: Path) -> None:
    (folder / "pkg_b.py").write_text("from torch import nn\nready = nn.Linear(2, 2)\n")
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "w.pt")
    loaded = load("pkg_b:ready", weights="w.pt")
    assert torch.equal(loaded.model.bias, torch.ones(2))
    assert not torch.equal(sys.modules["pkg_b"].ready.bias, torch.ones(2))
    with pytest.raises(UsageError, match="takes no --arg"):
        load("pkg_b:ready", factory_args={"width": 3})


def test_shared_parameters_are_counted_once(folder: Path) -> None:
    code = (
        "from torch import nn\ndef make():\n    a = nn.Linear(3, 3)\n    return nn.Sequential(a, a, nn.LazyLinear(2))\n"
    )
    Path("tied.py").write_text(code)
    assert load("tied.py:make").provenance.parameters == 12


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [("with_tensor", 1, []), ("with_list", 1, []), ("with_args", 1, []), ("with_kwargs", 0, ["x"])],
)
def test_a_factory_may_bring_example_inputs(folder: Path, name: str, args: int, kwargs: list[str]) -> None:
    loaded = load(f"nets/net.py:{name}")
    assert isinstance(loaded.args, tuple)
    assert (len(loaded.args), list(loaded.kwargs)) == (args, kwargs)
    assert isinstance(loaded.model, nn.Module)
    assert loaded.model(*loaded.args, **loaded.kwargs).shape == (2, 2)


@pytest.mark.parametrize(
    ("code", "args", "kwargs"),
    [
        ("class M(nn.ReLU): example_input_array = torch.ones(1)", 1, []),
        ("class M(nn.ReLU): example_input_array = (torch.ones(1), 2)", 2, []),
        ("class M(nn.ReLU): example_input_array = {'input': torch.ones(1)}", 0, ["input"]),
        ("class M(nn.ReLU): example_inputs = (torch.ones(1), 2, 3)", 3, []),
        ("M = nn.ReLU\nexample_inputs = (torch.ones(1), 2)", 2, []),
        ("class M(nn.ReLU): example_input_array = torch.ones(1)\nexample_inputs = (1, 2)", 1, []),
        ("class M(nn.ReLU): example_input_array = None", None, []),
        ("class M(nn.ReLU):\n    def example_inputs(self): pass", None, []),
    ],
)
def test_example_inputs_that_lie_beside_the_model(folder: Path, code: str, args: int | None, kwargs: list[str]) -> None:
    Path("m.py").write_text(f"import torch\nfrom torch import nn\n{code}\n")
    loaded = load("m.py:M")
    assert (None if loaded.args is None else len(loaded.args), list(loaded.kwargs)) == (args, kwargs)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("nets/none.py:make", {}, "nets/none.py: there is no such file"),
        ("nets/net.py:mak", {}, r"no 'mak' in it. Did you mean make"),
        ("nets/net.py:zzzzz", {}, "no 'zzzzz' in it. Did you mean Net or make or late"),
        ("nets/net.py:number", {}, "'number' is a int and cannot be called"),
        ("nets/net.py:make", {"factory_args": {"widht": 3}}, r"'widht'. Its signature is \(width=4\)"),
        ("nets/net.py:positional", {}, "missing a required argument: 'width'"),
        ("nets/net.py:a_list", {}, "the factory returned list. It must return an nn.Module"),
        ("nets/net.py:a_dict", {}, "the factory returned dict"),
        ("nets/net.py:nothing", {}, "the factory returned NoneType"),
        ("nets/net.py:empty", {}, "the factory returned nothing"),
        ("nets/net.py:four", {}, "the factory returned Net, tuple, dict, int"),
        ("nets/net.py:bad_args", {}, "the factory returned Net, int"),
        ("nets/net.py:bad_kwargs", {}, "the factory returned Net, tuple, list"),
        ("nets/net.py:raises", {}, r"the factory failed with KeyError: 'no such\\nblock'. It happened at net.py:37"),
        ("nets/net.py:exits", {}, "the factory failed with SystemExit: 3. It happened at net.py:38"),
        ("nets/net.py:inside_torch", {}, r"the factory failed with TypeError: .* It happened at net.py:39"),
        ("no_such_package:make", {}, "no Python module 'no_such_package'"),
        ("torch.no_such:make", {}, "no Python module 'torch.no_such'"),
    ],
)
def test_factories_that_fail(folder: Path, source: str, options: dict[str, Any], says: str) -> None:
    before, path = set(sys.modules), list(sys.path)
    with pytest.raises(InputError, match=says) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    assert sys.path == path
    assert not {name for name in set(sys.modules) - before if name.startswith("bnfold_source_")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_factory_may_give_a_scripted_module(folder: Path) -> None:
    assert isinstance(load("nets/net.py:scripted").model, torch.jit.ScriptModule)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nothing_like_this", "importing it failed with ModuleNotFoundError.*at broken.py:1"),
        ("x = 1\nraise ValueError('two\\nlines')", "ValueError: two lines. It happened at broken.py:2"),
        ("x = 1\n\ndef f(:\n", "SyntaxError.*at broken.py:3"),
        ("import sys\nsys.exit('usage: train.py')", "SystemExit: usage: train.py.*at broken.py:2"),
        ("import json\njson.loads('{')", "JSONDecodeError.*at broken.py:2"),
    ],
)
@pytest.mark.parametrize("source", ["broken.py:make", "broken:make"])
def test_imports_that_fail(folder: Path, code: str, says: str, source: str) -> None:
    Path("broken.py").write_text(code)
    with pytest.raises(InputError, match=says) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert "broken" not in sys.modules


def test_an_interrupt_is_no_input_error(folder: Path) -> None:
    Path("stop.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load("stop.py:make")


# ---- weights and provenance ------------------------------------------------------------------------------------------


def test_weights_of_a_factory(folder: Path) -> None:
    torch.manual_seed(1)
    state = {key: torch.randn_like(value) for key, value in load("nets/net.py:make").model.state_dict().items()}
    torch.save({"a": {"model": {f"net.{key}": value for key, value in state.items()}}}, "nets/w.pt")
    loaded = load("nets/net.py:make", weights=Path("nets/w.pt"), weights_key="a.model", strip_prefix="net.")
    assert isinstance(loaded.model, nn.Module)
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())
    assert loaded.provenance.weights == "w.pt"
    assert loaded.provenance.sha256 == checkpoint.sha256(Path("nets/w.pt"))
    with pytest.raises(InputError, match=r"nets/w.pt: the weights do not fit"):
        load("nets/net.py:make", weights="nets/w.pt", weights_key="a.model")


def test_provenance_holds_no_folder_outside_the_working_directory(folder: Path, exported: bytes) -> None:
    (folder / "sub").mkdir()
    (folder / "net.pt2").write_bytes(exported)
    os.chdir("sub")
    for source, public in [
        (f"{folder}/nets/net.py:make", "net.py:make"),
        ("../nets/net.py:make", "net.py:make"),
        (f"{folder}/net.pt2", "net.pt2"),
        ("../net.pt2", "net.pt2"),
    ]:
        assert load(source).provenance.source == public


# ---- exported programs -----------------------------------------------------------------------------------------------


def test_an_exported_program(folder: Path, exported: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("net.pt2", "renamed.bin"):
        Path(name).write_bytes(exported)
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        environment = dict(os.environ)
        loaded = load(name)
        assert isinstance(loaded.model, torch.export.ExportedProgram)
        assert loaded.args is not None
        assert loaded.args[0].shape == (2, 3, 5)
        assert loaded.model.module()(torch.ones(1, 3, 5)).shape == (1, 4, 5)
        assert loaded.provenance.parameters == 3 * 4 + 4 + 8
        assert loaded.provenance.sha256 == checkpoint.sha256(Path(name))
        assert dict(os.environ) == environment


class Busy(nn.Module):
    """A graph whose names, shapes and guards use the vocabulary that a harmless program may use."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.ModuleDict({"a b/c-1": nn.Conv2d(3, 4, 3, padding=1)})
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.table = torch.ones(1)

    def forward(self, x: dict[str, torch.Tensor], *, m: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        z = nn.functional.pad(x["p"], (0, 0, 0, (-x["p"].shape[2]) % 8))
        z = nn.functional.interpolate(self.odd["a b/c-1"](z), scale_factor=2, mode="bilinear")
        z = torch.einsum("bchw,c->bhwc", z, self.table.expand(4))
        with torch.no_grad():
            z = self.normed(z) * (x["p"].shape[2] // 2)
        return {"out": z, "sum": x["q"] + m[0], "cond": torch.cond(z.shape[1] > 9, torch.neg, torch.abs, (z,))}


def test_a_program_with_busy_shapes_is_not_taken_for_an_attack(folder: Path) -> None:
    dim, auto = torch.export.Dim("N", min=1), torch.export.Dim.AUTO
    inputs = {"p": torch.ones(2, 3, 13, 5), "q": torch.ones(2, 4)}, [torch.ones(2, 4)]
    shapes = {"x": {"p": {0: dim, 2: auto}, "q": {0: dim}}, "m": [{0: dim}]}
    torch.export.save(
        torch.export.export(Busy().eval(), inputs[:1], {"m": inputs[1]}, dynamic_shapes=shapes), "net.pt2"
    )
    loaded = load("net.pt2")
    assert list(loaded.kwargs) == ["m"]
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    loaded.model.module()(inputs[0], m=inputs[1])


def tampered(content: bytes, path: Path, edit: Callable[[dict[str, Any]], None], member: str, **add: bytes) -> Path:
    """The program with one JSON member edited, and members added ("_" in a name stands for "/")."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith(member))
    value = json.loads(members[name])
    edit(value)
    members[name] = json.dumps(value).encode()
    members |= {name.partition("/")[0] + "/" + key.replace("__", "/"): extra for key, extra in add.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, extra in members.items():
            archive.writestr(name, extra)
    return path


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, ("trap", os.O_CREAT)


def set_shape(text: str) -> Callable[[dict[str, Any]], None]:
    def edit(value: dict[str, Any]) -> None:
        value["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = text

    return edit


def set_target(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["graph_module"]["graph"]["nodes"][0].update(target=text)


def set_context(context: Any) -> Callable[[dict[str, Any]], None]:
    def edit(value: dict[str, Any]) -> None:
        spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
        value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec

    return edit


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(value: dict[str, Any]) -> None:
        changed = json.loads(json.dumps(value).replace(json.dumps(old), json.dumps(new)))
        value.clear()
        value.update(changed)

    return edit


def add_object(name: str) -> Callable[[dict[str, Any]], None]:
    entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    return lambda value: value["config"].update(evil=entry)


CALL = "__import__('os').open('trap', 64)"
PROGRAM, CONSTANTS = "models/model.json", "constants_config.json"
ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "shape": (set_shape(CALL), PROGRAM),
    "shape without quotes": (set_shape("().__class__.__base__.__subclasses__()"), PROGRAM),
    "shape of an f-string": (set_shape("f'{" + CALL.replace("'", "") + "}'"), PROGRAM),
    "shape of a subscript": (set_shape("[print][0](1)"), PROGRAM),
    "guard": (lambda value: value.update(guards_code=[CALL]), PROGRAM),
    "guard with a statement": (lambda value: value.update(guards_code=["True\nimport os"]), PROGRAM),
    "guard with a method": (lambda value: value.update(guards_code=["L['x'].numpy().tofile('trap')"]), PROGRAM),
    "operator": (set_target("torch.os.open"), PROGRAM),
    "library": (set_target("torch.ops.load_library"), PROGRAM),
    "call": (set_target("_operator.call"), PROGRAM),
    "name": (rename("input", "input=" + CALL), PROGRAM),
    "name of a parameter": (rename("0.weight", '0.weight"), open("trap", "w'), PROGRAM),
    "enum": (set_context(json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})), PROGRAM),
    "escaped enum": (set_context('{"__enum\\u005f_": true, "fqn": "antigravity:x", "name": "y"}'), PROGRAM),
    "default factory": (set_context({"default_factory_module": "antigravity"}), PROGRAM),
    "pickled object": (add_object("opaque_obj_0"), CONSTANTS),
    "torchbind object": (add_object("custom_obj_0"), CONSTANTS),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_runs_no_code_unless_allowed(
    folder: Path, exported: bytes, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tampered(exported, folder / "net.pt2", *ATTACKS[attack])
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch.export.load was reached"))
    with pytest.raises(InputError, match=r"holds what can run any code .* --unsafe-pickle"):
        load(str(path))


def test_a_compiled_library_in_a_program_is_refused(folder: Path, exported: bytes) -> None:
    path = tampered(exported, folder / "net.pt2", lambda _: None, PROGRAM, data__aotinductor__model__x=b"\x7fELF")
    with pytest.raises(InputError, match=r"aotinductor/model/x"):
        load(str(path))


def test_the_attack_on_shapes_is_real(folder: Path, exported: bytes) -> None:
    """The twin of the refusals: torch does evaluate the text, and an untouched but rewritten archive loads."""
    path = tampered(exported, folder / "net.pt2", lambda _: None, PROGRAM)
    assert isinstance(load(str(path)).model, torch.export.ExportedProgram)
    path = tampered(exported, path, set_shape(CALL), PROGRAM)
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(path), unsafe_pickle=True)
    assert Path("trap").exists()


@pytest.mark.parametrize("use_pickle", ["weights", "sample_inputs"])
def test_pickles_in_a_program_run_no_code_unless_allowed(folder: Path, exported: bytes, use_pickle: str) -> None:
    torch.save(Payload(), "evil.pt")
    path = folder / "net.pt2"
    path.write_bytes(exported)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name in members:
        if use_pickle == "weights" and name.endswith("weights_config.json"):
            members[name] = members[name].replace(b'"use_pickle": false', b'"use_pickle": true')
        if name.endswith("data/weights/weight_0" if use_pickle == "weights" else "sample_inputs/model.pt"):
            members[name] = Path("evil.pt").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match="cannot be loaded"):
        load("net.pt2")
    assert not Path("trap").exists()
    with pytest.raises(InputError):
        load("net.pt2", unsafe_pickle=True)
    assert Path("trap").exists()


@pytest.mark.parametrize("part", [0.01, 0.5, 0.85, 0.9, 0.97, 0.99])
def test_truncated_programs(folder: Path, exported: bytes, part: float) -> None:
    Path("net.pt2").write_bytes(exported[: int(len(exported) * part)])
    with pytest.raises(InputError, match="cut short or damaged"):
        load("net.pt2")


def test_a_flipped_weight_of_a_program_is_seen(folder: Path, exported: bytes) -> None:
    Path("net.pt2").write_bytes(exported)
    with zipfile.ZipFile("net.pt2") as archive:
        at = exported.index(archive.read(next(n for n in archive.namelist() if n.endswith("weight_0"))))
    Path("net.pt2").write_bytes(exported[:at] + bytes([exported[at] ^ 1]) + exported[at + 1 :])
    with pytest.raises(InputError, match=r"checksum of .*weight_0 is wrong"):
        load("net.pt2")


def test_a_program_whose_weights_are_too_few_is_one_line(
    folder: Path, exported: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tampered(
        exported,
        folder / "net.pt2",
        lambda value: value["config"]["0.weight"]["tensor_meta"]["sizes"][0].update(as_int=10**6),
        "weights_config.json",
    )
    with pytest.raises(InputError, match=r"cannot be loaded \(RuntimeError: We ran into an error [^.]*\)\."):
        load(str(path))
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_a_program_of_another_version(folder: Path, exported: bytes) -> None:
    path = tampered(exported, folder / "net.pt2", lambda value: value["schema_version"].update(major=99), PROGRAM)
    with pytest.raises(InputError, match=r"cannot be loaded .* Export it again"):
        load(str(path))


# ---- whole pickled modules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"model": module, "ema": None, "epoch": 3}])
def test_a_pickled_module_needs_permission(folder: Path, wrap: Callable[[Any], Any]) -> None:
    module = nn.Linear(2, 3)
    module.example_input_array = torch.ones(4, 2)
    torch.save(wrap(module), "net.pt")
    with pytest.raises(InputError, match=r"torch.nn.modules.linear.Linear.*any code.*--unsafe-pickle"):
        load("net.pt")
    loaded = load("net.pt", unsafe_pickle=True)
    assert isinstance(loaded.model, nn.Linear)
    assert torch.equal(loaded.model.weight, module.weight)
    assert loaded.args is not None
    assert loaded.provenance.sha256 == checkpoint.sha256(Path("net.pt"))
    assert loaded.provenance.parameters == 9


def test_a_pickle_as_source_runs_no_code(folder: Path) -> None:
    torch.save(Payload(), "net.pt")
    with pytest.raises(InputError, match="--unsafe-pickle"):
        load("net.pt")
    assert not Path("trap").exists()


def test_weights_alone_are_no_source(folder: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save(state, "w.pt")
    torch.save({"state_dict": state}, "v.pth")
    safetensors.torch.save_file(dict(state), "w.safetensors")
    for name in ("w.pt", "v.pth", "w.safetensors"):
        for unsafe in (False, True):
            with pytest.raises(InputError, match=rf"weights and no model.*path/to/file.py:factory.*--weights {name}"):
                load(name, unsafe_pickle=unsafe)
    torch.save([1, 2], "list.pt")
    with pytest.raises(InputError, match="holds a list, no module"):
        load("list.pt")


# ---- sources that cannot be understood -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["", " ", "resnet:no-identifier", "hf:", "timm:", "file.py:two:parts", "pkg.module:1x", "x.pt:foo/bar", "a\0b.pt2"],
)
def test_unknown_sources(source: str) -> None:
    with pytest.raises(UsageError, match=r"A source is one of: path/to/file.py:factory; pkg.module:factory; timm:NAME"):
        load(source)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("net.pt2", {"weights": "w.pt"}, "neither --weights nor --arg"),
        ("net.pt2", {"factory_args": {"a": 1}}, "neither --weights nor --arg"),
        ("net.pt2", {"weights_key": "ema"}, "need --weights"),
        ("nets/net.py:make", {"weights_key": "ema"}, "need --weights"),
        ("nets/net.py:make", {"strip_prefix": "module."}, "need --weights"),
        ("nets/net.py", {}, "the factory's name is missing. Write nets/net.py:FACTORY"),
    ],
)
def test_options_that_do_not_apply(folder: Path, source: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(source, **options)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("none.pt2", "none.pt2: there is no such file"),
        ("none.onnx", "no such file"),
        ("nets", "a folder, not a file"),
        ("net.onnx", "this is no ONNX file"),
        ("text.pt", "a text file"),
        ("empty.pt2", "the file is empty"),
    ],
)
def test_files_that_are_no_source(folder: Path, source: str, says: str) -> None:
    Path("net.onnx").write_bytes(b"\x08\x07")
    Path("text.pt").write_text("hello")
    Path("empty.pt2").touch()
    with pytest.raises(InputError, match=says):
        load(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width=32", ("width", 32)),
        ("name=resnet", ("name", "resnet")),
        ("name='32'", ("name", "32")),
        ("dims=(1, 2)", ("dims", (1, 2))),
        ("flag=True", ("flag", True)),
        ("path=a=b", ("path", "a=b")),
        (" scale = -1.5 ", ("scale", -1.5)),
        ("empty=", ("empty", "")),
        ("code=__import__('os')", ("code", "__import__('os')")),
    ],
)
def test_parse_factory_arg(text: str, expected: tuple[str, Any]) -> None:
    assert parse_factory_arg(text) == expected


@pytest.mark.parametrize("text", ["width", "", "=3", "1x=3", "a b=3", "--width=3"])
def test_parse_factory_arg_rejects(text: str) -> None:
    with pytest.raises(UsageError, match="--arg width=32"):
        parse_factory_arg(text)


def test_importing_needs_neither_onnx_nor_safetensors() -> None:
    code = (
        "import sys, bnfold.loading.load, bnfold.loading.inputs\n"
        "print([n for n in ('onnx', 'onnxruntime', 'onnxscript', 'safetensors', 'torchvision') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
