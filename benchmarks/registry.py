"""What an operation tells the harness: cases, their peers, how results are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Skip(Exception):  # noqa: N818 - an outcome, not a failure
    """A peer or a case cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A result against the truth: ``error`` has to stay within ``tolerance``."""

    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the result counts. NaN does not."""
        return self.error <= self.tolerance


@dataclasses.dataclass
class Peer:
    """One way to compute a case.

    Parameters
    ----------
    name : str
        The first word selects it on the command line: ``subquad ...`` are ours.
    setup : callable
        Returns the zero-argument callable that is timed. Raises `Skip` or `ImportError`
        where the peer cannot run.
    check : callable, optional
        Result to `Check`; default, the case's.
    warm : callable, optional
        Setup of the same peer on a small problem, called before extra memory is
        measured, so that libraries and thread pools do not count.
    bytes_needed : float
        The peer is skipped where less memory is available.
    work : float, optional
        Floating-point operations, where they differ from the case's.
    limit : mapping, optional
        As in `Case`, where it differs from the case's.
    timer : callable, optional
        Call and number of repeats to seconds per call, where work goes on after a call
        has returned; default, the host's clock.
    """

    name: str
    setup: Callable[[], Callable[[], Any]]
    check: Callable[[Any], Check] | None = None
    warm: Callable[[], Callable[[], Any]] | None = None
    bytes_needed: float = 0.0
    work: float | None = None
    limit: Mapping[str, float | None] | None = None
    timer: Callable[[Callable[[], Any], int], float] | None = None


@dataclasses.dataclass
class Case:
    """One problem and its peers.

    Parameters
    ----------
    name : str
        Unique within the operation.
    peers : list of Peer
        Interleaved in one process.
    check : callable
        Result to `Check`.
    limit : mapping
        Seconds the machine cannot go below, by part, from rates measured in the same
        run; None where a rate was not measured.
    overlap : bool
        Whether other units do each of the parts: the limit is then the largest, and
        else their sum.
    work : float, optional
        Floating-point operations.
    memory : bool
        Whether extra memory is measured too, each peer in a process of its own.
    values : mapping
        What else belongs to the case (sizes, published numbers).
    measure : callable, optional
        Peer name and result to further values of the row.
    """

    name: str
    peers: list[Peer]
    check: Callable[[Any], Check]
    limit: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    overlap: bool = False
    work: float | None = None
    memory: bool = False
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Callable[[str, Any], Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Size:
    """A size from the command line: ``n`` rows, ``d`` columns (None: the default)."""

    n: int
    d: int | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What an operation may read."""

    threads: int
    rates: Any
    sizes: tuple[Size, ...] = ()
    device: Any = None

    def grid(self, sizes: Iterable[int], dims: Iterable[int]) -> list[tuple[int, int]]:
        """Return the (n, d) to run: the command line's sizes, the rest by default."""
        dims = tuple(dims)
        given = self.sizes or tuple(Size(n) for n in sizes)
        return [(s.n, d) for s in given for d in ((s.d,) if s.d else dims)]


Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A registered operation; `cases` yields one case at a time."""

    name: str
    cases: Callable[[Options], Iterable[Case]]
    summary: Callable[[list[Row]], list[str]] | None = None
    plot: Callable[[list[Row], str], None] | None = None
    rounds: int | None = None

    @property
    def help(self) -> str:
        """Return the first line of the docstring of `cases`."""
        return next(iter((self.cases.__doc__ or "").strip().splitlines()), "")


OPERATIONS: dict[str, Operation] = {}


def register(
    name: str,
    *,
    summary: Callable[[list[Row]], list[str]] | None = None,
    plot: Callable[[list[Row], str], None] | None = None,
    rounds: int | None = None,
) -> Callable[
    [Callable[[Options], Iterable[Case]]], Callable[[Options], Iterable[Case]]
]:
    """Register a generator of cases as operation `name`."""

    def decorate(cases: Callable[[Options], Iterable[Case]]) -> Any:
        if name in OPERATIONS:
            raise ValueError(f"operation {name!r} is registered twice")
        OPERATIONS[name] = Operation(name, cases, summary, plot, rounds)
        return cases

    return decorate
