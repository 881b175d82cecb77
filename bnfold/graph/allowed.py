"""The operators that a stranger's program may hold: those that compute on tensors and numbers alone.

An allow-list and no pattern: an operator is looked up by its whole name, because one that maps files (``from_file``),
writes them (``image::write_file``), calls methods of custom classes or launches kernels is spelt like any other.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

_ALLOWED = {
    namespace: frozenset(names.split())
    for namespace, names in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
}
_MODULES = ("torch", "math", "_operator")


def is_allowed(target: str) -> bool:
    """Whether an operator, as ``torch.export.save`` spells it, is one of them.

    >>> is_allowed("torch.ops.aten.relu_.default"), is_allowed("torch.ops.aten.from_file.default")
    (True, False)
    """
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5):
        namespace, name = parts[2:4]
        plain = name.removesuffix("_") if namespace == "aten" else name
        return namespace not in _MODULES and bool({name, plain} & _ALLOWED.get(namespace, frozenset()))
    return len(parts) == 2 and parts[0] in _MODULES and parts[1] in _ALLOWED[parts[0]]
