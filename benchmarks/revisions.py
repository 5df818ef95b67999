"""``--base REV``: this tree and a revision, built alike, run by this tree's harness."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import site
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import _child_arguments, format_seconds, write_json

ROOT = Path(__file__).resolve().parent.parent


def _call(command: list[str], what: str, **options: Any) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise SystemExit(f"--base: {what} failed:\n{tail}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(revision: str, directory: Path) -> Iterator[Path]:
    """Check `revision` out into `directory`, and let git forget it afterwards."""
    git = ["git", "-C", str(ROOT)]
    commit = _call(
        [*git, "rev-parse", "--verify", f"{revision}^{{commit}}"], "git rev-parse"
    )
    _call(
        [*git, "worktree", "add", "--detach", str(directory), commit],
        "git worktree add",
    )
    try:
        yield directory
    finally:
        subprocess.run(
            [*git, "worktree", "remove", "--force", str(directory)],
            capture_output=True,
            check=False,
        )


def environment(source: Path, directory: Path) -> Path:
    """Build `source` into an environment of its own and return its interpreter.

    The packages of the running interpreter follow on the path, without their ``.pth``
    files: an editable install among them would shadow what was built.
    """
    venv.create(directory, with_pip=False, symlinks=os.name != "nt")
    purelib = Path(
        sysconfig.get_path(
            "purelib", "venv", {"base": str(directory), "platbase": str(directory)}
        )
    )
    paths = dict.fromkeys(
        [
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
            *site.getsitepackages(),
        ]
    )
    (purelib / "benchmarks_peers.pth").write_text(
        "\n".join(paths) + "\n", encoding="utf-8"
    )
    _call(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-build-isolation",
            "--no-deps",
        ]
        + [
            f"--config-settings=build-dir={directory / 'build'}",
            "--target",
            str(purelib),
        ]
        + [str(source)],
        f"building {source}",
    )
    return directory / ("Scripts" if os.name == "nt" else "bin") / "python"


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["case"], row["peer"]


def compare(options: argparse.Namespace, names: list[str]) -> int:
    """Run both arms in alternating processes and print medians and their ratio."""
    with tempfile.TemporaryDirectory(prefix="subquad-benchmarks-") as scratch:
        directory = Path(scratch)
        with worktree(options.base, directory / "tree") as tree:
            print(f"building {options.base} and this tree ...", flush=True)
            arms = {
                "base": environment(tree, directory / "base"),
                "head": environment(ROOT, directory / "head"),
            }
            collected: dict[str, list[dict[str, Any]]] = {"base": [], "head": []}
            failed = False
            for turn in range(options.alternations):
                order = ("base", "head") if turn % 2 == 0 else ("head", "base")
                for arm in order:
                    out = directory / f"{arm}{turn}.json"
                    command = [
                        str(arms[arm]),
                        "-m",
                        "benchmarks",
                        "--op",
                        ",".join(names),
                    ]
                    command += [
                        "--json",
                        str(out),
                        "--no-memory",
                        *_child_arguments(options),
                    ]
                    command += ["--peers", options.peers or "subquad"]
                    if options.rounds:
                        command += ["--rounds", str(options.rounds)]
                    # Started in this tree, so that both arms run its harness.
                    done = subprocess.run(
                        command, cwd=ROOT, capture_output=True, text=True, check=False
                    )
                    if not out.exists():
                        raise SystemExit(
                            f"--base: arm {arm} gave no result:\n{done.stderr}"
                        )
                    failed |= done.returncode != 0
                    collected[arm].append(json.loads(out.read_text(encoding="utf-8")))
                    print(
                        f"round {turn + 1} of {options.alternations}: {arm} done",
                        flush=True,
                    )
    rows = summarise(collected, options.base)
    if options.json:
        write_json(
            {
                "schema": 1,
                "base": options.base,
                "machine": collected["head"][0]["machine"],
                "rows": rows,
            },
            options.json,
        )
    return int(failed)


def summarise(
    collected: dict[str, list[dict[str, Any]]], base: str
) -> list[dict[str, Any]]:
    """Print and return, for every row, the medians over runs and base / head."""
    seen: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for arm, runs in collected.items():
        for results in runs:
            for row in results["rows"]:
                seen.setdefault(_key(row), {"base": [], "head": []})[arm].append(row)
    rows = []
    print(
        f"{'op':<18} {'case':<26} {'peer':<24} {base[:11]:>11} {'this tree':>11} "
        f"{'speed-up':>9}"
    )
    for (op, case, peer), by_arm in seen.items():
        medians = {}
        reasons = []
        for arm, found in by_arm.items():
            times = [row["median"] for row in found if row["median"] is not None]
            medians[arm] = statistics.median(times) if times else None
            if not times:
                reason = next((row["reason"] for row in found), "no such row")
                state = next((row["status"] for row in found), "skipped")
                reasons.append(f"{arm}: {state}: {reason}")
        ratio = None
        if medians["base"] is not None and medians["head"] is not None:
            ratio = medians["base"] / medians["head"]
        rows.append(
            {
                "op": op,
                "case": case,
                "peer": peer,
                **medians,
                "ratio": ratio,
                "reasons": reasons,
            }
        )
        print(
            f"{op:<18} {case:<26} {peer:<24} {format_seconds(medians['base']):>11} "
            f"{format_seconds(medians['head']):>11} "
            + ("        -" if ratio is None else f"{ratio:>8.3f}x")
            + ("  " + "; ".join(reasons) if reasons else "")
        )
    return rows
