"""What the commands share: errors, outputs that appear whole, progress, threads."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
import numpy as np

import subquad

Start = Callable[[str, float], Callable[[float], None]]


class Unusable(click.ClickException):
    """What the command line names cannot be used as it is."""

    exit_code = 2


class Failed(click.ClickException):
    """The work could not be finished."""

    exit_code = 1


def why(error: OSError) -> str:
    """Return what went wrong, without the file's name."""
    return error.strerror or str(error)


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A file that is being written beside its place."""

    path: Path
    part: Path
    file: BinaryIO
    size: int
    existed: bool

    def write(self, data: bytes | memoryview) -> None:
        """Write some bytes."""
        with self.complains():
            self.file.write(data)

    @contextlib.contextmanager
    def complains(self) -> Iterator[None]:
        """Name this file in what goes wrong."""
        try:
            yield
        except OSError as error:
            raise Failed(_output_failure(self.path, self.size, error)) from error


class Outputs:
    """Files that appear when all of them are whole, or never."""

    def __init__(self) -> None:
        self._files: list[OutputFile] = []

    def array(self, path: Path, shape: tuple[int, ...], dtype: Any) -> OutputFile:
        """Open a ``.npy`` file, its header written.

        Its space is reserved at once, so that a full disk is known before hours of
        work.
        """
        dtype = np.dtype(dtype)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        output = self.open(path, math.prod(shape) * dtype.itemsize)
        with output.complains():
            np.lib.format.write_array_header_1_0(output.file, header)
            output.file.flush()
            _reserve(output.file, output.file.tell() + output.size)
        return output

    def open(self, path: Path, size: int) -> OutputFile:
        """Open a file of `size` bytes."""
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".part", dir=path.parent
            )
        except OSError as error:
            raise Failed(_output_failure(path, size, error)) from error
        file = os.fdopen(handle, "wb")
        output = OutputFile(path, Path(name), file, size, path.exists())
        self._files.append(output)
        return output

    def keep(self) -> None:
        """Put all files in their places."""
        mask = os.umask(0)
        os.umask(mask)
        for output in self._files:
            with output.complains():
                output.file.flush()
                os.fsync(output.file.fileno())
                output.part.chmod(0o666 & ~mask)
        with _undisturbed():
            for place, output in enumerate(self._files):
                try:
                    with output.complains():
                        output.part.replace(output.path)
                except Failed:
                    for earlier in self._files[:place]:
                        if not earlier.existed:
                            earlier.path.unlink(missing_ok=True)
                    raise

    def discard(self) -> None:
        """Remove what is not in its place."""
        for output in self._files:
            # What could not be written is complained of already.
            with contextlib.suppress(OSError):
                output.file.close()
            with contextlib.suppress(OSError):
                output.part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files() -> Iterator[Outputs]:
    """Give outputs that appear where the block ends well."""
    outputs = Outputs()
    try:
        yield outputs
        outputs.keep()
    finally:
        outputs.discard()


def _reserve(file: BinaryIO, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OverflowError:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from None
    except OSError as error:
        # Some file systems cannot reserve; there a full disk shows while writing.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _output_failure(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path}: no room for {size} bytes: {why(error)}; nothing was written"
    return f"{path}: cannot be written: {why(error)}"


def check_output(path: Path, inputs: list[Path]) -> None:
    """Refuse an output that cannot be written, or would replace an input."""
    try:
        _check_output(path, inputs)
    except OSError as error:
        raise Unusable(f"{path}: cannot be written: {why(error)}") from error


def _check_output(path: Path, inputs: list[Path]) -> None:
    # The questions below take a name that is too long for one of no file.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
    if path.is_dir():
        raise Unusable(f"{path}: the output must be a file, this is a directory")
    if path.exists() and not path.is_file():
        raise Unusable(f"{path}: the output must be a plain file")
    if not path.parent.is_dir():
        raise Unusable(f"{path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise Unusable(f"{path}: the directory {path.parent} is not writable")
    for source in inputs:
        if path.exists() and path.samefile(source):
            raise Unusable(f"{path}: the output would replace an input")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def ends_orderly() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that temporary files are removed."""
    if not _in_main_thread():
        yield
        return

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off SIGTERM and SIGINT until the block has ended."""
    if not _in_main_thread():
        yield
        return
    arrived: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


@contextlib.contextmanager
def progress() -> Iterator[Start]:
    """Give a function that opens a bar on standard error; silent without a terminal."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError:
        yield lambda text, total: lambda amount: None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def start(text: str, total: float) -> Callable[[float], None]:
            task = bars.add_task(text, total=total)

            def advance(amount: float) -> None:
                bars.advance(task, amount)

            return advance

        yield start


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads to use (default: all)."
)


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Limit the number of threads, where it is given."""
    if threads is None:
        yield
    else:
        with subquad.num_threads(threads):
            yield


input_file = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
output_file = click.Path(path_type=Path)
