"""A system of linear equations that grows: over the reals, or over GF(2).

Equations come in batches, and a batch is eliminated at once. The pivot of an equation is its highest variable in one
fixed total order, so a row holds lower variables alone, rows stay short, and no two rows wait for one another. What is
known is never changed by what comes later, so taking back is forgetting the latest rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: What is left of terms that cancel, relative to the sum of their magnitudes, is rounding up to here.
ROUNDING = 1e-12


#: Of so many substitutions at a time it is followed which came of which.
_SPAN = 1 << 15
#: See ``System.solved``.
Choose = Callable[[Ints, Ints, Floats, Floats], Floats]


@dataclass(frozen=True, eq=False)
class Batch:
    """Equations ``sum val * x[var] = rhs``, entries by the index of their equation, and where each comes from."""

    equation: Ints
    var: Ints
    val: Floats
    rhs: Floats
    origin: Ints

    @cached_property
    def starts(self) -> Ints:
        """Where the entries of every equation start."""
        return np.searchsorted(self.equation, np.arange(len(self.rhs) + 1))

    @classmethod
    def joined(cls, blocks: Iterable[tuple[Ints, Floats, Floats, int]]) -> Batch:
        """From blocks of equations of one length: variables and coefficients (n, m), right-hand sides, an origin."""
        variables, values, rhs, origins = zip(*blocks)
        counts = [len(each) for each in variables]
        lengths = np.repeat([each.shape[1] for each in variables], counts)
        return cls(
            np.repeat(np.arange(len(lengths)), lengths), np.concatenate([each.ravel() for each in variables]),
            np.concatenate([each.ravel() for each in values]), np.concatenate(rhs), np.repeat(origins, counts),
        )  # fmt: skip


#: What is on the right of an equation: its number, the sum of the magnitudes that made it up, and for logarithms what
#: it is the logarithm of, as a quotient, so that a product of few factors is exact.
_RHS, _SIZE, _NUMERATOR, _DENOMINATOR = range(4)


#: Products of very many factors leave the range of float64, which ``System._values`` asks for at the end.
_ANY_SIZE = np.errstate(over="ignore", invalid="ignore")


class _Column:
    """A numpy array that grows at its end."""

    def __init__(self, dtype: type, *width: int) -> None:
        self._held: NDArray[Any] = np.zeros((1024, *width), dtype)
        self.size = 0

    @property
    def now(self) -> Any:
        return self._held[: self.size]

    def extend(self, values: Any) -> None:
        end = self.size + len(values)
        if end > len(self._held):
            more = (max(end, len(self._held)), *self._held.shape[1:])
            self._held = np.concatenate([self._held, np.zeros(more, self._held.dtype)])
        self._held[self.size : end] = values
        self.size = end


def given(numbers: Floats, logs: bool) -> Floats:
    """Right-hand sides of numbers, (n, 2); with ``logs`` they are the logarithms of those, 0 meaning 1, and (n, 4)."""
    right = np.ones((len(numbers), 4 if logs else 2))
    if logs:
        right[:, _NUMERATOR] = np.where(numbers == 0, 1.0, numbers)
        numbers = np.log(right[:, _NUMERATOR])
    right[:, _RHS], right[:, _SIZE] = numbers, np.abs(numbers)
    return right


@_ANY_SIZE
def times(right: Floats, by: Floats) -> Floats:
    """Right-hand sides times a number each."""
    found = right.copy()
    found[:, _RHS] *= by
    found[:, _SIZE] *= np.abs(by)
    if (right[:, _NUMERATOR:] != 1).any():
        power = np.abs(by)[:, None]
        found[:, _NUMERATOR:] = np.where(by[:, None] > 0, right[:, _NUMERATOR:], right[:, :_SIZE:-1]) ** power
    return found


def _starts(numbers: Ints) -> Ints:
    """Where equal ones begin, of sorted numbers."""
    return np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])) if len(numbers) else numbers


class System:
    """The equations so far, in echelon form; a variable is a row's pivot, or free.

    ``binary``: over GF(2) in place of the reals. ``logs``: variables are logarithms, and right-hand sides are given as
    what they are the logarithms of; 0 means 1.
    """

    def __init__(self, *, binary: bool = False, logs: bool = False) -> None:
        self.binary, self.logs = binary, logs
        self._rank, self._row = _Column(np.int64), _Column(np.int64)  # by variable; a row of -1: it is free
        self._pivot, self._start, self._length = _Column(np.int64), _Column(np.int64), _Column(np.int64)
        self._right, self._source = _Column(np.float64, 4 if logs else 2), _Column(np.int64)  # by row, as those before
        self._cols, self._vals = _Column(np.int64), _Column(np.float64)
        self._batches: list[Batch] = []
        self._ends: list[int] = [0]
        #: Into which equations the rows of which others were put, in that order, and where the latest batch begins.
        self._users, self._used, self._began = _Column(np.int64), _Column(np.int64), 0

    def grow(self, ranks: Ints) -> None:
        """Adds variables, with their places in the total order."""
        self._rank.extend(ranks)
        self._row.extend(np.full(len(ranks), -1))

    @property
    def count(self) -> int:
        """How many equations it holds."""
        return self._ends[-1]

    def mark(self) -> tuple[int, int, int, int]:
        """A state to come back to."""
        return self._pivot.size, self._cols.size, len(self._batches), self._used.size

    def undo(self, mark: tuple[int, int, int, int]) -> None:
        """Forgets what was added since."""
        rows, entries, batches, uses = mark
        self._row.now[self._pivot.now[rows:]] = -1
        for column in (self._pivot, self._start, self._length, self._right, self._source):
            column.size = rows
        self._cols.size = self._vals.size = entries
        self._users.size = self._used.size = uses
        del self._batches[batches:], self._ends[batches + 1 :]

    # -- elimination -----------------------------------------------------------------------------------------------

    def add(self, batch: Batch) -> Ints:
        """Adds equations; answers those that contradict, by their index in the batch, and then has to be undone."""
        base, self._began = self._ends[-1], self._used.size
        self._batches.append(batch)
        self._ends.append(base + len(batch.rhs))
        left, marked = np.arange(len(batch.rhs)), np.zeros(len(batch.rhs), dtype=bool)
        right = given(batch.rhs, self.logs)
        equation, var, val = self._merged(batch.equation, batch.var, batch.val)
        fresh: list[Ints] = []
        while True:
            equation, var, val = self._reduced(equation, var, val, right, base)
            marked[equation] = True
            empty = left[~marked[left]]
            left = left[marked[left]]
            marked[equation] = False
            wrong = np.abs(right[empty, _RHS]) > (0.0 if self.binary else ROUNDING * right[empty, _SIZE])
            if wrong.any():
                return np.asarray(empty[wrong], dtype=np.int64)
            if not len(equation):
                break
            starts, rank = _starts(equation), self._rank.now[var]
            lengths = np.diff(np.append(starts, len(equation)))
            last = rank == np.repeat(np.maximum.reduceat(rank, starts), lengths)
            chosen = equation[starts][self._first(var[last])]
            marked[chosen] = True
            mine, left = marked[equation], left[~marked[left]]
            fresh.append(self._rows_of(equation[mine], var[mine], val[mine], last[mine], right, base))
            self._compress(fresh[-1])  # so that the rest goes along a whole chain of them at once
            marked[chosen] = False
            equation, var, val = equation[~mine], var[~mine], val[~mine]
        if len(fresh) > 1:
            self._compress(np.concatenate(fresh))
        return np.zeros(0, dtype=np.int64)

    def _first(self, variables: Ints) -> Any:
        """Which of them are the first of their kind."""
        places, found = np.arange(len(variables)), np.empty(self._rank.size, dtype=np.int64)
        found[variables[::-1]] = places[::-1]
        return found[variables] == places

    def _rows_of(self, equation: Ints, var: Ints, val: Floats, last: Any, right: Floats, base: int) -> Ints:
        """New rows from sorted equations, the pivot being the entry of each that is marked as the ``last``."""
        pivots, ids = var[last], equation[last]
        counts = np.diff(np.append(_starts(equation), len(equation)))
        by, lengths = np.repeat(val[last], counts), counts - 1
        rows = np.arange(self._pivot.size, self._pivot.size + len(pivots))
        self._row.now[pivots] = rows
        self._pivot.extend(pivots)
        self._source.extend(ids + base)
        self._right.extend(times(right[ids], 1 / val[last]))
        self._start.extend(self._cols.size + np.cumsum(lengths) - lengths)
        self._length.extend(lengths)
        self._cols.extend(var[~last])
        self._vals.extend(np.ones((~last).sum()) if self.binary else -(val / by)[~last])
        return rows

    def _gathered(self, rows: Ints) -> tuple[Ints, Ints, Floats]:
        """The entries of rows: which of ``rows`` each is of, variable, coefficient."""
        lengths = self._length.now[rows]
        if (lengths == 1).all():
            at = self._start.now[rows]
            return np.arange(len(rows)), self._cols.now[at], self._vals.now[at]
        owner = np.repeat(np.arange(len(rows)), lengths)
        at = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + self._start.now[rows][owner]
        return owner, self._cols.now[at], self._vals.now[at]

    @_ANY_SIZE
    def _put_in(self, equation: Ints, var: Ints, val: Floats, right: Floats) -> tuple[Any, ...] | None:
        """Rows in place of their pivots, once; also where which row went. None where there are no pivots."""
        row = self._row.now[var]
        hit = row >= 0
        if not hit.any():
            return None
        at, rows, by = equation[hit], row[hit], val[hit]
        owner, cols, vals = self._gathered(rows)
        moved = times(self._right.now[rows], -by)
        starts = _starts(at)
        to, columns = at[starts], [moved[:, i] for i in range(moved.shape[1])]
        if len(to) < len(at):
            sums = [np.add, np.add, np.multiply, np.multiply]
            columns = [by.reduceat(column, starts) for by, column in zip(sums, columns)]
        right[to, _RHS] += columns[_RHS]
        right[to, _SIZE] += columns[_SIZE]
        for i in range(_NUMERATOR, moved.shape[1]):
            right[to, i] *= columns[i]
        if self.binary:
            right[to, _RHS] %= 2
        found = self._merged(
            np.concatenate([equation[~hit], at[owner]]), np.concatenate([var[~hit], cols]),
            np.concatenate([val[~hit], vals * by[owner]]),
        )  # fmt: skip
        return *found, at, rows

    def _reduced(self, equation: Ints, var: Ints, val: Floats, right: Floats, base: int) -> tuple[Ints, Ints, Floats]:
        while (found := self._put_in(equation, var, val, right)) is not None:
            equation, var, val, at, rows = found
            self._note(at + base, rows)
        return equation, var, val

    def _note(self, equations: Ints, rows: Ints) -> None:
        self._users.extend(equations)
        self._used.extend(self._source.now[rows])

    def _compress(self, rows: Ints) -> None:
        """Puts rows into one another; each round doubles how far a row sees."""
        while len(rows):
            owner, cols, vals = self._gathered(rows)
            waits = np.zeros(len(rows), dtype=bool)
            waits[owner[self._row.now[cols] >= 0]] = True
            rows, mine = rows[waits], waits[owner]
            owner, cols, vals = (np.cumsum(waits) - 1)[owner[mine]], cols[mine], vals[mine]
            minus = -np.ones(len(rows))
            right = times(self._right.now[rows], minus)
            found = self._put_in(owner, cols, vals, right)
            if found is None:
                return
            owner, cols, vals, at, used = found
            self._note(self._source.now[rows][at], used)
            self._right.now[rows] = times(right, minus)
            if self.binary:
                self._right.now[rows, _RHS] %= 2
            lengths = np.bincount(owner, minlength=len(rows))
            self._start.now[rows] = self._cols.size + np.cumsum(lengths) - lengths
            self._length.now[rows] = lengths
            self._cols.extend(cols)
            self._vals.extend(vals)

    def _merged(self, equation: Ints, var: Ints, val: Floats) -> tuple[Ints, Ints, Floats]:
        """Sorted by equation, like terms together, and without those that cancel."""
        key = equation * max(self._rank.size, 1) + var
        if (key[1:] > key[:-1]).all():
            val = val % 2 if self.binary else val
            kept = val != 0
            return (equation, var, val) if kept.all() else (equation[kept], var[kept], val[kept])
        order = np.argsort(key, kind="stable")
        starts, val = _starts(key[order]), val[order]
        total = val if len(starts) == len(val) else np.add.reduceat(val, starts)
        if self.binary:
            total = total % 2
            kept = total != 0
        elif len(starts) == len(val):
            kept = total != 0
        else:
            kept = np.abs(total) > ROUNDING * np.add.reduceat(np.abs(val), starts)
        at = order[starts[kept]]
        return equation[at], var[at], total[kept]

    # -- answers ---------------------------------------------------------------------------------------------------

    def solved(self, choose: Choose | None = None) -> Floats:
        """A solution, for logarithms what they are the logarithms of; what is free is zero, if ``choose`` is not given.

        ``choose`` is called with entries (variable, free variable, coefficient), and what every variable is where all
        that is free is zero; it answers what every variable is, if it is free, in the same form (see ``times``).
        """
        with self._unchanged():  # rows that stay are put together from rows that may be taken back
            self._compress(np.arange(self._pivot.size))
            return self._values(choose)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Leaves rows as they are, whatever is put into them meanwhile."""
        columns = (self._start, self._length, self._right)
        held, entries, uses = [column.now.copy() for column in columns], self._cols.size, self._used.size
        try:
            yield
        finally:
            for column, numbers in zip(columns, held):
                column.now[:] = numbers
            self._cols.size = self._vals.size = entries
            self._users.size = self._used.size = uses

    @_ANY_SIZE
    def _values(self, choose: Choose | None) -> Floats:
        right = given(np.zeros(self._rank.size), self.logs)
        right[self._pivot.now] = self._right.now
        if choose is not None:
            free = np.flatnonzero(self._row.now < 0)
            owner, cols, vals = self._gathered(np.arange(self._pivot.size))
            var, root = np.concatenate([free, self._pivot.now[owner]]), np.concatenate([free, cols])
            val = np.concatenate([np.ones(len(free)), vals])
            terms = times(choose(var, root, val, right.copy())[root], val)
            np.add.at(right[:, :_NUMERATOR], var, terms[:, :_NUMERATOR])
            np.multiply.at(right[:, _NUMERATOR:], var, terms[:, _NUMERATOR:])
        found = np.where(np.abs(right[:, _RHS]) <= ROUNDING * right[:, _SIZE], 0.0, right[:, _RHS])
        if self.logs:
            with np.errstate(all="ignore"):
                exact = right[:, _NUMERATOR] / right[:, _DENOMINATOR]
                safe = np.isfinite(right[:, _NUMERATOR:]).all(1) & (right[:, _NUMERATOR:] > 1e-280).all(1)
                quotient = np.stack([np.where(safe, exact, np.exp(found)), np.where(safe, 1 / exact, np.exp(-found))])
                quotient[1][safe] = (right[:, _DENOMINATOR] / right[:, _NUMERATOR])[safe]
            return np.where(found == 0, 1.0, quotient)
        return found % 2 if self.binary else found

    def equation(self, number: int) -> tuple[Ints, Floats, float, int]:
        """An equation as it was added: variables, coefficients, right-hand side, origin."""
        which = bisect_right(self._ends, number) - 1
        batch, index = self._batches[which], number - self._ends[which]
        low, high = batch.starts[index], batch.starts[index + 1]
        rhs = float(batch.rhs[index])
        if self.logs:
            rhs = 0.0 if rhs in (0, 1) else float(given(batch.rhs[index : index + 1], True)[0, _RHS])
        return batch.var[low:high], batch.val[low:high], rhs, int(batch.origin[index])

    def latest(self, index: int) -> int:
        """The number of an equation of the latest batch."""
        return self._ends[-2] + index

    def origins(self, indices: Ints) -> Ints:
        """Where equations of the latest batch come from."""
        return self._batches[-1].origin[indices]

    def highest(self, indices: Ints) -> Ints:
        """The highest variables of equations of the latest batch."""
        batch = self._batches[-1]
        return np.maximum.reduceat(batch.var, batch.starts[:-1])[indices]

    def why(self, *indices: int, latest: bool = False) -> list[int]:
        """The equations that some of the latest batch contradict or follow from, themselves among them, latest first.

        ``latest``: of those only what is of that batch too.
        """
        found = np.zeros(self.count, dtype=bool)
        found[[self.latest(index) for index in indices]] = True
        low, base = (self._began, self.latest(0)) if latest else (0, 0)
        for end in range(self._used.size, low, -_SPAN):  # what was put in is of earlier ones
            users, used = (column.now[max(end - _SPAN, low) : end] for column in (self._users, self._used))
            while (more := used[found[users] & ~found[used] & (used >= base)]).size:
                found[more] = True
        return [int(number) for number in np.flatnonzero(found)[::-1]]
