"""An NVIDIA GPU as the benchmarks see it: facts, rates, clocks; a stand-in without one.

The driver is asked directly, so that facts need no library and no tool.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.registry import Skip

Timer = Callable[[Callable[[], Any], int], float]

# Floating-point operations of one multiprocessor in one clock, by compute capability:
# dense products of the tensor cores, and multiply-adds in float32.
FLOPS_PER_CLOCK = {
    (8, 0): {"tf32": 1024, "bf16": 2048, "float64": 128, "float32": 128},
    (9, 0): {"tf32": 2048, "bf16": 4096, "float64": 256, "float32": 256},
}
# The special-function units: exp2 in float32.
EXP_PER_CLOCK = 16
COPY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Card:
    """What the driver says of its first device; `clock` is the highest, in Hz."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    memory: int
    driver: str

    @property
    def architecture(self) -> str:
        """Return what nvcc calls it: "90"."""
        return "{}{}".format(*self.capability)

    @property
    def slug(self) -> str:
        """Return the name of the card's file of results."""
        return slug(self.name)


def slug(name: str) -> str:
    """Return a name in lower case, with hyphens for what a file is not named with."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_ATTRIBUTES = {"clock": 13, "multiprocessors": 16, "major": 75, "minor": 76}


def find_card(library: str = "libcuda.so.1") -> Card:
    """Ask the driver for the first device; `Skip` says why there is none."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise Skip("no NVIDIA driver: libcuda.so.1 is not there") from None

    def ask(name: str, *arguments: Any) -> None:
        status = getattr(driver, name)(*arguments)
        if status:
            raise Skip(f"no usable GPU: {name} returned CUDA error {status}")

    ask("cuInit", 0)
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    ask("cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise Skip("the NVIDIA driver sees no GPU")
    ask("cuDeviceGet", ctypes.byref(device), 0)
    ask("cuDriverGetVersion", ctypes.byref(version))
    name = ctypes.create_string_buffer(256)
    ask("cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    ask("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    values = {}
    for key, attribute in _ATTRIBUTES.items():
        value = ctypes.c_int()
        ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        values[key] = value.value
    return Card(
        name=name.value.decode(),
        capability=(values["major"], values["minor"]),
        multiprocessors=values["multiprocessors"],
        clock=1e3 * values["clock"],
        memory=memory.value,
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def clocks() -> dict[str, str]:
    """Return driver, clocks and power as nvidia-smi finds them; empty without it."""
    fields = (
        "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
        "power.limit", "temperature.gpu",
    )  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        return {}
    done = subprocess.run(
        ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or len(lines) != 2:
        return {}
    values = [value.strip() for value in lines[1].split(",")]
    return dict(zip(fields, values))


class Place:
    """Where arrays of the GPU benchmarks lie, and how work on them is timed.

    This one is no place: everything that would measure raises `Skip`. It stands for a
    machine without a GPU, on which the cases can still be listed.
    """

    measures = False

    def __init__(self, reason: str = "no GPU") -> None:
        self.reason = reason
        self.measured: dict[str, float | None] = {}

    def torch(self) -> Any:
        """Return torch with a device to compute on."""
        raise Skip(f"not measured: {self.reason}")

    cupy = jax = torch

    def tensor(self, a: Any) -> Any:
        """Return a NumPy array as torch tensor of this place."""
        return self.torch().from_numpy(a)

    def timer(self, library: str) -> Timer | None:
        """Return what times calls of a library; None is the harness's own clock."""
        return None

    def rate(self, kind: str) -> float | None:
        """Return operations a second of the given kind, None where it is unknown."""
        return None

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the replay of a CUDA graph of the call."""
        raise Skip(f"not measured: {self.reason}")

    def free_memory(self) -> float:
        """Return the bytes that can be allocated."""
        return 2.0**30

    def release(self) -> None:
        """Give cached memory back."""

    def facts(self) -> dict[str, Any]:
        """Return what a timing depends on."""
        return {}


class Host(Place):
    """The CPU in the place of a GPU: shows that the cases run, and measures nothing."""

    def __init__(self) -> None:
        super().__init__("arrays of the CPU stand in for those of a GPU")

    def torch(self) -> Any:
        import torch

        return torch

    def jax(self) -> Any:
        import jax

        return jax


class Device(Place):
    """A GPU."""

    measures = True

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        # Several libraries share its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def torch(self) -> Any:
        import torch

        if not torch.cuda.is_available():
            raise Skip("this torch was built without CUDA, or finds no device")
        return torch

    def cupy(self) -> Any:
        import cupy

        return cupy

    def jax(self) -> Any:
        import jax

        if jax.default_backend() != "gpu":
            raise Skip("this JAX was built without CUDA, or finds no device")
        return jax

    def tensor(self, a: Any) -> Any:
        return self.torch().from_numpy(a).cuda()

    def timer(self, library: str) -> Timer | None:
        timers: dict[str, Timer] = {
            "torch": self._torch_timer,
            "cupy": self._cupy_timer,
            "jax": self._jax_timer,
        }
        return timers[library]

    def _torch_timer(self, call: Callable[[], Any], repeats: int) -> float:
        torch = self.torch()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end)) / repeats

    def _cupy_timer(self, call: Callable[[], Any], repeats: int) -> float:
        cuda = self.cupy().cuda
        start, end = cuda.Event(), cuda.Event()
        cuda.Device().synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * float(cuda.get_elapsed_time(start, end)) / repeats

    def _jax_timer(self, call: Callable[[], Any], repeats: int) -> float:
        # JAX shows no streams to record events on: its queue is in order, so that the
        # last result is the end of all.
        ready = self.jax().block_until_ready
        ready(call())
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        ready(result)
        return (time.perf_counter() - start) / repeats

    def rate(self, kind: str) -> float | None:
        if kind not in self.measured:
            self.measured[kind] = self._rate(kind)
        return self.measured[kind]

    def _rate(self, kind: str) -> float | None:
        card = self.card
        clocks_of_all = card.multiprocessors * card.clock
        if kind == "copy":
            with contextlib.suppress(ImportError, Skip):
                return self._copy_rate()
            return None
        if not clocks_of_all:
            return None
        if kind == "exp":
            return EXP_PER_CLOCK * clocks_of_all
        flops = FLOPS_PER_CLOCK.get(card.capability, {}).get(kind)
        return None if flops is None else flops * clocks_of_all

    def _copy_rate(self) -> float:
        """Return bytes read and written by a copy within the device, per second."""
        torch = self.torch()
        size = min(COPY_BYTES, int(self.free_memory() / 4))
        source = torch.ones(size // 4, device="cuda")
        target = torch.empty_like(source)
        copy = lambda: target.copy_(source)  # noqa: E731
        copy()
        return 2.0 * size / min(self._torch_timer(copy, 5) for _ in range(3))

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        torch = self.torch()
        # Everything that happens at a first call has to have happened.
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def free_memory(self) -> float:
        return float(self.torch().cuda.mem_get_info()[0])

    def release(self) -> None:
        with contextlib.suppress(ImportError, Skip):
            self.torch().cuda.empty_cache()
        with contextlib.suppress(ImportError):
            self.cupy().get_default_memory_pool().free_all_blocks()

    def facts(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.card),
            "slug": self.card.slug,
            "found": clocks(),
        }


def place(kind: str) -> Place:
    """Return the first GPU ("cuda"), what stands for none, or the stand-in ("host")."""
    if kind == "host":
        return Host()
    try:
        return Device(find_card())
    except Skip as absent:
        return Place(str(absent))


@contextlib.contextmanager
def tf32(torch: Any, allowed: bool) -> Iterator[None]:
    """Let torch round float32 factors to TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
