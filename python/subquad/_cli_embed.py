"""The command ``subquad embed``: from a file of edges to a file of rows."""

from __future__ import annotations

import dataclasses
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from . import _kmeans
from ._cli_common import (
    Failed,
    Unusable,
    check_output,
    ends_orderly,
    input_file,
    output_file,
    progress,
    thread_count,
    threads_option,
    whole_files,
)
from ._cli_edges import Graph, blocks, delimiter_of, fields_of, read_graph, shown
from .embedding import EDRep, random_walk

Rows = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]

# k-means on more rows moves the centroids less than another seed does.
_MOST_ROWS_CLUSTERED = 100_000
_MOST_ROWS_PICTURED = 4000
_MOST_COLOURS_NAMED = 20
_MOST_DIMENSIONS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class _RowLabels:
    """A label for each row, -1 for none, and what the labels are called."""

    numbers: Labels
    names: list[str]


def _read_labels(path: Path, graph: Graph) -> _RowLabels:
    """Read one label a line in the order of the rows, or lines of node and label."""
    with path.open("rb") as file:
        lines = b"".join(blocks(path, file, lambda text, total: lambda amount: None))
    numbered = [
        (number, line.strip())
        for number, line in enumerate(lines.split(b"\n")[:-1], 1)
        if not line.lstrip().startswith(b"#")
    ]
    # A node without a label is a line of one column, and may be the first.
    for _, text in numbered:
        delimiter = delimiter_of(text)
        if len(fields_of(text, delimiter)) > 1:
            found = _labels_of_nodes(path, numbered, graph, delimiter)
            break
    else:
        found = _labels_in_order(path, numbered, graph)
    names = sorted({name for name in found if name is not None}, key=_natural)
    if len(names) < 2:
        raise Unusable(f"{path}: expected two labels at least, got {len(names)}")
    number = {name: place for place, name in enumerate(names)}
    return _RowLabels(
        np.array([-1 if name is None else number[name] for name in found]),
        [name.decode("utf-8", "replace") for name in names],
    )


def _natural(name: bytes) -> tuple[int, bytes]:
    """Sort integers by their size."""
    return (len(name) if name.isdigit() else sys.maxsize, name)


def _labels_in_order(
    path: Path, lines: list[tuple[int, bytes]], graph: Graph
) -> list[bytes | None]:
    if len(lines) != len(graph):
        raise Unusable(
            f"{path}: expected a label for each of {len(graph)} nodes, or lines of "
            f"node and label, got {len(lines)} lines"
        )
    return [_label(text) for _, text in lines]


def _labels_of_nodes(
    path: Path,
    lines: list[tuple[int, bytes]],
    graph: Graph,
    delimiter: bytes | None,
) -> list[bytes | None]:
    found: list[bytes | None] = [None] * len(graph)
    seen: dict[int, int] = {}
    row_of = graph.row_of()
    unknown = 0
    for number, text in lines:
        if not text:
            continue
        fields = fields_of(text, delimiter)
        if len(fields) > 2:
            raise Unusable(
                f"{path}: line {number}: expected a node and its label, got "
                f"{len(fields)} columns"
            )
        row = row_of(fields[0])
        if row is None:
            unknown += 1
            continue
        if row in seen:
            raise Unusable(
                f"{path}: line {number}: node {shown(fields[0])} has a label in line "
                f"{seen[row]} already"
            )
        seen[row] = number
        found[row] = _label(fields[1]) if len(fields) == 2 else None
    if unknown:
        click.echo(f"{path}: {unknown} lines name no node of the edges", err=True)
    return found


def _label(text: bytes) -> bytes | None:
    return None if text in (b"", b"-1") else text


def _clusters(rows: Rows, n_clusters: int, seed: int) -> Labels:
    """Return spherical k-means clusters of unit rows."""
    generator = np.random.default_rng(seed)
    chosen = rows
    if len(rows) > max(_MOST_ROWS_CLUSTERED, 256 * n_clusters):
        size = max(_MOST_ROWS_CLUSTERED, 256 * n_clusters)
        picked = generator.choice(len(rows), size, replace=False, shuffle=False)
        chosen = rows[np.sort(picked)]
    centroids = _kmeans.train_centroids(
        chosen, n_clusters, metric="spherical", generator=generator
    )
    return np.asarray(_kmeans.assign(rows, centroids, metric="spherical"), np.int64)


def _agreement(rows: Rows, labels: _RowLabels, seed: int) -> str:
    """Compare clusters of the rows with their labels."""
    from sklearn.metrics import normalized_mutual_info_score

    known = labels.numbers >= 0
    clusters = _clusters(rows[known], len(labels.names), seed)
    nmi = normalized_mutual_info_score(labels.numbers[known], clusters)
    return f"NMI {nmi:.4f} ({len(labels.names)} labels of {known.sum()} rows)"


def _need(module: str, option: str, install: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"{option} needs {error.name}: pip install {install}"
        raise Failed(message) from None


def _draw(
    path: Path,
    rows: Rows,
    labels: _RowLabels | None,
    seed: int,
    threads: int | None,
) -> None:
    """Draw rows in the plane by t-SNE, coloured by their labels."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(rows) > _MOST_ROWS_PICTURED:
        chosen = np.random.default_rng(seed).choice(
            len(rows), _MOST_ROWS_PICTURED, replace=False
        )
        chosen.sort()
        rows = rows[chosen]
        if labels is not None:
            labels = dataclasses.replace(labels, numbers=labels.numbers[chosen])
    perplexity = min(30.0, (len(rows) - 1) / 3)
    scaling = TSNE(init="pca", perplexity=perplexity, random_state=seed)
    with threadpool_limits(threads):
        plane = scaling.fit_transform(rows)
    figure = Figure(figsize=(7, 6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal", adjustable="datalim")
    size = min(20.0, 8000 / len(rows))
    if labels is None:
        axes.scatter(plane[:, 0], plane[:, 1], s=size, color="tab:blue", linewidths=0)
    else:
        none = labels.numbers < 0
        axes.scatter(plane[none, 0], plane[none, 1], s=size, color="0.8", linewidths=0)
        count = len(labels.names)
        scale = "tab10" if count <= 10 else "tab20" if count <= 20 else "turbo"
        colours = mpl.colormaps[scale]
        if count > _MOST_COLOURS_NAMED:
            colours = colours.resampled(count)
        for number, name in enumerate(labels.names):
            own = labels.numbers == number
            axes.scatter(
                plane[own, 0],
                plane[own, 1],
                s=size,
                color=colours(number),
                linewidths=0,
                label=name,
            )
        if count <= _MOST_COLOURS_NAMED:
            figure.legend(
                loc="outside right upper", frameon=False, markerscale=6 / size**0.5
            )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with whole_files() as outputs:
        outputs.open(path, picture.tell()).write(picture.getbuffer())


def _nodes_path(output: Path) -> Path:
    return output.with_name(f"{output.name.removesuffix('.npy')}.nodes.txt")


def _fit(estimator: EDRep, operator: Any) -> EDRep:
    try:
        estimator.fit(operator)
    except MemoryError:
        raise Failed(
            "out of memory; a smaller --dim, or --dtype float32, takes less"
        ) from None
    except (ValueError, TypeError) as error:
        raise Failed(str(error)) from error
    return estimator


@click.command("embed")
@click.argument("edges", type=input_file)
@click.option(
    "-o",
    "--output",
    type=output_file,
    required=True,
    help="Where the rows go, a .npy file of one row of numbers for each node.",
)
@click.option(
    "--dim",
    type=click.IntRange(min=1, max=_MOST_DIMENSIONS),
    default=128,
    show_default=True,
    help="Numbers in a row.",
)
@click.option(
    "--walk-length",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Most steps of a random walk.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.8,
    show_default=True,
    help="Of the first epoch; it falls to zero.",
)
@click.option(
    "--clusters",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Gaussian components of the normaliser.",
)
@click.option(
    "--gradient",
    type=click.Choice(["source", "symmetric", "full"]),
    default="source",
    show_default=True,
)
@click.option("--asymmetric", is_flag=True, help="Keys of their own beside the rows.")
@click.option(
    "--keys", type=output_file, help="Where the keys go, a .npy file; --asymmetric."
)
@click.option("--directed", is_flag=True, help="Edges lead from source to target only.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--labels",
    type=input_file,
    help="A label a line in the order of the rows, or lines of node and label; -1 or "
    "nothing for none. Clusters of the rows are compared with them.",
)
@click.option(
    "--nodes",
    type=output_file,
    help="Where the names of the rows go (default: beside the output, where they are "
    "not 0, 1, 2, ...).",
)
@click.option(
    "--picture", type=output_file, help="A map of up to 4000 rows, a .png file."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
)
@threads_option
def embed(
    edges: Path,
    output: Path,
    dim: int,
    walk_length: int,
    epochs: int,
    learning_rate: float,
    clusters: int,
    gradient: Any,
    asymmetric: bool,
    keys: Path | None,
    directed: bool,
    dtype: str,
    labels: Path | None,
    nodes: Path | None,
    picture: Path | None,
    seed: int,
    threads: int | None,
) -> None:
    """Write a row of numbers for each node of a graph, close where walks lead.

    EDGES is text of two or three columns, source, target and perhaps a weight,
    separated by tabs, semicolons, commas or blanks, with comments after # and perhaps
    a header; packed by gzip or not. A .npz file holds the adjacency matrix as
    scipy.sparse.save_npz writes it, a .gml file a graph. Edges lead both ways, unless
    --directed; those that are given more than once add up.

    Nodes 0, 1, ..., n - 1 are rows 0, 1, ..., n - 1. Other nodes are rows in the order
    in which they first appear, and their names are written beside the output, one a
    line. All outputs appear when they are complete, or not at all, and replace files
    of their names.
    """
    if keys is not None and not asymmetric:
        raise click.UsageError("--keys needs --asymmetric")
    if asymmetric and gradient == "symmetric":
        raise click.UsageError("--gradient symmetric has no --asymmetric")
    if picture is not None and picture.suffix.lower() != ".png":
        raise click.UsageError(f"--picture must end in .png, got {picture}")
    if picture is not None and dim < 2:
        raise click.UsageError("--picture needs --dim 2 at least")
    inputs = [edges] + ([labels] if labels else [])
    check_output(output, inputs)
    names_path = nodes or _nodes_path(output)
    wanted = [output, names_path, keys, picture]
    places = [path for path in wanted if path is not None]
    for path in places:
        check_output(path, inputs)
    if len({path.resolve() for path in places}) < len(places):
        raise click.UsageError(
            f"two outputs are one file: {', '.join(map(str, places))}"
        )
    # Missing packages show before the work, not after it.
    _need("scipy.sparse", "embed", '"subquad[cli]"')
    if labels is not None:
        _need("sklearn.metrics", "--labels", "scikit-learn")
    if picture is not None:
        _need("matplotlib", "--picture", '"subquad[cli]"')
        _need("sklearn.manifold", "--picture", "scikit-learn")
    with ends_orderly(), thread_count(threads):
        try:
            with progress() as start:
                graph = read_graph(edges, directed=directed, start=start)
            for note in graph.notes:
                click.echo(note, err=True)
            row_labels = None if labels is None else _read_labels(labels, graph)
            operator = random_walk(graph.adjacency, length=walk_length, dtype=dtype)
        except MemoryError:
            raise Failed(f"{edges}: does not fit into memory") from None
        except (ValueError, TypeError) as error:
            raise Failed(f"{edges}: {error}") from error
        n_rows = len(graph)
        if picture is not None and n_rows < 4:
            raise Failed(f"{edges}: a picture needs 4 nodes at least, got {n_rows}")
        with whole_files() as outputs:
            files = [outputs.array(output, (n_rows, dim), dtype)]
            if keys is not None:
                files.append(outputs.array(keys, (n_rows, dim), dtype))
            estimator = EDRep(
                dim,
                n_clusters=clusters,
                max_iter=epochs,
                learning_rate=learning_rate,
                symmetric=not asymmetric,
                gradient=gradient,
                random_state=seed,
                progress=_shows_progress(),
            )
            _fit(estimator, operator)
            rows = estimator.embedding_
            for file, array in zip(files, (rows, estimator.key_embedding_)):
                file.write(np.ascontiguousarray(array).data)
            named = graph.names is not None
            if named or nodes is not None:
                names = graph.names or [b"%d" % row for row in range(n_rows)]
                text = b"\n".join(names) + b"\n"
                outputs.open(names_path, len(text)).write(text)
        loss = estimator.loss_
        click.echo(
            f"wrote {output}: {n_rows} rows of {dim} values of {dtype}; loss "
            f"{loss[-1]:.4g}, {loss[0]:.4g} before",
            err=True,
        )
        if named:
            click.echo(f"wrote {names_path}: the names of the rows", err=True)
        elif nodes is None and names_path.exists():
            click.echo(
                f"{names_path} is left as it was: row i of {output} is node i", err=True
            )
        if row_labels is not None:
            click.echo(_agreement(rows, row_labels, seed))
        if picture is not None:
            if row_labels is None and clusters > 1:
                found = _clusters(rows, clusters, seed)
                names_shown = [f"cluster {number}" for number in range(clusters)]
                row_labels = _RowLabels(found, names_shown)
            _draw(picture, rows, row_labels, seed, threads)
            click.echo(f"wrote {picture}", err=True)


def _shows_progress() -> bool:
    """Whether a bar on standard error is seen by somebody, and can be drawn."""
    if not sys.stderr.isatty():
        return False
    try:
        import rich  # noqa: F401 - the question is whether it is there
    except ModuleNotFoundError:
        return False
    return True
