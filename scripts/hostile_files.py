"""Files from strangers, for ``torture.py``: damaged, calling something, larger than they look, or not what they claim.

Every maker yields what a file is, and the command that reads it, in a folder where ``trap`` is the file that nothing
may make and ``out.onnx`` the destination.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import TensorProto, helper

import bnfold

Case = tuple[str, list[Any]]
Chance = random.Random
#: KB that reading any of them may take at most; torch alone takes 600 MB.
PEAK = 3_000_000


# -- damaged files -----------------------------------------------------------------------------------------------------


def flip_bits(content: bytearray, chance: Chance) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def cut(content: bytearray, chance: Chance) -> None:
    del content[chance.randrange(len(content)) :]


def cut_out(content: bytearray, chance: Chance) -> None:
    at = chance.randrange(len(content))
    del content[at : at + chance.randint(1, 64)]


def insert(content: bytearray, chance: Chance) -> None:
    at = chance.randrange(len(content))
    content[at:at] = chance.randbytes(chance.randint(1, 64))


def repeat(content: bytearray, chance: Chance) -> None:
    at, size = chance.randrange(len(content)), chance.randint(1, 256)
    content[at:at] = content[at : at + size]


def overwrite(content: bytearray, chance: Chance) -> None:
    at = chance.randrange(len(content))
    piece = chance.choice((b"\0", b"\xff", b"\x7f\xff", b"9", b"\x1b[31m")) * chance.randint(1, 16)
    content[at : at + len(piece)] = piece


def overwrite_near_an_end(content: bytearray, chance: Chance) -> None:
    at = chance.randrange(min(len(content), 200))
    piece = chance.randbytes(chance.randint(1, 8))
    at = at if chance.random() < 0.5 else max(len(content) - at - len(piece), 0)
    content[at : at + len(piece)] = piece


WAYS = (flip_bits, flip_bits, cut, cut_out, insert, repeat, overwrite, overwrite_near_an_end)


def readable(folder: Path, net: torch.nn.Module, source: str) -> dict[str, Callable[[Path], list[Any]]]:
    """A good file of every kind that is read, and the command that reads one under another name."""
    arrays = {"input": np.random.default_rng(0).normal(size=(12, 3, 6, 6)).astype(np.float32)}
    safetensors.torch.save_file(net.state_dict(), folder / "net.safetensors", metadata={"of": "a net"})
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, folder / "net.pt")
    torch.save(net.state_dict(), folder / "net.pth", _use_new_zipfile_serialization=False)
    torch.export.save(torch.export.export(net, net.example_inputs), folder / "net.pt2")
    np.savez(folder / "data.npz", labels=np.arange(12) % 10, **arrays)
    for name, external in (("net.onnx", False), ("apart.onnx", True)):
        given = {"baseline": folder / "base.json", "update_baseline": True} if not external else {}
        report = bnfold.export(net, folder / name, net.example_inputs, device="cpu", external_data=external, **given)
        assert report.passed
    (data,) = folder.glob("apart.*.data")
    data.rename(folder / "weights.data")  # of any name, so that a damaged copy can stand in for it
    model = onnx.load(folder / "apart.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in (entry for entry in tensor.external_data if entry.key == "location"):
            entry.value = "bad.data"
    (folder / "apart.onnx").write_bytes(model.SerializeToString())
    weights = lambda path: ["inspect", source, "--weights", path]  # noqa: E731
    return {
        "net.safetensors": weights,
        "net.pt": weights,
        "net.pth": weights,
        "net.pt2": lambda path: ["inspect", path],
        "data.npz": lambda path: ["inspect", source, "--data", path],
        "net.onnx": lambda path: ["check", path, source, "--device", "cpu", "-q"],
        "weights.data": lambda path: ["check", folder / "apart.onnx", source, "--device", "cpu", "-q"],
        "base.json": lambda path: ["check", folder / "net.onnx", source, "--device", "cpu", "-q", "--baseline", path],
    }


def mutations(count: int, folder: Path, net: torch.nn.Module, source: str, chance: Chance) -> Iterator[Case]:
    """So many damaged copies, of each kind as many."""
    kinds = readable(folder, net, source)
    good = {name: (folder / name).read_bytes() for name in kinds}
    for i in range(count):
        name = list(kinds)[i % len(kinds)]
        content, way = bytearray(good[name]), WAYS[(i // len(kinds)) % len(WAYS)]
        way(content, chance)
        path = folder / f"bad{Path(name).suffix}"
        path.write_bytes(content)
        yield f"{i}: {name}, {way.__name__}", kinds[name](path)


# -- pickles -----------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def callers(trap: Path) -> dict[str, Any]:
    """Objects that make the trap when they are unpickled by a reader that lets them."""
    code = f"open({str(trap)!r}, 'w').close()"
    found: dict[str, Any] = {
        "os.system": Calls(os.system, f"touch {trap}"),
        "os.open": Calls(os.open, str(trap), os.O_CREAT),
        "os.mkdir": Calls(os.mkdir, str(trap)),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "Popen": Calls(subprocess.Popen, ["touch", str(trap)]),
        "codecs.open": Calls(codecs.open, str(trap), "w"),
        "io.open": Calls(io.open, str(trap), "w"),
        "Path.touch": Calls(Path.touch, trap),
        "numpy.memmap": Calls(np.memmap, str(trap), "uint8", "w+", 0, (1,)),
        "ndarray.tofile": Calls(np.ndarray.tofile, np.zeros(1), str(trap)),
        "torch.save": Calls(torch.save, 1, str(trap)),
        "from_file": Calls(torch.from_file, str(trap), True, 4),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.open, str(trap), os.O_CREAT))),
        "torch.load": Calls(torch.load, io.BytesIO(b"")),
    }
    return found


def gadgets(folder: Path, net: torch.nn.Module, source: str, chance: Chance) -> Iterator[Case]:
    """Every caller, in every file that may hold a pickle."""
    trap, kinds = folder / "trap", readable(folder, net, source)
    program = (folder / "net.pt2").read_bytes()
    for name, caller in callers(trap).items():
        for where, value in (
            ("as it is", caller),
            ("in a list", [1, caller]),
            ("in weights", net.state_dict() | {"x": caller}),
        ):
            torch.save(value, folder / "evil.pt")
            yield f"{name}, {where}, zip", kinds["net.pt"](folder / "evil.pt")
            yield f"{name}, {where}, as a model", ["export", folder / "evil.pt", "-o", "out.onnx"]
            torch.save(value, folder / "evil.pth", _use_new_zipfile_serialization=False)
            yield f"{name}, {where}, legacy", kinds["net.pth"](folder / "evil.pth")
        (folder / "evil.bin").write_bytes(pickle.dumps(caller))
        yield f"{name}, a bare pickle", kinds["net.pt"](folder / "evil.bin")
        array = np.array([caller], object)
        np.savez(folder / "evil.npz", input=array)
        yield f"{name}, npz", kinds["data.npz"](folder / "evil.npz")
        np.save(folder / "evil.npy", array, allow_pickle=True)
        yield f"{name}, npy", kinds["data.npz"](folder / "evil.npy")
        torch.save(caller, folder / "evil.pt")
        rewritten(program, folder / "evil.pt2", {"sample_inputs/model.pt": (folder / "evil.pt").read_bytes()})
        yield f"{name}, program", ["export", folder / "evil.pt2", "-o", "out.onnx"]


def rewritten(archive: bytes, path: Path, members: dict[str, bytes], *, compress: bool = False) -> None:
    """A copy of a zip archive with other contents in the members that end so."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w", kind) as new:
        for member in old.infolist():
            content = next((c for end, c in members.items() if member.filename.endswith(end)), None)
            new.writestr(member.filename, old.read(member) if content is None else content)


# -- bombs -------------------------------------------------------------------------------------------------------------


def bombs(folder: Path, net: torch.nn.Module, source: str, chance: Chance) -> Iterator[Case]:
    """Compressed gigabytes, headers that claim them, and nesting without end."""
    kinds, zeros = readable(folder, net, source), bytes(400_000_000)
    good = {name: (folder / name).read_bytes() for name in kinds}
    members = {"net.pt": ("data/0", "data.pkl"), "net.pt2": ("weight_0", "model.json"), "data.npz": ("input.npy",)}
    for name, member in [(name, member) for name, ends in members.items() for member in ends]:
        path = folder / f"bomb{Path(name).suffix}"
        rewritten(good[name], path, {member: zeros}, compress=True)
        yield f"{name}: 400 MB of zeros in {member}", kinds[name](path)
    del zeros
    for claimed in ((2**40,), (2**62, 2**62), (1,) * 1000, (-1,), (2**20,) * 3):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {claimed!r}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        content = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(64)
        (folder / "bomb.npy").write_bytes(content)
        yield f"npy of shape {str(claimed)[:30]}", kinds["data.npz"](folder / "bomb.npy")
        with zipfile.ZipFile(folder / "bomb.npz", "w") as archive:
            archive.writestr("input.npy", content)
        yield f"npz of shape {str(claimed)[:30]}", kinds["data.npz"](folder / "bomb.npz")
    for size in (2**63 - 1, 2**40, 2**31):
        (folder / "bomb.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
        yield f"safetensors with a header of {size} bytes", kinds["net.safetensors"](folder / "bomb.safetensors")
    claims = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(claims).encode()
    (folder / "bomb.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    yield "safetensors with a tensor of 4 TB", kinds["net.safetensors"](folder / "bomb.safetensors")
    for nested in ("[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000, "1" * 5_000_000):
        (folder / "bomb.json").write_text(nested)
        yield f"JSON of {nested[:10]}...", kinds["base.json"](folder / "bomb.json")
        rewritten(good["net.pt2"], folder / "bomb.pt2", {"models/model.json": nested.encode()})
        yield f"a program of {nested[:10]}...", kinds["net.pt2"](folder / "bomb.pt2")
    deep: Any = []
    for _ in range(300):
        deep = [deep] * 2
    torch.save({"x": deep}, folder / "bomb.pt")
    yield "a pickle of 2**300 lists", kinds["net.pt"](folder / "bomb.pt")


# -- ONNX --------------------------------------------------------------------------------------------------------------

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
RED = "\x1b]0;red\x07"


def model(nodes: list[Any], *initializers: Any, outputs: tuple[str, ...] = ("linear",), **more: Any) -> onnx.ModelProto:
    """A graph with the net's input and output."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("input", FLOAT, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info(name, FLOAT, ["n", 40]) for name in outputs], list(initializers),
    )  # fmt: skip
    return helper.make_model(graph, **{"opset_imports": [helper.make_opsetid("", 20)], "ir_version": 10} | more)


def hostile_onnx(folder: Path, net: torch.nn.Module, source: str, chance: Chance) -> Iterator[Case]:
    """Data outside of the folder or of its file, and graphs that are none."""
    node, place = helper.make_node, folder / "inside"
    place.mkdir()
    check = lambda: ["check", place / "net.onnx", source, "--device", "cpu", "-q"]  # noqa: E731
    secret = folder / "secret.bin"
    secret.write_bytes(np.ones((108, 40), np.float32).tobytes())
    (place / "link.bin").symlink_to(secret)
    os.link(secret, place / "hard.bin")
    os.mkfifo(place / "pipe.bin")
    length = str(108 * 40 * 4)
    places = [
        *(
            (at, "0", length)
            for at in ("../secret.bin", str(secret), "link.bin", "hard.bin", "pipe.bin", "/etc/passwd")
        ),
        *((at, "0", length) for at in ("/proc/self/mem", ".", "none.bin", "a\0b", "\x1b[31m")),
        *(
            ("hard.bin", *rest)
            for rest in (("99999999999", length), ("-1", length), ("0", "99999999999999"), ("x", length))
        ),
    ]
    for kind in (FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8):
        for location, offset, size in places:
            tensor = TensorProto(name="w", data_type=kind, dims=[108, 40], data_location=TensorProto.EXTERNAL)
            for key, value in (("location", location), ("offset", offset), ("length", size)):
                tensor.external_data.add(key=key, value=value)
            nodes = [node("Flatten", ["input"], ["f"]), node("Cast", ["w"], ["v"], to=FLOAT),
                     node("MatMul", ["f", "v"], ["linear"])]  # fmt: skip
            (place / "net.onnx").write_bytes(model(nodes, tensor).SerializeToString())
            yield f"data of kind {kind} at {location!r}, offset {offset}, length {size}", check()

    shape = lambda *sizes: helper.make_tensor("s", INT, [len(sizes)], sizes)  # noqa: E731
    flat = node("Flatten", ["input"], ["f"])
    loop = helper.make_graph(
        [node("Identity", ["c"], ["d"])], "b",
        [helper.make_tensor_value_info("i", INT, []), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )  # fmt: skip
    deep = helper.make_graph([flat], "g", [], [helper.make_tensor_value_info("f", FLOAT, None)])
    for i in range(15):  # protobuf reads no deeper ones
        other = deep if i < 8 else loop
        branch = node("If", ["c"], ["f"], then_branch=deep, else_branch=other)
        deep = helper.make_graph([branch], f"g{i}", [], deep.output)
    many = tuple(f"o{i}" for i in range(100))
    graphs: dict[str, onnx.ModelProto] = {
        "no nodes": model([]),
        "a cycle": model([node("Add", ["b", "input"], ["a"]), node("Add", ["a", "input"], ["b"]),
                          node("Identity", ["a"], ["linear"])]),
        "an unknown operator": model([node("Nonsense", ["input"], ["linear"])]),
        "an operator of another domain": model([node("X", ["input"], ["linear"], domain="com.evil")]),
        "one name twice": model([flat, node("Relu", ["input"], ["f"]), node("Identity", ["f"], ["linear"])]),
        "an input that is nowhere": model([node("Add", ["input", "nowhere"], ["linear"])]),
        "2**60 elements": model([node("ConstantOfShape", ["s"], ["linear"])], shape(2**30, 2**30)),
        "2**62 elements in a row": model([node("ConstantOfShape", ["s"], ["linear"])], shape(2**62)),
        "a negative shape": model([node("ConstantOfShape", ["s"], ["linear"])], shape(-7)),
        "opset 0": model([node("Relu", ["input"], ["linear"])], opset_imports=[helper.make_opsetid("", 0)]),
        "opset 9999": model([node("Relu", ["input"], ["linear"])], opset_imports=[helper.make_opsetid("", 9999)]),
        "no opset": model([node("Relu", ["input"], ["linear"])], opset_imports=[]),
        "IR version 9999": model([node("Relu", ["input"], ["linear"])], ir_version=9999),
        "branches within branches": model([deep.node[0], node("Identity", ["f"], ["linear"])]),
        "names with escape sequences": model([node("\x1b[31mRelu", ["input"], [RED])], outputs=(RED,)),
        "no output": model([node("Relu", ["input"], ["r"])], outputs=()),
        "100 outputs": model([node("Flatten", ["input"], [name]) for name in many], outputs=many),
        "a negative dimension": model([flat], TensorProto(name="w", data_type=FLOAT, dims=[-1, 40])),
        "a tensor of no type": model([flat], TensorProto(name="w", data_type=99, dims=[1], raw_data=b"1234")),
        "a tensor of too few bytes": model([flat], TensorProto(name="w", data_type=FLOAT, dims=[99], raw_data=b"1234")),
        "an attribute of the wrong type": model([node("Flatten", ["input"], ["linear"], axis="one")]),
        "an attribute out of range": model([node("Flatten", ["input"], ["linear"], axis=2**40)]),
        "a function that calls itself": model([node("F", ["input"], ["linear"], domain="own")], functions=[
            helper.make_function("own", "F", ["x"], ["y"], [node("F", ["x"], ["y"], domain="own")],
                                 [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)])],
            opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]),
    }  # fmt: skip
    for name, made in graphs.items():
        (place / "net.onnx").write_bytes(made.SerializeToString())
        yield name, check()
    for name, content in (("an empty file", b""), ("zeros", bytes(10_000)), ("text", b"not a model\n" * 99),
                          ("a zip", b"PK\x03\x04" + bytes(99)), ("ones", b"\xff" * 10_000)):  # fmt: skip
        (place / "net.onnx").write_bytes(content)
        yield name, check()
    for name, make in (("a folder", lambda path: path.mkdir()), ("a pipe", os.mkfifo)):
        (place / "net.onnx").unlink()
        make(place / "net.onnx")
        yield name, check()
        if name == "a folder":
            (place / "net.onnx").rmdir()
            (place / "net.onnx").touch()
