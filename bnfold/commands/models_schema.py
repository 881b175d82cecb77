"""The JSON Schema of the list of models of a fleet, made from the options of ``export``.

``python -m bnfold.commands.models_schema`` writes ``models.schema.json`` anew; a test holds the two together.
"""

from __future__ import annotations

from typing import Any

import click

from bnfold.commands import export
from bnfold.commands.arguments import CLASHES

#: Options of export that are the fleet's to give.
_GIVEN = {"output", "report", "as_json", "verbose", "quiet", "dry_run", "debug", "help"}


def schema() -> dict[str, Any]:
    """The JSON Schema of the list of models, made from the options of ``export``."""
    from bnfold.fleet.rows import OWN

    options = [p for p in export.params if isinstance(p, click.Option) and p.name not in _GIVEN]
    names = {option.name: option.opts[0].lstrip("-") for option in options}
    properties = {names[option.name]: _property(option) for option in options} | OWN
    clashes = [(names[a], names[b]) for a, b in CLASHES if a in names and b in names]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The models of a fleet",
        "description": "The options of bnfold export by their names, and what only a fleet has.",
        "type": "object",
        "additionalProperties": False,
        "required": ["model"],
        "properties": {
            "defaults": _table({name: value for name, value in properties.items() if name not in ("name", "source")}),
            "model": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/model"}},
        },
        "$defs": {
            "model": _table(properties)
            | {"required": ["source"], "dependentSchemas": {a: _without(a, clashes, properties) for a, _ in clashes}}
        },
    }


def _table(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _without(name: str, clashes: list[tuple[str, str]], properties: dict[str, Any]) -> dict[str, Any]:
    """What must not stand beside an option; a flag that is off stands beside anything."""

    def on(option: str) -> dict[str, Any]:
        return {option: {"const": True}} if "default" in properties[option] else {}

    others = [other for one, other in clashes if one == name]
    return {"allOf": [{"not": {"required": [o], "properties": on(name) | on(o)}} for o in others]}


def _property(option: click.Option) -> dict[str, Any]:
    kind, found = option.type, {"description": option.help or ""}
    if option.name == "args":
        return found | {"type": "object"}
    if option.is_flag:
        return found | {"type": "boolean"} | ({} if option.secondary_opts else {"default": False})
    if option.multiple:
        return found | {"type": "array", "items": {"type": "string"}}
    if isinstance(kind, click.Choice):
        return found | {"enum": list(kind.choices)}
    if isinstance(kind, click.IntRange):
        limits = {"minimum": kind.min, "maximum": kind.max}
        return found | {"type": "integer"} | {name: limit for name, limit in limits.items() if limit is not None}
    if kind is click.INT or isinstance(kind, click.types.FloatParamType):
        return found | {"type": "number", "exclusiveMinimum": 0}
    return found | {"type": "string"}


if __name__ == "__main__":
    from bnfold.fleet.rows import SCHEMA
    from bnfold.report.plain import lines

    SCHEMA.write_text(lines(schema()) + "\n", encoding="utf-8")
