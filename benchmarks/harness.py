"""Run operations: check, time in interleaved rounds, print, write JSON and figures."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import cuda, machine
from benchmarks.registry import (
    OPERATIONS,
    Case,
    Operation,
    Options,
    Peer,
    Row,
    Size,
    Skip,
)

MODULES = (
    "tile_product",
    "normalizers",
    "scans",
    "attention",
    "features",
    "factors",
    "embedding",
    "gpu",
    "gpu_scans",
    "gpu_features",
    "gpu_factors",
    "gpu_embedding",
)
SCHEMA = 1
# A timed block is at least this long, so that the clock does not show in tiny calls.
BLOCK_SECONDS = 2e-3
# A call longer than this is not repeated more than three times.
LONG_SECONDS = 5.0
# Idle workers of the last peer spin before they sleep (OpenBLAS: 2^28 cycles), and
# would take the processors from the next.
IDLE_SECONDS = 0.15
# A shorter call is made once, untimed, before it is timed: to wake its own workers.
WARM_SECONDS = 0.3


def load_operations() -> dict[str, Operation]:
    """Import the modules that register operations."""
    for name in MODULES:
        importlib.import_module(f"benchmarks.{name}")
    return OPERATIONS


def _seconds_per_call(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any], timer: cuda.Timer = _seconds_per_call) -> int:
    repeats = 1
    while (once := timer(call, repeats)) * repeats < BLOCK_SECONDS:
        repeats = max(2 * repeats, math.ceil(BLOCK_SECONDS / max(once, 1e-9)))
    return repeats


def _blank_row(operation: str, case: Case | None, peer: str) -> Row:
    return {
        "op": operation,
        "case": case.name if case else "",
        "peer": peer,
        "status": "skipped",
        "reason": "",
        "median": None,
        "min": None,
        "max": None,
        "rounds": 0,
        "error": None,
        "tolerance": None,
        "note": "",
        "limit": None,
        "limit_parts": {},
        "ratio_to_limit": None,
        "ratio_to_subquad": None,
        "gflops": None,
        "extra_memory": None,
        "values": dict(case.values) if case else {},
    }


def _limit(case: Case, peer: Peer) -> tuple[float | None, dict[str, float | None]]:
    parts = dict(case.limit if peer.limit is None else peer.limit)
    if not parts or any(part is None for part in parts.values()):
        return None, parts
    known = [part for part in parts.values() if part is not None]
    return max(known) if case.overlap else sum(known), parts


def _reason(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"package {error.name} missing"
    if isinstance(error, MemoryError):
        return "memory: the allocation failed"
    return (
        f"{type(error).__name__}: {error}"
        if not isinstance(error, Skip)
        else str(error)
    )


def _prepare(case: Case, peer: Peer, row: Row) -> Callable[[], Any] | None:
    """Set a peer up and check its first result; None, and a reason, where it fails."""
    free = machine.available_memory()
    if peer.bytes_needed > free:
        row["reason"] = (
            f"memory: needs {peer.bytes_needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} available"
        )
        return None
    try:
        call = peer.setup()
    except (Skip, ImportError, MemoryError) as error:
        row["reason"] = _reason(error)
        return None
    except Exception as error:  # noqa: BLE001 - a peer's failure is a row, never a lost run
        row.update(status="failed check", reason=f"setup: {_reason(error)}")
        return None
    try:
        start = time.perf_counter()
        result = call()
        row["first"] = time.perf_counter() - start
        check = (peer.check or case.check)(result)
        row["values"] |= case.measure(peer.name, result) if case.measure else {}
    except (Skip, MemoryError) as error:
        row["reason"] = _reason(error)
        return None
    except Exception as error:  # noqa: BLE001
        row.update(status="failed check", reason=_reason(error))
        return None
    row.update(error=check.error, tolerance=check.tolerance, note=check.note)
    if not check.passed:
        row.update(
            status="failed check",
            reason=f"error {check.error:.3g} exceeds {check.tolerance:.3g}",
        )
        return None
    if peer.timer is not None:
        # The first call may have compiled, and may have returned before the work ended.
        row["first"] = peer.timer(call, 1)
    return call


def run_case(
    operation: str, case: Case, rounds: int, peers: tuple[str, ...] = ()
) -> list[Row]:
    """Check every peer of a case, then time those that passed, each once a round."""
    rows: list[Row] = []
    calls: list[tuple[Row, Peer, Callable[[], Any], int, bool]] = []
    for peer in case.peers:
        if peers and peer.name.split()[0] not in peers and peer.name not in peers:
            continue
        row = _blank_row(operation, case, peer.name)
        rows.append(row)
        call = _prepare(case, peer, row)
        first = row.pop("first", 0.0)
        if call is not None:
            row["rounds"] = min(rounds, 3) if first > LONG_SECONDS else rounds
            timer = peer.timer or _seconds_per_call
            repeats = 1 if first > 0.1 else _repeats(call, timer)
            calls.append((row, peer, call, repeats, first < WARM_SECONDS))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(max((row["rounds"] for row, *_ in calls), default=0)):
        # Each round starts with another peer: nobody always follows the same one.
        for place in range(len(calls)):
            index = (place + turn) % len(calls)
            row, peer, call, repeats, is_warmed = calls[index]
            if turn < row["rounds"]:
                if peer.timer is None:
                    time.sleep(IDLE_SECONDS)
                if is_warmed:
                    call()
                times[index].append((peer.timer or _seconds_per_call)(call, repeats))
    for (row, peer, *_), measured in zip(calls, times, strict=True):
        median = statistics.median(measured)
        limit, parts = _limit(case, peer)
        work = peer.work if peer.work is not None else case.work
        row.update(
            status="ok",
            median=median,
            min=min(measured),
            max=max(measured),
            limit=limit,
            limit_parts=parts,
            ratio_to_limit=None if limit is None else median / limit,
            gflops=None if work is None else work / median / 1e9,
        )
    ours = next(
        (row["median"] for row in rows if row["peer"].split()[0] == "subquad"), None
    )
    for row in rows:
        if ours and row["median"]:
            row["ratio_to_subquad"] = row["median"] / ours
    return rows


def _child_arguments(options: argparse.Namespace) -> list[str]:
    arguments = ["--threads", str(options.threads), "--device", options.device]
    if options.sizes:
        arguments += ["--sizes", options.sizes]
    return arguments


def _extra_memory(
    options: argparse.Namespace, operation: str, case: str, peer: str
) -> Any:
    """Return one peer's extra bytes, from a process of its own, or why not."""
    if not sys.platform.startswith("linux"):
        return "needs /proc"
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--op", operation]
        + ["--measure-memory", case, peer, *_child_arguments(options)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parent.parent,
    )
    if child.returncode:
        return (child.stderr.strip().splitlines() or ["failed"])[-1]
    return float(child.stdout.strip().splitlines()[-1])


def _measure_memory(options: argparse.Namespace) -> int:
    """Print how much one call adds to the resident peak, inputs and libraries apart."""
    case_name, peer_name = options.measure_memory
    operation = load_operations()[options.op]
    for case in operation.cases(_options(options)):
        if case.name != case_name:
            continue
        peer = next(peer for peer in case.peers if peer.name == peer_name)
        if peer.warm is not None:
            peer.warm()()
        call = peer.setup()
        gc.collect()
        before = machine.resident_baseline()
        result = call()
        print(max(0.0, machine.resident_peak() - before))
        del result
        return 0
    print(f"no case {case_name!r}", file=sys.stderr)
    return 1


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def format_seconds(value: float | None) -> str:
    """Return a time with its unit."""
    if value is None:
        return "-"
    for unit, scale in (("s ", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1.0:
            return f"{value * scale:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


HEADER = (
    f"{'case':<34} {'peer':<32} {'median':>11} {'min':>11} {'max':>11} {'GFLOP/s':>8} "
    f"{'limit':>11} {'x limit':>8} {'x ours':>7} {'error':>9} {'extra':>9}"
)


def format_row(row: Row) -> str:
    """Return a row as one printed line."""
    head = f"{row['case']:<34} {row['peer']:<32} "
    if row["status"] == "skipped":
        return head + f"skipped: {row['reason']}"
    if row["status"] == "failed check":
        return head + f"FAILED CHECK: {row['reason']}"
    limit = format_seconds(row["limit"]) if row["limit"] is not None else "-"
    if row["limit"] is None and row["limit_parts"]:
        limit = "unmeasured"
    memory = row["extra_memory"]
    text = head + (
        f"{format_seconds(row['median']):>11} {format_seconds(row['min']):>11} "
        f"{format_seconds(row['max']):>11} {_number(row['gflops'], '.1f'):>8} "
        f"{limit:>11} {_number(row['ratio_to_limit'], '.2f'):>8} "
        f"{_number(row['ratio_to_subquad'], '.2f'):>7} "
        f"{_number(row['error'], '.2g'):>9} "
    )
    text += (
        f"{memory / 2**20:>6.1f}MiB"
        if isinstance(memory, float)
        else f"{memory or '-':>9}"
    )
    return text + (f"  {row['note']}" if row["note"] else "")


def _options(options: argparse.Namespace) -> Options:
    return Options(
        threads=options.threads,
        rates=machine.Rates(options.threads),
        sizes=parse_sizes(options.sizes),
        device=cuda.place(options.device),
    )


def parse_sizes(text: str | None) -> tuple[Size, ...]:
    """Read "2000,1e5,20000x384": rows, and columns where an `x` says them."""
    sizes = []
    for token in (text or "").split(","):
        if not token.strip():
            continue
        n, _, d = token.strip().partition("x")
        try:
            sizes.append(Size(round(float(n)), int(d) if d else None))
        except ValueError:
            raise SystemExit(f"--sizes: expected N or NxD, got {token!r}") from None
    return tuple(sizes)


def run(
    options: argparse.Namespace,
    names: Iterable[str],
    report: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run operations and return everything that was seen.

    `save` gets what there is after each operation: who is stopped keeps that.
    """
    operations = load_operations()
    started = time.perf_counter()
    facts = machine.facts(options.threads)
    peers = tuple(name for name in (options.peers or "").split(",") if name)
    report(machine.line(facts))
    results: list[Row] = []
    summaries: dict[str, list[str]] = {}
    settings = _options(options)
    device = settings.device
    if device.measures:
        facts["device"] = device.facts()
        report(machine.device_line(facts))

    def everything() -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": facts,
            "rates": {**settings.rates.measured, **device.measured},
            "rows": results,
            "summaries": summaries,
        }

    for name in names:
        operation = operations[name]
        report(f"\n{name}: {operation.help}\n{HEADER}")
        rows: list[Row] = []
        cases = iter(operation.cases(settings))
        while True:
            # A case that cannot be made (no data, no compiled module) is a row as well.
            try:
                case = next(cases)
            except StopIteration:
                break
            except (Skip, ImportError, AttributeError, MemoryError) as error:
                row = _blank_row(name, None, "-") | {
                    "case": "(all)",
                    "reason": _reason(error),
                }
                rows.append(row)
                report(format_row(row))
                break
            rounds = options.rounds or operation.rounds or 5
            if options.seconds and time.perf_counter() - started > options.seconds:
                done = [
                    _blank_row(name, case, peer.name)
                    | {"reason": f"cut: {options.seconds:.0f} s are over"}
                    for peer in case.peers
                ]
            else:
                done = run_case(name, case, rounds, peers)
            for row in done:
                if case.memory and row["status"] == "ok" and not options.no_memory:
                    row["extra_memory"] = _extra_memory(
                        options, name, case.name, row["peer"]
                    )
                report(format_row(row))
            rows += done
            del case
            gc.collect()
        if operation.summary is not None:
            summaries[name] = operation.summary(rows)
            for text in summaries[name]:
                report(text)
        if options.plot:
            _plot(operation, rows, Path(options.plot), report)
        results += rows
        if save is not None:
            save(everything())
    rates = everything()["rates"]
    if rates:
        report("\nrates, all threads, or the whole device:")
        for key, value in rates.items():
            report(
                f"  {key:<20} "
                + ("not measured" if value is None else f"{value / 1e9:.2f} G/s")
            )
    failed = sum(row["status"] == "failed check" for row in results)
    if failed:
        report(
            f"\nFAILED CHECK in {failed} of {len(results)} rows: "
            "no timing reported for them"
        )
    return everything()


# Okabe and Ito's palette: told apart by colour-blind readers.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)


def _plot(
    operation: Operation,
    rows: list[Row],
    directory: Path,
    report: Callable[[str], None],
) -> None:
    measured = [row for row in rows if row["status"] == "ok"]
    if not measured:
        report(f"{operation.name}: nothing to plot")
        return
    try:
        import matplotlib as mpl
    except ImportError:
        report("--plot skipped: package matplotlib missing")
        return
    mpl.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    path = str(directory / f"{operation.name}.png")
    (operation.plot or plot_bars)(measured, path)
    report(f"wrote {path}")


def plot_bars(rows: list[Row], path: str) -> None:
    """Draw medians as bars, grouped by case, with the limit of each as a line."""
    import matplotlib.pyplot as plt

    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = plt.subplots(
        figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained"
    )
    ticks, labels, place = [], [], 0.0
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        ticks.append(place + (len(group) - 1) / 2)
        labels.append(case)
        for row in group:
            colour = PALETTE[peers.index(row["peer"]) % len(PALETTE)]
            axes.barh(place, row["median"], color=colour)
            axes.annotate(
                f" {row['peer']}, {format_seconds(row['median']).strip()}",
                (row["median"], place),
                va="center",
                fontsize=7,
            )
            if row["limit"]:
                axes.plot(
                    [row["limit"]] * 2, [place - 0.4, place + 0.4], "k--", linewidth=1
                )
            place += 1.0
        place += 0.8
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.45)
    axes.set_xlabel("seconds, median (dashed: limit)")
    axes.set_title(rows[0]["op"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    result.add_argument(
        "--op",
        metavar="NAME[,NAME]",
        help="operations to run; 'all'; 'gpu' for those on a GPU",
    )
    result.add_argument(
        "--list", action="store_true", help="name the operations and leave"
    )
    result.add_argument("--peers", metavar="A,B", help="only these peers (first words)")
    result.add_argument(
        "--sizes", metavar="N[xD],...", help="sizes instead of the default ones"
    )
    result.add_argument("--rounds", type=int, help="interleaved rounds (default 5)")
    result.add_argument(
        "--threads", type=int, help="threads of every peer (default: all)"
    )
    result.add_argument(
        "--device",
        choices=("cuda", "host"),
        default="cuda",
        help="where operations on a GPU run; 'host': on arrays of the CPU, which tests "
        "them and has no results",
    )
    result.add_argument(
        "--seconds", type=float, help="begin no further case after so many seconds"
    )
    result.add_argument("--json", metavar="FILE", help="write the results here too")
    result.add_argument(
        "--plot", metavar="DIR", help="write one PNG per operation here"
    )
    result.add_argument(
        "--no-memory", action="store_true", help="do not measure extra memory"
    )
    result.add_argument(
        "--base", metavar="REV", help="compare this tree with a revision"
    )
    result.add_argument(
        "--alternations",
        type=int,
        default=3,
        help="runs of each arm with --base (default 3)",
    )
    result.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 unless a check failed or the options are wrong."""
    command = parser()
    options = command.parse_args(arguments)
    operations = load_operations()
    if options.list:
        for operation in operations.values():
            print(f"{operation.name:<20} {operation.help}")
        return 0
    names = list(operations) if options.op in (None, "all") else options.op.split(",")
    if names == ["gpu"]:
        names = [name for name in operations if name.startswith("gpu_")]
    unknown = [name for name in names if name not in operations]
    if unknown:
        command.error(
            f"unknown operation {unknown[0]!r}; there are {', '.join(operations)}"
        )
    if options.op is None:
        command.error("say --op NAME, --op all or --list")
    if options.rounds is not None and options.rounds < 1:
        command.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.json and options.device == "host":
        command.error("--device host tests the cases, and has no results for --json")
    parse_sizes(options.sizes)
    processors = machine.available_processors()
    if options.threads is None:
        options.threads = processors
    if not 1 <= options.threads <= processors:
        command.error(f"--threads: expected 1 to {processors}, got {options.threads}")
    if options.base:
        from benchmarks import revisions

        return revisions.compare(options, names)
    machine.limit_affinity(options.threads)
    with machine.equal_threads(options.threads):
        if options.measure_memory:
            return _measure_memory(options)
        path = options.json
        results = run(
            options, names, save=(lambda seen: write_json(seen, path)) if path else None
        )
    if path:
        write_json(results, path)
    return int(any(row["status"] == "failed check" for row in results["rows"]))


def write_json(results: dict[str, Any], path: str) -> None:
    """Write results whole or not at all; what JSON has no number for becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): finite(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [finite(entry) for entry in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(finite(results), indent=1) + "\n", encoding="utf-8")
        part.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
