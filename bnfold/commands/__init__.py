"""The commands, one function each: arguments -> pipeline -> printed report -> exit code."""

from __future__ import annotations

from bnfold.commands.judge import check
from bnfold.commands.look import doctor, inspect
from bnfold.commands.produce import export, fold

#: In the order of the help.
COMMANDS = (export, fold, check, inspect, doctor)

__all__ = ["COMMANDS"]
