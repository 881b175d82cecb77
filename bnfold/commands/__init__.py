"""The commands, one function each: arguments -> pipeline -> printed report -> exit code."""

from __future__ import annotations

from bnfold.commands.judge import bisect, check
from bnfold.commands.look import doctor, inspect
from bnfold.commands.many import fleet
from bnfold.commands.measure import bench
from bnfold.commands.produce import calibrate, export, fold

#: In the order of the help.
COMMANDS = (export, fold, check, bisect, inspect, calibrate, fleet, bench, doctor)
