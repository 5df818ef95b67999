"""What the compiled objects hold: an instruction set must not leave its own file.

The linker keeps one copy of each weak function (a template, an inline function) for the
whole program. If that copy came from a file compiled for a wider instruction set, code
that runs on every processor would crash on older ones.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from subquad import _core

ROOT = Path(__file__).resolve().parent.parent
VERSION = f"cp{sys.version_info.major}{sys.version_info.minor}"
TREES = sorted((ROOT / "build").glob(f"{VERSION}-*/compile_commands.json"))

pytestmark = [
    pytest.mark.skipif(not TREES, reason="installed from a wheel: no build tree"),
    pytest.mark.skipif(not shutil.which("nm"), reason="no binutils"),
]

WIDER = {"v2": ("ymm", "zmm"), "v3": ("zmm",), "v4": (), "neon": ()}
WIDTH = {"v2": "xmm", "v3": "ymm", "v4": "zmm"}


def kernels():
    """(concept, level, command, object) of every kernel file of the build tree."""
    if not TREES:
        return
    for entry in json.loads(TREES[0].read_text()):
        found = re.fullmatch(r"(\w+)_(v2|v3|v4|neon)\.cpp", Path(entry["file"]).name)
        if found and Path(entry["file"]).parent.name == "kernels":
            command = entry["command"]
            target = Path(entry["directory"], re.search(r" -o (\S+)", command)[1])
            yield pytest.param(
                found[2],
                command,
                target,
                entry["directory"],
                id="_".join(found.groups()),
            )


every_kernel = pytest.mark.parametrize(
    "level, command, target, folder", list(kernels())
)


def output(*command, **options):
    return subprocess.run(
        command, check=True, capture_output=True, text=True, **options
    ).stdout


def strangers(path, level):
    """Weak functions that do not belong to the level."""
    names = [
        line.split(maxsplit=2)[-1]
        for line in output("nm", "--demangle", path).splitlines()
        if re.match(r"[0-9a-f ]+ [Wu] ", line)
    ]
    return [
        name
        for name in names
        if not re.match(rf"(?:[\w:*& ]+ )?subquad::{level}::", name)
    ]


def test_every_level_of_every_concept_is_there():
    found = {}
    for parameters in kernels():
        concept, _, level = parameters.id.rpartition("_")
        found.setdefault(concept, []).append(level)
    folder = ROOT / "cpp" / "src" / "kernels"
    concepts = {
        path.name.removesuffix("_kernels.hpp") for path in folder.glob("*_kernels.hpp")
    }
    assert set(found) == concepts
    assert all(set(_core.isa_levels()) <= set(levels) for levels in found.values())


@every_kernel
def test_no_weak_functions(level, command, target, folder):
    assert strangers(target, level) == []


@every_kernel
def test_no_weak_functions_without_inlining(level, command, target, folder, tmp_path):
    unoptimised = tmp_path / "kernel.o"
    command = re.sub(r" -M\w+( \S+\.[do])?(?= )", "", command)
    command = re.sub(r" -o \S+", f" -O0 -o {unoptimised}", command)
    output("sh", "-c", command, cwd=folder)
    assert strangers(unoptimised, level) == []


@every_kernel
def test_registers(level, command, target, folder):
    if level == "neon":
        pytest.skip("every register of aarch64 has the width of the level")
    code = output("objdump", "--disassemble", "--no-show-raw-insn", target)
    assert f"%{WIDTH[level]}" in code
    for register in WIDER[level]:
        assert f"%{register}" not in code


@every_kernel
def test_flags(level, command, target, folder):
    words = command.split()
    assert "-fno-lto" in words
    assert "-ffp-contract=fast" in words
    assert not {"-ffast-math", "-Ofast", "-march=native"} & set(words)
    marches = [word for word in words if word.startswith("-march=")]
    expected = "-march=armv8-a" if level == "neon" else f"-march=x86-64-{level}"
    assert marches == [expected]


def test_other_code_runs_on_every_processor():
    for entry in json.loads(TREES[0].read_text()):
        if Path(entry["file"]).parent.name != "kernels":
            assert not re.search(
                r" -m(arch|avx|sse|fma)|-Ofast|-ffast", entry["command"]
            )


def test_module_exports_its_entry_alone():
    names = output("nm", "--dynamic", "--defined-only", _core.__file__).split()[2::3]
    assert names == ["PyInit__core"]
