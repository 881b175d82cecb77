"""The list of models: what it may say, and every way in which it may be wrong, each told in a line and all at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bnfold.commands.models_schema import schema
from bnfold.errors import InputError, UsageError
from bnfold.fleet.rows import SCHEMA, ListError, Row, name_of, read_rows, size_of
from bnfold.report.plain import lines

ROOT = Path(__file__).resolve().parent.parent


def rows_of(text: str, folder: Path) -> list[Row]:
    path = folder / "models.toml"
    path.write_text(text, encoding="utf-8")
    return read_rows(path)


def faults_of(text: str, folder: Path) -> tuple[str, ...]:
    with pytest.raises(ListError) as caught:
        rows_of(text, folder)
    return caught.value.faults


def test_the_schema_in_the_package_is_that_of_the_options() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert SCHEMA.read_text() == lines(schema()) + "\n", "run python -m bnfold.commands.models_schema"


def test_every_option_becomes_words_of_the_command_line(tmp_path: Path) -> None:
    text = """
        [defaults]
        samples = 20
        no-merge = true
        [[model]]
        source = "net.py:make"
        arg = {width = 32, kind = "a b", wide = false}
        input = ["x:float32[N,3,H,W]", "y:int64[N]"]
        limit = 2.5
        no-merge = false
        external-data = false
        weights = "s3://bucket/w.safetensors"
    """
    (row,) = rows_of(text, tmp_path)
    assert (row.name, row.source) == ("make", "net.py:make")
    assert row.words({"weights": "/tmp/w.safetensors"}) == [
        "--arg=width=32", "--arg=kind='a b'", "--arg=wide=False", "--no-external-data",
        "--input=x:float32[N,3,H,W]", "--input=y:int64[N]", "--limit=2.5", "--samples=20",
        "--weights=/tmp/w.safetensors",
    ]  # fmt: skip


def test_what_only_a_fleet_has_is_no_option_of_export(tmp_path: Path) -> None:
    text = """
        [defaults]
        device = "cuda"
        timeout = 60
        [[model]]
        source = "net.pt2"
        memory = "1.5 GiB"
        bench = true
        [[model]]
        name = "other"
        source = "net.pt2"
        device = "cpu"
        timeout = 5.5
        resources = {TPU = 2}
    """
    one, other = rows_of(text, tmp_path)
    assert (one.timeout, one.memory, one.bench, one.resources) == (60, 3 << 29, True, (("GPU", 1),))
    assert (other.timeout, other.memory, other.bench, other.resources) == (5.5, None, False, (("TPU", 2),))
    assert one.options == {"device": "cuda"} and other.options == {"device": "cpu"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models/digits.py:cnn", "cnn"), ("pkg.mod:Net", "Net"), ("timm:resnet18", "resnet18"), ("a/net.pt2", "net"),
        ("hf:dir/small", "small"), ("C:\\nets\\net.pt2", "net"),
    ],
)  # fmt: skip
def test_a_model_without_a_name_has_that_of_its_source(source: str, name: str) -> None:
    assert name_of({"source": source}) == name


@pytest.mark.parametrize(
    ("text", "size"), [("1 B", 1), ("2 GB", 2 * 10**9), ("512MiB", 1 << 29), ("1.5 KB", 1500), ("3TB", 3 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-1 GB", "2 gb", "1e9 B", "2 GB "])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        size_of(text)


MODEL = '[[model]]\nsource = "net.py:make"\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (MODEL + "optset = 20", "model 1 ('make'): there is no 'optset'. Did you mean opset?"),
        (MODEL + 'weights_key = "ema"', "model 1 ('make'): there is no 'weights_key'. Did you mean weights-key?"),
        (MODEL + "zzzzz = 1", "model 1 ('make'): there is no 'zzzzz'"),
        (MODEL + "output = 'x.onnx'", "model 1 ('make'): there is no 'output'.*"),
        (MODEL + "samples = 'ten'", "model 1 ('make'): samples: 'ten' is no integer"),
        (MODEL + "samples = true", "model 1 ('make'): samples: True is no integer"),
        (MODEL + "samples = 0", "model 1 ('make'): samples: 0 is less than 1"),
        (MODEL + "seed = 99999999999", "model 1 ('make'): seed: 99999999999 is more than 2147483647"),
        (MODEL + "limit = -1.0", "model 1 ('make'): limit: -1.0 is not more than 0"),
        (MODEL + "input = 'x:float32[N,3]'", "model 1 ('make'): input: 'x:float32[N,3]' is no array"),
        (MODEL + "input = [3]", "model 1 ('make'): input.0: 3 is no string"),
        (MODEL + "static = 1", "model 1 ('make'): static: 1 is no boolean"),
        (MODEL + "dtype = 'float8'", "model 1 ('make'): dtype: 'float8' is none of float32, float16, bfloat16"),
        (MODEL + "memory = 2", "model 1 ('make'): memory: 2 is no string"),
        (MODEL + "memory = 'lots'", "model 1 ('make'): memory: 'lots' is not written like '2 GB'"),
        (MODEL + "timeout = 0", "model 1 ('make'): timeout: 0 is not more than 0"),
        (MODEL + "resources = {GPU = -1}", "model 1 ('make'): resources.GPU: -1 is not more than 0"),
        (MODEL + "static = true\ndynamic = ['N=1..4']", ".*static and dynamic contradict each other: leave one.*"),
        ("[defaults]\nstatic = true\n" + MODEL + "dynamic = ['N=1..4']", ".*static and dynamic contradict.*"),
        ("[defaults]\nname = 'x'\n" + MODEL, "defaults: there is no 'name'.*"),
        ("[default]\nseed = 1\n" + MODEL, "there is no 'default'. Did you mean defaults?"),
        ("[[model]]\nname = 'x'", "model 1 ('x'): 'source' is missing"),
        ("[[model]]\nsource = ''\nname = 'x'", "model 1 ('x'): source: it is empty"),
        ("[model]\nsource = 'net.pt2'", "model: {'source': 'net.pt2'} is no array"),
        ("model = []", "model: there is none"),
        ("model = [3]", "model 1: 3 is no object"),
        ("", "'model' is missing"),
        ("[[model]\n", "this is no TOML: .*"),
        (MODEL + "name = '../../etc/x'", "model 1: '../../etc/x' is no name of a file; .*"),
        (MODEL + "name = 'a/b'", "model 1: 'a/b' is no name of a file; .*"),
        (MODEL + "name = ''", "model 1: '' is no name of a file; .*"),
        (MODEL + 'name = "a\\u001b[2Jb"', r"model 1: 'a\x1b[2Jb' is no name of a file; .*"),
        (MODEL + "name = '.fleet'", "model 1: '.fleet' is no name of a file; .*"),
        (MODEL + f"name = '{'x' * 200}'", f"model 1: '{'x' * 60}' is no name of a file; .*"),
        (MODEL + "name = 'Index'", "model 1: the name 'index' is that of the page of all models.*"),
        ("[[model]]\nsource = 'a/..'", "model 1: '.*' is no name of a file: give it one; .*"),
        (MODEL + MODEL, "model 2: 'make' is the name of model 1 too: give each its own"),
        (MODEL + MODEL + "name = 'MAKE'", "model 2: 'MAKE' is the name of model 1 too: give each its own"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(text: str, fault: str, tmp_path: Path) -> None:
    (found,) = faults_of(text, tmp_path)
    assert found == fault or re.fullmatch(re.escape(fault).replace(r"\.\*", ".*"), found), found
    assert found.isprintable()


def test_a_flag_that_is_off_contradicts_nothing(tmp_path: Path) -> None:
    (row,) = rows_of("[defaults]\nstatic = true\n" + MODEL + "static = false\ndynamic = ['N=1..4']", tmp_path)
    assert "--static" not in row.words({})


def test_a_missing_list_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_rows(tmp_path / "none.toml")
    (tmp_path / "models.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ListError, match="this is no TOML"):
        read_rows(tmp_path / "models.toml")


def test_a_hundred_thousand_rows_with_a_fault_each(tmp_path: Path) -> None:
    kinds = ["optset = 20", "samples = 'ten'", "name = '../x'", 'source = "net.py:make"']
    text = "".join(f"[[model]]\n{'' if i % 4 == 3 else MODEL[10:]}{kinds[i % 4]}\n" for i in range(100_000))
    faults = faults_of(text, tmp_path)
    assert len([fault for fault in faults if "optset" in fault]) == 25_000
    assert len([fault for fault in faults if "'ten' is no integer" in fault]) == 25_000
    assert len([fault for fault in faults if "is no name of a file" in fault]) == 25_000
    assert len([fault for fault in faults if "is the name of model" in fault]) == 74_999


def test_the_list_beside_the_models_has_all_of_them() -> None:
    found: Any = [row.name for row in read_rows(ROOT / "models" / "fleet.toml")]
    assert json.dumps(found) == '["digits_cnn", "digits_tcn", "digits_mlp", "digits_cnn_unmerged"]'
