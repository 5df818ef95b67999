"""The command line: ``subquad demo``, ``normalizers``, ``embed``, ``config``."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import click
except ModuleNotFoundError:
    message = 'the command line needs click: pip install "subquad[cli]"'
    raise SystemExit(message) from None

import subquad

from . import _kmeans
from ._cli_common import (
    Failed,
    Start,
    Unusable,
    check_output,
    ends_orderly,
    input_file,
    output_file,
    progress,
    thread_count,
    threads_option,
    whole_files,
    why,
)
from ._cli_embed import embed

Rows = npt.NDArray[Any]

# A block of this many rows against another keeps one call near a second, so that an
# interruption is answered, and the blocks themselves small beside any memory.
_BLOCK_ROWS = 32_768
_BLOCK_BYTES = 64 * 2**20
_ESTIMATED_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class _RowFile:
    """Rows of a file, read in blocks, multiplied by `scale`."""

    path: Path
    array: Rows
    dtype: np.dtype[Any]
    scale: float

    def __len__(self) -> int:
        return int(self.array.shape[0])

    @property
    def columns(self) -> int:
        return int(self.array.shape[1])

    def block(self, rows: slice | npt.NDArray[np.int64]) -> Rows:
        """Return some rows in the type of the computation, all of them finite."""
        try:
            taken = np.array(self.array[rows], dtype=self.dtype, order="C")
        except OSError as error:
            raise Failed(f"{self.path}: cannot be read: {why(error)}") from error
        finite = np.isfinite(taken).all(axis=1)
        if not finite.all():
            place = int(np.argmin(finite))
            row = place + rows.start if isinstance(rows, slice) else int(rows[place])
            value = taken[place][~np.isfinite(taken[place])][0]
            raise Failed(
                f"{self.path}: row {row} holds {value}; every value must be finite"
            )
        if self.scale != 1.0:
            taken *= self.scale
        return taken

    def blocks(self, size: int) -> Iterator[tuple[int, Rows]]:
        """Yield the first row number and the rows of each block."""
        for start in range(0, len(self), size):
            yield start, self.block(slice(start, min(start + size, len(self))))


def _load(path: Path) -> Rows:
    """Map a ``.npy`` file, or load the only matrix of an ``.npz`` file."""
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            file.seek(0)
            if not magic:
                raise Unusable(f"{path}: the file is empty")
            if magic.startswith(b"PK"):
                with np.load(file, allow_pickle=False) as archive:
                    return _only_matrix(path, archive)
        if magic != b"\x93NUMPY":
            raise Unusable(f"{path}: not a NumPy .npy or .npz file")
        mapped: Rows = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    except click.ClickException:
        raise
    except OSError as error:
        raise Unusable(f"{path}: cannot be read: {why(error)}") from error
    except MemoryError:
        raise Failed(
            f"{path}: does not fit into memory; save its array as .npy, which is "
            "read in blocks"
        ) from None
    except Exception as error:  # noqa: BLE001 - damage shows as whatever meets it
        raise Unusable(
            f"{path}: damaged, cut short or no array of numbers ({error})"
        ) from None


def _only_matrix(path: Path, archive: Any) -> Rows:
    found = {}
    for name in archive.files:
        # Arrays of objects may stand beside the matrix; they do not load.
        with contextlib.suppress(ValueError):
            array = archive[name]
            if array.ndim == 2 and array.dtype.kind == "f":
                found[name] = array
    if len(found) != 1:
        raise Unusable(
            f"{path}: expected one matrix of floating-point numbers in the archive, "
            f"got {len(found)} among {', '.join(archive.files) or 'no arrays'}"
        )
    return next(iter(found.values()))


def _open_rows(path: Path, what: str, scale: float) -> _RowFile:
    array = _load(path)
    if array.ndim != 2:
        raise Unusable(
            f"{path}: {what} must be a matrix (rows, columns), got shape {array.shape}"
        )
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise Unusable(
            f"{path}: {what} must be float16, float32 or float64, got "
            f"{array.dtype}; convert them, for instance with .astype('float32')"
        )
    if array.shape[1] == 0:
        raise Unusable(f"{path}: {what} have no columns, shape {array.shape}")
    width = np.dtype(np.float64 if array.dtype.itemsize == 8 else np.float32)
    return _RowFile(path, array, width, scale)


def _self_index(
    start: int, rows: int, first: int, last: int
) -> npt.NDArray[np.int64] | None:
    """Return which key of first, ..., last - 1 each query start, ... is; -1: none."""
    index = np.arange(start, start + rows) - first
    index[(index < 0) | (index >= last - first)] = -1
    return index if (index >= 0).any() else None


@dataclasses.dataclass(frozen=True)
class _Job:
    keys: _RowFile
    queries: _RowFile
    self_term: str
    block_rows: int

    @property
    def own(self) -> bool:
        """Whether the queries are the keys."""
        return self.queries is self.keys


def _exact(job: _Job, start: Start) -> Iterator[Rows]:
    """Yield the exact log normalisers, block of queries by block of queries."""
    advance = start("exact", float(len(job.keys)) * len(job.queries))
    for first, x in job.queries.blocks(job.block_rows):
        total = np.full(len(x), -np.inf)
        for position, y in job.keys.blocks(job.block_rows):
            index = None
            if job.own and job.self_term == "exclude":
                index = _self_index(first, len(x), position, position + len(y))
            part = subquad.log_normalizer(
                x,
                y,
                self_index=index,
                self_term="include" if index is None else "exclude",
            )
            total = np.logaddexp(total, part)
            advance(float(len(x)) * len(y))
        yield total


def _fit(
    job: _Job, estimator: Any, n_components: int, seed: int | None, start: Start
) -> None:
    """Fit in one pass over the keys.

    The partition comes from rows drawn from the whole file, a file's beginning being no
    fair sample of it; every key then counts once, labelled by its nearest centroid.
    """
    generator = np.random.default_rng(seed)
    keys = job.keys
    centroids = None
    if n_components > 1:
        chosen = _kmeans.sample_rows(len(keys), n_components, generator)
        centroids = _kmeans.train_centroids(
            keys.block(chosen), n_components, generator=generator
        )
    advance = start("keys", float(len(keys)))
    for _, y in keys.blocks(job.block_rows):
        labels = (
            np.zeros(len(y), np.int64)
            if centroids is None
            else _kmeans.assign(y, centroids)
        )
        estimator.partial_fit(y, labels=labels)
        advance(float(len(y)))


def _gaussian(job: _Job, estimator: Any, start: Start) -> Iterator[Rows]:
    """Yield the Gaussian log normalisers, block of queries by block of queries."""
    advance = start("queries", float(len(job.queries)))
    for first, x in job.queries.blocks(job.block_rows):
        index = np.arange(first, first + len(x)) if job.own else None
        yield estimator.log_normalizer(
            x, self_index=index, self_term=job.self_term if job.own else "include"
        )
        advance(float(len(x)))


def _predicted_error(job: _Job, estimator: Any) -> float:
    """Return the median predicted error of log Z over rows spread over the queries."""
    count = min(_ESTIMATED_ROWS, len(job.queries))
    rows = np.unique(np.linspace(0, len(job.queries) - 1, count).astype(np.int64))
    errors = estimator.error_estimate(
        job.queries.block(rows),
        self_index=rows if job.own else None,
        self_term=job.self_term if job.own else "include",
    )
    return float(np.median(errors))


def _block_rows(files: list[_RowFile]) -> int:
    width = max(file.columns * file.dtype.itemsize for file in files)
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // width))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(subquad.__version__, prog_name="subquad")
def main() -> None:
    """Sub-quadratic sums behind softmax(X Y^T)."""


def _positive(
    _: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        message = f"expected a positive finite number, got {value}"
        raise click.BadParameter(message, param=parameter)
    return value


@main.command("normalizers")
@click.argument("keys", type=input_file)
@click.option(
    "--queries", type=input_file, help="Queries; by default the keys themselves."
)
@click.option(
    "-o",
    "--output",
    type=output_file,
    required=True,
    help="Where log Z goes, a .npy file of one number for each query.",
)
@click.option(
    "--method",
    type=click.Choice(["exact", "gaussian"]),
    default="exact",
    show_default=True,
)
@click.option(
    "--components", type=click.IntRange(min=1), help="Gaussian components (default 1)."
)
@click.option(
    "--covariance",
    type=click.Choice(["full", "diag", "low_rank"]),
    help="Covariance of each component (default full).",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Rank of --covariance low_rank."
)
@click.option(
    "--control-samples",
    type=click.IntRange(min=0),
    help="Sampled keys that correct the Gaussian value (default 0).",
)
@click.option(
    "--exclude-self", is_flag=True, help="Leave key i out of the sum of query i."
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    callback=_positive,
    help="Divides every score.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@threads_option
@click.option("--chunk-rows", type=click.IntRange(min=1), help="Rows read at a time.")
def _normalizers(
    keys: Path,
    queries: Path | None,
    output: Path,
    method: str,
    components: int | None,
    covariance: str | None,
    rank: int | None,
    control_samples: int | None,
    exclude_self: bool,
    temperature: float,
    seed: int,
    threads: int | None,
    chunk_rows: int | None,
) -> None:
    """Write log Z_i = log sum_j exp(x_i . y_j / temperature) for every query x_i.

    KEYS holds the rows y_j, a .npy file of float16, float32 or float64. Files are read
    in blocks of rows and may be larger than memory (.npz files are loaded whole). The
    output appears when it is complete, or not at all.
    """
    only_gaussian = {
        "--components": components,
        "--covariance": covariance,
        "--rank": rank,
        "--control-samples": control_samples,
    }
    for name, value in only_gaussian.items():
        if method != "gaussian" and value is not None:
            raise click.UsageError(f"{name} needs --method gaussian")
    if exclude_self and queries is not None:
        raise click.UsageError("--exclude-self needs the queries to be the keys")
    if rank is not None and covariance != "low_rank":
        raise click.UsageError("--rank needs --covariance low_rank")
    check_output(output, [keys] + ([queries] if queries else []))
    # Scores are divided by the temperature; the root on both sides keeps a query that
    # is a key equal to it.
    scale = 1.0 / math.sqrt(temperature)
    key_rows = _open_rows(keys, "keys", scale)
    query_rows = key_rows if queries is None else _open_rows(queries, "queries", scale)
    if len(key_rows) == 0:
        raise Unusable(f"{keys}: there are no keys, shape {key_rows.array.shape}")
    if query_rows.columns != key_rows.columns:
        raise Unusable(
            f"{query_rows.path}: queries must have {key_rows.columns} columns, as the "
            f"keys have, got {query_rows.columns}"
        )
    dtype = np.promote_types(key_rows.dtype, query_rows.dtype)
    key_rows = dataclasses.replace(key_rows, dtype=dtype)
    query_rows = (
        key_rows if queries is None else dataclasses.replace(query_rows, dtype=dtype)
    )
    job = _Job(
        key_rows,
        query_rows,
        "exclude" if exclude_self else "include",
        chunk_rows or _block_rows([key_rows, query_rows]),
    )
    note = ""
    try:
        with (
            ends_orderly(),
            thread_count(threads),
            progress() as start,
            whole_files() as outputs,
        ):
            file = outputs.array(output, (len(query_rows),), dtype)
            if method == "exact":
                results = _exact(job, start)
            else:
                n_components = components or 1
                covariance_type: Any = covariance or "full"
                estimator = subquad.GaussianNormalizer(
                    n_components,
                    covariance_type=covariance_type,
                    rank=rank,
                    control_samples=control_samples or 0,
                    random_state=seed,
                )
                _fit(job, estimator, n_components, seed, start)
                results = _gaussian(job, estimator, start)
                if len(query_rows):
                    error = _predicted_error(job, estimator)
                    note = f"; predicted error of log Z: {error:.2g} (median)"
            for values in results:
                file.write(np.ascontiguousarray(values, dtype=dtype).data)
    except MemoryError:
        raise Failed("out of memory; --chunk-rows makes the blocks smaller") from None
    except (ValueError, TypeError) as error:
        raise Failed(str(error)) from error
    click.echo(f"wrote {output}: {len(query_rows)} values of {dtype}{note}", err=True)


main.add_command(embed)


@main.command("demo")
@click.option(
    "--output",
    "-o",
    type=output_file,
    default=Path("subquad-demo.png"),
    show_default=True,
    help="The figure.",
)
@click.option("--quick", is_flag=True, help="Small data, a few seconds.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@threads_option
def _show(output: Path, quick: bool, seed: int, threads: int | None) -> None:
    """Show accuracy and time of every way to a normaliser, on real data."""
    from . import _demo

    check_output(output, [])
    try:
        with ends_orderly(), thread_count(threads):
            _demo.run(output, quick=quick, seed=seed)
    except ModuleNotFoundError as error:
        raise Failed(
            f'the demo needs {error.name}: pip install "subquad[cli]" matplotlib'
        ) from None
    except OSError as error:
        raise Failed(f"{output}: cannot be written: {why(error)}") from error


@main.command("config")
def _config() -> None:
    """Print version, instruction set, threads and backends."""
    shown: object = subquad.show_config()
    if shown is not None:
        click.echo(shown)


if __name__ == "__main__":
    sys.exit(main(prog_name="subquad"))
