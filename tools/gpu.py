"""Build, test, check and measure on the NVIDIA GPU of this machine: ``make gpu``.

Needs no network, and only what stands beside the Python that runs this file: nvcc,
cmake, ninja, pybind11, scikit-build-core, numpy, scipy, pytest, and of cupy, torch and
jax those that are to be tested. Nothing is installed: what is built lies in
``build/gpu``.

Every step has a limit and the steps go on after a failure; the exit status is the
number of those that failed. ``--dry-run`` does what needs no GPU, with arrays of the
CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cuda  # noqa: E402
from benchmarks.registry import Skip  # noqa: E402

WORK = ROOT / "build" / "gpu"
SITE = WORK / "site"
RESULTS = ROOT / "benchmarks" / "results"
# Seconds for everything, and what is kept of them for each step: whoever needs less
# leaves the rest to those that follow.
TOTAL = 475.0
KEPT = {"build": 150.0, "tests": 130.0, "sanitize": 70.0, "benchmarks": 110.0}
# What a step that is asked to stop gets to write down what it has.
GRACE = 10.0
SANITIZER_STATUS = 86
# Groups of tests that run side by side, the library that each needs, and its choice.
GROUPS = {
    "torch": ("torch", ["-k", "torch-cuda"]),
    "cupy": ("cupy", ["-k", "cupy and not carried"]),
    "jax": ("jax", ["-k", "jax-cuda"]),
    "carried": ("", ["-m", "carried or cuda"]),
}
# Builds a wheel as pip would, which need not be there, and must not touch the system.
BUILD = """
import json, sys
from scikit_build_core.build import build_wheel
print(build_wheel(sys.argv[1], json.loads(sys.argv[2])))
"""
PROBE = """
import json, subquad
from subquad import _core
print(json.dumps({"file": subquad.__file__, **_core.cuda_info()}))
"""


@dataclasses.dataclass
class Step:
    """What became of a step; `status` is ok, failed, cut or skipped."""

    name: str
    status: str = "ok"
    seconds: float = 0.0
    note: str = ""
    log: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether it counts against the run."""
        return self.status in ("failed", "cut")


@dataclasses.dataclass
class Process:
    """A command that ran beside others."""

    status: str
    returncode: int
    log: Path


class Run:
    """The steps so far, the clock, and the environment of every command."""

    def __init__(self, seconds: float, *, dry: bool) -> None:
        self.end = time.monotonic() + seconds
        self.dry = dry
        self.steps: list[Step] = []
        self.waiting = list(KEPT)
        self.env = os.environ.copy()
        self.env.pop("SUBQUAD_CUDA_LIBRARY", None)
        self.env["PYTHONUNBUFFERED"] = "1"
        if not dry:
            path = [str(SITE), self.env.get("PYTHONPATH", "")]
            self.env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        nvcc = find_nvcc()
        if nvcc is not None:
            self.env["CUDACXX"] = str(nvcc)
            self.env["PATH"] = f"{nvcc.parent}{os.pathsep}{self.env['PATH']}"

    def limit(self) -> float:
        """Return the seconds of the present step: what later ones do not need."""
        later = sum(KEPT[name] for name in self.waiting)
        return max(self.end - time.monotonic() - later, 1.0)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time a step; an exception fails it, and `Skip` skips it."""
        step = Step(name)
        with contextlib.suppress(ValueError):
            self.waiting.remove(name)
        print(f"{name} ... (at most {self.limit():.0f} s)", flush=True)
        start = time.monotonic()
        try:
            yield step
        except Skip as reason:
            step.status, step.note = "skipped", str(reason)
        except Exception as error:  # noqa: BLE001 - the steps that follow tell more
            step.status, step.note = "failed", f"{type(error).__name__}: {error}"
        step.seconds = time.monotonic() - start
        self.steps.append(step)
        print(f"{name}: {step.status}, {step.seconds:.1f} s {step.note}", flush=True)
        if step.failed and step.log is not None:
            print(tail(step.log), flush=True)

    def together(
        self, commands: dict[str, list[str]], limit: float, **env: str
    ) -> dict[str, Process]:
        """Run commands side by side, their output into files, until the limit."""
        WORK.mkdir(parents=True, exist_ok=True)
        started = {}
        with contextlib.ExitStack() as files:
            for name, command in commands.items():
                log = WORK / f"{name}.log"
                output = files.enter_context(log.open("w", encoding="utf-8"))
                output.write(f"$ {' '.join(command)}\n")
                output.flush()
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self.env | env,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
                started[name] = process, log
            end = time.monotonic() + limit
            stopped = finish([process for process, _ in started.values()], end)
        return {
            name: Process(
                "cut" if is_cut else "failed" if process.returncode else "ok",
                process.returncode,
                log,
            )
            for is_cut, (name, (process, log)) in zip(
                stopped, started.items(), strict=True
            )
        }

    def alone(self, name: str, command: list[str], limit: float, **env: str) -> Process:
        """Run one command."""
        return self.together({name: command}, limit, **env)[name]


def finish(processes: list[subprocess.Popen[bytes]], end: float) -> list[bool]:
    """Wait until `end`; return which had to be stopped, with their children, for it."""

    def running() -> list[subprocess.Popen[bytes]]:
        return [process for process in processes if process.poll() is None]

    def wait_until(time_: float) -> None:
        while running() and time.monotonic() < time_:
            time.sleep(0.1)

    def stop(stopped: list[subprocess.Popen[bytes]], by: signal.Signals) -> None:
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, by)

    wait_until(end - GRACE)
    late = running()
    stop(late, signal.SIGINT)
    wait_until(end)
    # Who ended by itself may have left children behind.
    stop(late, signal.SIGKILL)
    for process in late:
        process.wait()
    return [process in late for process in processes]


def tail(log: Path, lines: int = 40) -> str:
    """Return the end of a log."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in text[-lines:])


def find_nvcc() -> Path | None:
    """Return CUDA's compiler."""
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
    ]
    places = [shutil.which("nvcc")] + [f"{home}/bin/nvcc" for home in homes if home]
    found = (Path(place) for place in places if place)
    return next((path for path in found if path.exists()), None)


def find_sanitizer() -> Path | None:
    """Return compute-sanitizer, on the path or where the toolkit keeps it."""
    places = [shutil.which("compute-sanitizer")]
    nvcc = find_nvcc()
    for path in {nvcc, nvcc.resolve()} if nvcc else ():
        places.append(str(path.parent / "compute-sanitizer"))
        home = path.parent.parent
        places.append(str(home / "compute-sanitizer" / "compute-sanitizer"))
    found = (Path(place) for place in places if place)
    return next((path for path in found if path.exists()), None)


def settings(architecture: str) -> dict[str, str]:
    """Return the build's settings: CUDA for this card alone."""
    return {
        "build-dir": str(WORK / "cmake"),
        "cmake.define.SUBQUAD_CUDA": "ON",
        "cmake.define.SUBQUAD_CUDA_ARCHITECTURES": f"{architecture}-real",
    }


def borrow_array_api_compat() -> str:
    """Copy the one run-time dependency that may be absent from who carries it."""
    if importlib.util.find_spec("array_api_compat") is not None:
        return ""
    for package, part in (
        ("scipy", "_lib"),
        ("scipy", "_external"),
        ("sklearn", "externals"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        copy = Path(spec.origin).parent / part / "array_api_compat"
        if copy.is_dir():
            shutil.copytree(copy, SITE / copy.name, dirs_exist_ok=True)
            return f"; array_api_compat is that of {package}"
    raise RuntimeError("array_api_compat is missing, and nobody carries a copy")


def build(run: Run, step: Step, card: cuda.Card | None) -> None:
    """Build the wheel without isolation and unpack it into a directory of our own."""
    wheels = WORK / "wheel"
    command = [sys.executable, "-c", BUILD, str(wheels)]
    command.append(json.dumps(settings(card.architecture if card else "90")))
    if run.dry:
        needed = ("scikit_build_core", "pybind11", "numpy", "pytest")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise RuntimeError(f"missing: {', '.join(missing)}")
        raise Skip(f"would run: {' '.join(command[3:])}; nvcc: {find_nvcc()}")
    shutil.rmtree(wheels, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    done = run.alone("build", command, run.limit())
    step.status, step.log = done.status, done.log
    if step.failed:
        return
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(SITE)
    borrowed = borrow_array_api_compat()
    probe = run.alone("probe", [sys.executable, "-c", PROBE], 60.0)
    step.log = probe.log
    if probe.status != "ok":
        raise RuntimeError("what was built cannot be imported")
    found = json.loads(probe.log.read_text(encoding="utf-8").splitlines()[-1])
    if Path(found["file"]).parent.parent != SITE:
        raise RuntimeError(f"{found['file']} is imported, not what was built")
    if found["problem"]:
        raise RuntimeError(f"CUDA: {found['problem']}")
    step.note = (
        f"wheel of {wheel.stat().st_size / 2**20:.1f} MiB for "
        f"{found['architectures']}{borrowed}"
    )


def tests(run: Run, step: Step) -> None:
    """Run the suite on the arrays of each library, side by side."""
    is_split = importlib.util.find_spec("xdist") is not None
    processors = len(os.sched_getaffinity(0))
    workers = max(1, min(4, processors // len(GROUPS))) if is_split else 1
    threads = str(max(1, processors // (len(GROUPS) * workers)))
    common = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rfE"]
    common += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    common += ["--override-ini", "minversion=7"]
    common += ["--override-ini", "timeout=100", "--maxfail=100"]
    if workers > 1:
        common += ["-n", str(workers)]
    if run.dry:
        common.append("--collect-only")
    commands, absent = {}, []
    for name, (library, choice) in GROUPS.items():
        if library and importlib.util.find_spec(library) is None:
            absent.append(f"{library} is not installed")
            continue
        report = WORK / f"tests-{name}.xml"
        report.unlink(missing_ok=True)
        commands[f"tests-{name}"] = [*common, f"--junitxml={report}", *choice, "tests"]
    ended = run.together(
        commands,
        run.limit(),
        SUBQUAD_TEST_DEVICE="cuda",
        OMP_NUM_THREADS=threads,
        OPENBLAS_NUM_THREADS=threads,
    )
    notes = []
    for name, process in ended.items():
        if run.dry:
            # Status 5: nothing was collected, which happens where a library is absent.
            is_good, note = process.returncode in (0, 5), "collected"
        else:
            is_good, note = counted(WORK / f"{name}.xml", process)
        notes.append(f"{name.removeprefix('tests-')}: {note}")
        if not is_good:
            step.status, step.log = process.status, process.log
            if process.status == "ok":
                step.status = "failed"
            print(tail(process.log, 25), flush=True)
    step.log = None
    step.note = "; ".join(notes + absent)


def counted(report: Path, process: Process) -> tuple[bool, str]:
    """Return whether a group of tests is good, and how many there were."""
    try:
        suite = next(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError, StopIteration):
        return False, f"no report, exit status {process.returncode}"
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors")}
    skipped = int(suite.get("skipped", 0))
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - skipped
    note = f"{passed} passed, {failed} failed, {skipped} skipped"
    if process.status == "cut":
        note += ", cut"
    # A library that finds no device skips everything, which shows nothing.
    return process.status == "ok" and passed > 0, note


def sanitize(run: Run, step: Step) -> None:
    """Run small cases of every operation under memcheck and racecheck."""
    cases = [sys.executable, str(ROOT / "tools" / "sanitize_cases.py")]
    if run.dry:
        done = run.alone("sanitize", [*cases, "--library", "numpy"], run.limit())
        step.status, step.log, step.note = done.status, done.log, "on NumPy arrays"
        return
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise Skip("compute-sanitizer is neither on the path nor beside nvcc")
    ended = run.together(
        {
            f"sanitize-{tool}": [str(sanitizer), "--tool", tool]
            + ["--error-exitcode", str(SANITIZER_STATUS), *cases]
            for tool in ("memcheck", "racecheck")
        },
        run.limit(),
    )
    notes = []
    for name, process in ended.items():
        text = process.log.read_text(encoding="utf-8", errors="replace")
        sums = [line for line in text.splitlines() if "SUMMARY" in line]
        found = sums[-1].strip("= ") if sums else f"exit status {process.returncode}"
        ran = text.count("\ncase ")
        notes.append(f"{name.removeprefix('sanitize-')}: {ran} cases, {found}")
        if process.status != "ok":
            step.status, step.log = process.status, process.log
    step.note = "; ".join(notes)


def measure(run: Run, step: Step, out: Path) -> None:
    """Run the benchmarks on the GPU and print their tables."""
    command = [sys.executable, "-m", "benchmarks", "--op", "gpu", "--no-memory"]
    if run.dry:
        command += ["--device", "host", "--sizes", "300x8", "--rounds", "1"]
    else:
        out.unlink(missing_ok=True)
        limit = run.limit()
        # The case that is running when the time is over has to end as well.
        command += ["--json", str(out), "--seconds", f"{max(limit - 30, 10):.0f}"]
    done = run.alone("benchmarks", command, run.limit())
    step.status = done.status
    text = done.log.read_text(encoding="utf-8", errors="replace")
    if run.dry:
        step.log, step.note = done.log, "on arrays of the CPU, no figures"
    else:
        print(text, flush=True)
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        measured = sum(row["status"] == "ok" for row in rows)
        failed = sum(row["status"] == "failed check" for row in rows)
        cut = sum(row["reason"].startswith("cut") for row in rows)
        step.note = (
            f"{measured} of {len(rows)} rows measured, {failed} failed their check, "
            f"{cut} cut"
        )
        if not measured and step.status == "ok":
            step.status = "failed"


def table(steps: list[Step]) -> str:
    """Return the steps, one a line."""
    lines = [f"{'step':<12} {'status':<8} {'seconds':>8}  note"]
    lines += [
        f"{step.name:<12} {step.status:<8} {step.seconds:>8.1f}  {step.note}"
        for step in steps
    ]
    return "\n".join(lines)


def document(steps: list[Step], card: cuda.Card, measured: Path) -> dict[str, Any]:
    """Return what the benchmarks stored, and what became of the steps."""
    if measured.exists():
        results = json.loads(measured.read_text(encoding="utf-8"))
    else:
        facts = {"device": cuda.Device(card).facts()}
        results = {"machine": facts, "rates": {}, "rows": [], "summaries": {}}
    results["steps"] = [
        {"name": s.name, "status": s.status, "seconds": s.seconds, "note": s.note}
        for s in steps
    ]
    return results


def hand_out(paths: list[Path], logs: list[Path], directory: Path) -> None:
    """Copy results, and all logs as one file."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, directory / path.name)
    with (directory / "gpu.log").open("w", encoding="utf-8") as everything:
        for log in logs:
            text = log.read_text(encoding="utf-8", errors="replace")
            everything.write(f"==== {log.name}\n{text}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="what needs no GPU")
    parser.add_argument(
        "--steps",
        default=",".join(KEPT),
        metavar="A,B",
        help="only these (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything")
    options = parser.parse_args(arguments)
    wanted = options.steps.split(",")
    unknown = [name for name in wanted if name not in KEPT]
    if unknown:
        parser.error(f"--steps: expected {', '.join(KEPT)}, got {unknown[0]!r}")
    card: cuda.Card | None = None
    try:
        card = cuda.find_card()
        print(f"{card.name}, capability {card.capability}, CUDA {card.driver}")
    except Skip as reason:
        if not options.dry_run:
            print(f"make gpu needs an NVIDIA GPU: {reason}", file=sys.stderr)
            return 1
        print(f"dry run: {reason}")
    run = Run(options.seconds, dry=options.dry_run)
    run.waiting = [name for name in run.waiting if name in wanted]
    measured = WORK / "results.json"
    actions: dict[str, Callable[[Step], None]] = {
        "build": lambda step: build(run, step, card),
        "tests": lambda step: tests(run, step),
        "sanitize": lambda step: sanitize(run, step),
        "benchmarks": lambda step: measure(run, step, measured),
    }
    for name in [name for name in KEPT if name in wanted]:
        with run.step(name) as step:
            actions[name](step)
    text = table(run.steps)
    print(f"\n{text}", flush=True)
    failed = sum(step.failed for step in run.steps)
    if options.dry_run or card is None:
        return failed
    target = RESULTS / f"{card.slug}.json"
    if "benchmarks" in wanted:
        from benchmarks.harness import write_json

        write_json(document(run.steps, card, measured), str(target))
        print(f"\nwrote {target.relative_to(ROOT)}")
    if os.environ.get("OUT"):
        paths = [target] if "benchmarks" in wanted else []
        hand_out(paths, sorted(WORK.glob("*.log")), Path(os.environ["OUT"]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
