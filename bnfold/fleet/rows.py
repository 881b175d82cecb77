"""The list of models: a TOML file -> a row per model, or everything that is wrong with it.

``models.schema.json`` says what may stand there: the options of ``export`` by their names on the command line, without
the dashes, and what only a fleet has. ``[defaults]`` holds for every ``[[model]]`` that does not say otherwise. Paths
are relative to the folder of the file, in which every export runs.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bnfold.errors import InputError, UsageError
from bnfold.fleet.places import is_url

SCHEMA = Path(__file__).with_name("models.schema.json")
#: What only a fleet has.
OWN: dict[str, dict[str, Any]] = {
    "name": {"type": "string", "description": "Of the model's files. Default: the last part of the source."},
    "source": {"type": "string", "minLength": 1, "description": "As for export, which the README tells."},
    "timeout": {"type": "number", "exclusiveMinimum": 0, "description": "Seconds until its process is ended."},
    "memory": {"type": "string", "pattern": r"^\d+(\.\d+)? ?[KMGT]?i?B$", "description": "Of its process, as '2 GB'."},
    "resources": {
        "type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
        "description": "Of Dask's workers, as {GPU = 1}, which a device on a GPU of NVIDIA's stands for.",
    },
    "bench": {"type": "boolean", "description": "Measure the latency of the file as well."},
}  # fmt: skip
#: Options whose value is a file, here or anywhere that fsspec opens.
FILES = ("weights", "data", "baseline")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


class ListError(UsageError):
    """Everything that is wrong with a list of models, a line each."""

    def __init__(self, faults: Iterable[str], where: str) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults), where=where)


@dataclass(frozen=True)
class Row:
    """One model: its source, its options for ``export`` by name, and what only a fleet has, which ``OWN`` describes.

    None stands for the fleet's timeout, in seconds, and for the worker's memory, in bytes.
    """

    name: str
    source: str
    options: Mapping[str, Any]
    timeout: float | None = None
    memory: int | None = None
    resources: tuple[tuple[str, float], ...] = ()
    bench: bool = False

    def words(self, files: Mapping[str, str]) -> list[str]:
        """The options as the command line has them; ``files`` says where some are."""
        found: list[str] = []
        for name, value in self.options.items():
            if isinstance(value, bool):
                found.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, dict):
                found += [f"--{name}={key}={item!r}" for key, item in value.items()]
            else:
                found += [
                    f"--{name}={item}" for item in (value if isinstance(value, list) else [files.get(name, value)])
                ]
        return found


def size_of(text: str) -> int:
    """Bytes of ``"2 GB"`` or ``"512MiB"``; UsageError where it is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", text)
    if found is None:
        raise UsageError(f"{text!r} is no size", hint="Write it as '2 GB' or '512 MiB'")
    number, unit, binary = found.groups()
    return int(float(number) * (2 ** (10 * list(_UNITS).index(unit)) if binary else _UNITS[unit]))


def read_rows(path: Path) -> list[Row]:
    """The models of a list; InputError where it cannot be read, ListError where it is not what the schema says."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ListError([f"this is no TOML: {error}"], str(path)) from error
    faults = list(_faults(document, _schema()))
    defaults: dict[str, Any] = document.get("defaults", {})
    models = document.get("model")
    if not faults:
        merged = [_merged(defaults, model) for model in models or ()]
        if defaults:  # each alone is right: only together can options contradict one another
            model_schema = _schema()["$defs"]["model"] | {"$defs": _schema()["$defs"]}
            faults = [
                f"{_called(i, model)}: {fault}"
                for i, model in enumerate(merged)
                for fault in _faults(model, model_schema)
            ]
    if isinstance(models, list):
        faults += _name_faults([model for model in models if isinstance(model, dict)])
    if faults:
        raise ListError(faults, str(path))
    return [_row(model) for model in merged]


def name_of(model: Mapping[str, Any]) -> str:
    """What a model is called that has no name: ``models/digits.py:cnn`` is ``cnn``, ``net.pt2`` is ``net``."""
    if "name" in model:
        return str(model["name"])
    source = str(model.get("source", ""))
    last = re.split(r"[/\\]", source)[-1]
    return last.rpartition(":")[2] if re.search(r":[^:]+$", last) else Path(last).stem


def _row(model: dict[str, Any]) -> Row:
    resources = dict(model.get("resources", {}))
    if "device" in model:
        from bnfold.runtime.runtime import on_gpu  # with numpy, which the words of a list need not

        if on_gpu(model["device"]):
            resources.setdefault("GPU", 1)
    memory = size_of(model["memory"]) if "memory" in model else None
    return Row(
        name_of(model), model["source"], {key: model[key] for key in sorted(set(model) - set(OWN))},
        model.get("timeout"), memory, tuple(sorted(resources.items())), model.get("bench", False),
    )  # fmt: skip


def _merged(defaults: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """A flag that is off is as if it were not there; only of those that can be told off, off says something."""
    known = _schema()["$defs"]["model"]["properties"]
    every = {**defaults, **model}
    return {key: value for key, value in every.items() if value is not False or "default" not in known[key]}


# -- what is wrong -----------------------------------------------------------------------------------------------------


@cache
def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def _faults(document: Any, schema: dict[str, Any]) -> Iterator[str]:
    import jsonschema

    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        place = _place(error.absolute_path, document)
        if error.validator == "additionalProperties" and isinstance(error.validator_value, bool):
            known = tuple(error.schema["properties"])
            for key in sorted(set(error.instance) - set(known)):
                yield f"{place}there is no {key!r}{_nearest(key, known)}"
        elif error.validator == "not":
            path, other = list(error.schema_path), error.validator_value["required"][0]
            one = path[path.index("dependentSchemas") + 1]
            yield f"{place}{one} and {other} contradict each other: leave one of them out"
        else:
            yield place + _said(error)


def _said(error: Any) -> str:
    """A fault in the words of TOML: the library's speak of JSON, and repeat the value however long it is."""
    value, wanted = repr(error.instance), error.validator_value
    value = value if len(value) <= 60 else f"{value[:57]}..."
    words = {
        "type": f"{value} is no {wanted}",
        "enum": f"{value} is none of {', '.join(map(str, wanted if isinstance(wanted, list) else ()))}",
        "required": error.message.replace(" is a required property", " is missing"),
        "minimum": f"{value} is less than {wanted}",
        "maximum": f"{value} is more than {wanted}",
        "exclusiveMinimum": f"{value} is not more than {wanted}",
        "pattern": f"{value} is not written like '2 GB'",
        "minItems": "there is none",
        "minLength": "it is empty",
    }
    return words.get(error.validator) or str(error.message)[:200]


@cache
def _nearest(key: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    return f". Did you mean {near[0]}?" if near else ""


def _place(path: Iterable[Any], document: Any) -> str:
    parts = list(path)
    model = _called(parts[1], document["model"][parts[1]]) + ": " if parts[:1] == ["model"] and parts[1:] else ""
    rest = ".".join(map(str, parts[2:] if model else parts))
    return f"{model}{rest}{': ' * bool(rest)}"


def _called(index: int, model: Any) -> str:
    return f"model {index + 1} ({name_of(model)!r})" if isinstance(model, dict) else f"model {index + 1}"


def _name_faults(models: list[dict[str, Any]]) -> Iterator[str]:
    taken: dict[str, int] = {}
    for i, model in enumerate(models):
        name = name_of(model)
        if not isinstance(model.get("name", ""), str) or ("name" not in model and not model.get("source")):
            continue  # told already
        way = "" if "name" in model else ": give it one"
        if not _NAME.fullmatch(name) or name.endswith("."):
            yield f"model {i + 1}: {name[:60]!r} is no name of a file{way}; letters, digits and _ . + - are"
        elif name.lower() == "index":
            yield f"model {i + 1}: the name 'index' is that of the page of all models{way or ': choose another'}"
        elif name.lower() in taken:  # on some file systems they would be one file
            yield f"model {i + 1}: {name!r} is the name of model {taken[name.lower()] + 1} too: give each its own"
        taken.setdefault(name.lower(), i)


def input_files(row: Row, folder: str) -> dict[str, str]:
    """The files that a row names, by option; those of this machine with their folder."""
    found = {name: str(row.options[name]) for name in FILES if name in row.options}
    return {name: place if is_url(place) else str(Path(folder, place)) for name, place in found.items()}
