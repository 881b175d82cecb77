"""The JSON Schema of every report, made from the reports' own classes.

``python -m bnfold.report.schema`` writes ``schema.json`` anew; a test holds the two together.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from inspect import cleandoc, getsource, isclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bnfold import report
from bnfold.report.plain import SCHEMA_VERSION, Report, lines

PATH = Path(__file__).with_name("schema.json")
_PLAIN = {str: "string", bool: "boolean", int: "integer", type(None): "null"}


def schema() -> dict[str, Any]:
    """The schema, in the dialect of 2020-12: one kind of document per command."""
    definitions: dict[str, Any] = {}
    reports = [found for found in vars(report).values() if isclass(found) and found in Report.__subclasses__()]
    documents = {kind: _document(kind, found, definitions) for found in reports for kind in _kinds(found)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A report of bnfold",
        "description": "NaN and infinities are null. Times are in seconds, sizes in bytes, errors relative.",
        "type": "object",
        "properties": {"kind": {"enum": sorted(documents)}},
        "required": ["kind"],
        "allOf": [
            {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": document}
            for kind, document in sorted(documents.items())
        ],
        "$defs": dict(sorted(definitions.items())),
    }


def _kinds(found: type) -> tuple[str, ...]:
    hint = get_type_hints(found)["kind"]
    return get_args(hint) if get_origin(hint) is Literal else (found.kind,)  # type: ignore[attr-defined]


def _document(kind: str, found: type, definitions: dict[str, Any]) -> dict[str, Any]:
    whole = _object(found, definitions)
    text = {"type": "string"}
    head = {
        "schema": {"const": SCHEMA_VERSION},
        "bnfold": text | {"description": "the version that wrote it"},
        "kind": {"const": kind},
        "versions": {"type": "object", "additionalProperties": text, "description": "of the packages it rests on"},
    }
    properties = head | whole["properties"] | head
    return whole | {"properties": properties, "required": list(properties)}


def _object(found: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(found)
    properties = {field.name: _type(hints[field.name], definitions) for field in fields(found)}
    for name in getattr(found, "derived", ()):
        properties[name] = _type(get_type_hints(getattr(found, name).fget)["return"], definitions)
    summary, words = _described(found)
    for name, text in words.items():
        if text and name in properties:
            properties[name] = properties[name] | {"description": text}
    return {
        "type": "object", "description": summary, "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def _type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is float:
        return {"type": ["number", "null"]}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}  # a class that holds itself ends here
            definitions[name] = _object(hint, definitions)  # type: ignore[arg-type]
        return {"$ref": f"#/$defs/{name}"}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(part, definitions) for part in parts]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(parts[1], definitions)}
    if origin is tuple and parts[1:] == (...,):
        return {"type": "array", "items": _type(parts[0], definitions)}
    if origin is tuple:
        items = [_type(part, definitions) for part in parts]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if hint is Any:
        return {}
    raise TypeError(f"a report holds {hint}, for which there is no JSON")


def _described(found: type) -> tuple[str, dict[str, str]]:
    """The first sentence of a class's docstring, and what the comments at its fields and its properties say."""
    words, said = dict[str, str](), ""
    for line in getsource(found).splitlines():
        code, _, comment = line.strip().partition("#: ")
        said = f"{said} {comment}".strip()
        if code:  # whatever is above or behind it
            words[code.partition(":")[0]], said = said, ""
    words |= {name: getattr(found, name).__doc__ for name in getattr(found, "derived", ())}
    return " ".join(cleandoc(found.__doc__ or "").split("\n\n")[0].split()), words


def text() -> str:
    """The schema as ``schema.json`` holds it."""
    return lines(schema()) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
