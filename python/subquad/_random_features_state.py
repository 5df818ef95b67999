"""What `RandomFeatures` has learned: how it starts, grows, merges and is stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._estimators import (
    Arrays,
    as_rows,
    is_number,
    like_of,
    require_finite,
    require_integer,
    seed_of,
)
from ._feature_couplings import Coupling, draw
from ._feature_families import (
    FAMILIES,
    Basis,
    Family,
    Geometry,
    Objective,
    Scales,
    fit_geometry,
)
from ._feature_maps import FeatureMap, fold, fold_trigonometric, symmetric
from ._feature_predictions import (
    predicted_log_variance,
    predicted_trigonometric_log_variance,
)
from ._feature_statistics import Moments, moments_of
from ._host import HostArray, from_host, has_float64, to_host

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
Side: TypeAlias = Literal["query", "key"]
_T = TypeVar("_T")

BASES = ("identity", "diagonal", "eigen", "balanced")
SCALES = ("one", "scalar", "per_dimension")
_ONE_OF: dict[str, tuple[Any, ...]] = {
    "family": ("auto", *FAMILIES),
    "kernel": ("softmax", "gaussian"),
    "coupling": ("iid", "orthogonal", "simplex", "hadamard"),
    "antithetic": (False, True),
    "objective": ("log", "mean"),
    "basis": (None, *BASES),
    "centered": (None, False, True),
    "scales": (None, *SCALES),
}
# Rows of each side whose distances decide the bandwidth "median".
_MEDIAN_ROWS = 256
# So little of a variance, in logarithms, is not worth a dearer family.
_TIE = 1e-2

# Shares of the largest φ that dimensions of equal φ may differ by: the eigenvectors of
# such are wrong by as much as their distance is small, and by no more than this else.
_EQUAL = float(np.sqrt(np.finfo(np.float64).eps))


class Settings(NamedTuple):
    """Parameters that must stay as they were when rows were first seen."""

    n_components: int
    family: str
    kernel: str
    bandwidth: float | Literal["median", "scale"]
    scale: float | None
    coupling: Coupling
    antithetic: bool
    objective: Objective
    regularization: float | Literal["auto"]
    basis: Basis | None
    centered: bool | None
    scales: Scales | None

    def check(self) -> None:
        """Raise ValueError for a parameter that has no meaning."""
        require_integer("n_components", self.n_components, 1)
        for name, allowed in _ONE_OF.items():
            value = getattr(self, name)
            if not any(value is known or _equal(value, known) for known in allowed):
                choices = ", ".join(map(repr, allowed))
                message = f"{name} must be one of {choices}, got {value!r}"
                raise ValueError(message)
        if not _equal(self.bandwidth, "median") and not _equal(self.bandwidth, "scale"):
            _require_positive("bandwidth", self.bandwidth, '"median", "scale" or ')
        if self.scale is not None:
            _require_positive("scale", self.scale, "None or ")
        regularization: Any = self.regularization
        if not _equal(regularization, "auto") and not (
            is_number(regularization) and regularization >= 0
        ):
            message = (
                'regularization must be "auto" or a finite number >= 0, got '
                f"{regularization!r}"
            )
            raise ValueError(message)
        if self.is_trigonometric:
            for name in ("basis", "centered", "scales"):
                if getattr(self, name) is not None:
                    message = (
                        f"{name} is for positive families, got {name}="
                        f'{getattr(self, name)!r} with family="trigonometric"'
                    )
                    raise ValueError(message)
        if self.has_pairs and self.n_components % 2:
            why = "trigonometric" if self.is_trigonometric else "antithetic"
            message = (
                f"n_components must be even, as {why} features come in pairs, got "
                f"{self.n_components}"
            )
            raise ValueError(message)

    @property
    def is_trigonometric(self) -> bool:
        """Whether the features are cosines and sines."""
        return self.family == "trigonometric"

    @property
    def has_pairs(self) -> bool:
        """Whether a projection makes two features."""
        return self.is_trigonometric or bool(self.antithetic)

    @property
    def n_rows(self) -> int:
        """Number of projections."""
        return int(self.n_components) // (2 if self.has_pairs else 1)

    @property
    def alpha(self) -> float:
        """The factor of |x|² and |y|² in the logarithm of the kernel."""
        return -0.5 if self.kernel == "gaussian" else 0.0

    def candidates(self) -> list[Family]:
        """Return the families to choose from, the cheaper ones first."""
        if self.is_trigonometric:
            return [FAMILIES["trigonometric"]]
        presets = [
            family for name, family in FAMILIES.items() if name != "trigonometric"
        ]
        chosen = presets if self.family == "auto" else [FAMILIES[self.family]]
        names = {_choices(family): family.name for family in presets}
        given = {
            name: getattr(self, name)
            for name in ("basis", "centered", "scales")
            if getattr(self, name) is not None
        }
        found = {}
        for family in chosen:
            changed = dataclasses.replace(family, **given)
            key = _choices(changed)
            name = names.get(key, _descriptive(changed))
            found[key] = dataclasses.replace(changed, name=name)
        if len(found) == 1 and not names.keys() >= found.keys():
            found = {
                key: dataclasses.replace(family, name="custom")
                for key, family in found.items()
            }
        return sorted(found.values(), key=_cost)


def _choices(family: Family) -> tuple[Any, ...]:
    return family.basis, family.centered, family.scales


def _descriptive(family: Family) -> str:
    centered = "-centered" if family.centered else ""
    return f"{family.basis}-{family.scales}{centered}"


def _cost(family: Family) -> tuple[int, int, bool]:
    return BASES.index(family.basis), SCALES.index(family.scales), family.centered


def _equal(value: Any, known: Any) -> bool:
    """Compare what a user gave, which may be an array, with a constant."""
    return type(value) in (type(known), np.bool_) and bool(value == known)


def _require_positive(name: str, value: Any, others: str) -> None:
    if not (is_number(value) and value > 0):
        message = f"{name} must be {others}a finite number > 0, got {value!r}"
        raise ValueError(message)


@dataclass(frozen=True)
class Fitted:
    """A fitted state; never changed, but for what is computed from it when needed.

    Attributes
    ----------
    settings : Settings
    x : Moments
        Of the queries, as they came.
    y : Moments or None
        Of the keys, where these were given.
    bandwidth : float
    family : Family
        The one that was chosen.
    geometry : Geometry
        Of the rows times `factor`.
    predictions : dict
        The predicted log variance of each family that there was to choose from.
    omega : ndarray of float64, shape (rows, d)
        What was drawn.
    seed : int
    like : array
        An empty array of the library and on the device of the rows.
    """

    settings: Settings
    x: Moments
    y: Moments | None
    bandwidth: float
    family: Family
    geometry: Geometry
    predictions: dict[str, Float64]
    omega: Float64
    seed: int
    like: Array
    _cache: dict[Any, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        # Casts for one data type or another are made again.
        return {**self.__dict__, "_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepare()

    def prepare(self) -> None:
        """Make the maps, which cannot be made while a call is traced or captured."""
        for dtype in ("float32", "float64"):
            self.map("query", dtype)
            self.map("key", dtype)

    @property
    def n_features(self) -> int:
        """Number of features d of a row."""
        return int(self.x.mean.shape[-1])

    @property
    def heads(self) -> tuple[int, ...]:
        """Batch dimensions of what was fitted."""
        return tuple(self.x.mean.shape[:-1])

    @property
    def factor(self) -> float:
        """What rows are multiplied by before anything else."""
        scale = self.settings.scale
        return math.sqrt(1.0 if scale is None else scale) / self.bandwidth

    def cached(self, key: Any, make: Callable[[], _T]) -> _T:
        """Return what `make` returned when the key was first asked for."""
        if key not in self._cache:
            self._cache[key] = make()
        found: _T = self._cache[key]
        return found

    def learned(self, name: str, make: Callable[[], HostArray]) -> Array:
        """Return an array that users see, in the library of the rows."""
        return self.cached(name, lambda: from_host(np.array(make()), self.like))

    def sides(self) -> tuple[Moments, Moments]:
        """Return the moments of queries and keys times `factor`."""
        left = self.x.scaled(self.factor)
        return left, left if self.y is None else self.y.scaled(self.factor)

    def expectation(self) -> Geometry:
        """Return the geometry with the φ to be expected of other rows."""
        if self.settings.is_trigonometric:
            return self.geometry
        return self.cached("expectation", self._expectation)

    def _expectation(self) -> Geometry:
        left, right = self.sides()
        return expecting(self.geometry, shrunk(left), shrunk(right))

    def host_maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return the maps of queries and keys, in float64."""
        return self.cached("host maps", self._folded)

    def _folded(self) -> tuple[FeatureMap, FeatureMap]:
        settings = self.settings
        if settings.is_trigonometric:
            return fold_trigonometric(
                self.geometry,
                self.omega,
                settings.alpha,
                self.factor,
                settings.n_components,
            )
        return fold(
            self.geometry,
            self.omega,
            settings.alpha,
            self.factor,
            settings.n_components,
            bool(settings.antithetic),
        )

    @property
    def is_symmetric(self) -> bool:
        """Whether queries and keys have the same features."""
        return self.settings.is_trigonometric or symmetric(self.geometry)

    def map(self, side: Side, dtype: str, *, for_dask: bool = False) -> FeatureMap:
        """Return a map in a data type, in the library of the rows or as Dask arrays."""
        if not has_float64(self.like):
            dtype = "float32"
        key = (side, dtype, for_dask)
        return self.cached(key, lambda: self._cast(side, dtype, for_dask))

    def _cast(self, side: Side, dtype: str, for_dask: bool) -> FeatureMap:
        host = self.host_maps()[0 if side == "query" else 1]
        if for_dask:
            from ._backends.dask.common import as_dask

            arrays: Any = (
                None if a is None else as_dask(a.astype(dtype)) for a in host
            )
            return FeatureMap(*arrays)
        kind = getattr(_dispatch.namespace_of(self.like), dtype)
        arrays = (None if a is None else from_host(a, self.like, kind) for a in host)
        return FeatureMap(*arrays)


# -------- learning


def learn(
    known: Fitted | None,
    settings: Settings,
    X: Array,
    keys: Array | None,
    weights: Array | None,
    random_state: Any,
) -> Fitted:
    """Return the state of the rows known so far, if any, and those of X and `keys`.

    `weights` (n,) of the library of X tell how often a row of X counts.
    """
    if known is not None and settings != known.settings:
        message = (
            "parameters must stay as they were in the first call, "
            f"{known.settings}, got {settings}; fit starts anew"
        )
        raise ValueError(message)
    settings.check()
    rows = as_rows(X, heads=True)
    others = None if keys is None else as_rows(keys, "keys", heads=True)
    _check_fit(known, rows, others)
    like = like_of(rows) if known is None else known.like
    _dispatch.backend_for(X=like_of(rows), fitted=like)
    if others is not None:
        _dispatch.backend_for(X=rows, keys=others)
    for name, part in (("X", rows), ("keys", others)):
        if known is None and part is not None and part.shape[-2] == 0:
            message = (
                f"0 sample(s) (shape={tuple(part.shape)}) while a minimum of 1 is "
                f"required in {name}."
            )
            raise ValueError(message)
    diagonal = all(
        family.basis in ("identity", "diagonal") for family in settings.candidates()
    )
    x = _added(None if known is None else known.x, rows, weights, "X", diagonal)
    y = None
    if others is not None:
        y = _added(None if known is None else known.y, others, None, "keys", diagonal)
    if known is None:
        seed = seed_of(random_state)
        median = settings.bandwidth == "median"
        bandwidth = _median_distance(rows, others, seed) if median else None
        omega = draw(settings.coupling, settings.n_rows, int(rows.shape[-1]), seed)
    else:
        seed, bandwidth, omega = known.seed, known.bandwidth, known.omega
    return derived(settings, x, y, bandwidth, omega, seed, like)


def _check_fit(known: Fitted | None, rows: Array, others: Array | None) -> None:
    shape = tuple(rows.shape)
    if others is not None:
        given = tuple(others.shape)
        if (*shape[:-2], shape[-1]) != (*given[:-2], given[-1]):
            message = (
                "keys must have the batch dimensions and features of X, of shape "
                f"{shape}, got shape {given}"
            )
            raise ValueError(message)
    if known is None:
        return
    if shape[-1] != known.n_features:
        message = (
            f"X has {shape[-1]} features, but RandomFeatures is expecting "
            f"{known.n_features} features as input"
        )
        raise ValueError(message)
    if shape[:-2] != known.heads:
        message = (
            f"X must have the batch dimensions of the first call, {known.heads}, got "
            f"shape {shape}"
        )
        raise ValueError(message)
    if (others is None) != (known.y is None):
        what = "left out" if known.y is None else "given"
        message = f"keys must be {what}, as in the first call"
        raise ValueError(message)


def _added(
    known: Moments | None,
    rows: Array,
    weights: Array | None,
    name: str,
    diagonal: bool,
) -> Moments:
    """Return the moments of known rows and of others."""
    if rows.shape[-2] == 0 and known is not None:
        return known
    with np.errstate(all="ignore"):
        if weights is None:
            moments = moments_of(rows, diagonal)
        else:
            moments = _weighted_moments(rows, weights, diagonal)
    if not np.all(np.isfinite(moments.mean)) or not np.all(
        np.isfinite(moments.scatter)
    ):
        if _dispatch.library_of(rows).name == "dask":
            rows = rows.compute()
        require_finite(rows, name=name)
        message = f"{name} must be of smaller size: its squares overflow"
        raise ValueError(message)
    return moments if known is None else known.merge(moments)


def _weighted_moments(rows: Array, weights: Array, diagonal: bool) -> Moments:
    """Return the moments of rows (n, d) that count as often as their weights say."""
    backend = _dispatch.backend_for(X=rows)
    xp = _dispatch.namespace_of(rows)
    weights = xp.astype(weights, rows.dtype)
    labels = from_host(np.zeros(rows.shape[0], np.int64), rows)
    counts, sums = backend.component_sums(rows, labels, weights, 1)
    count = float(to_host(counts)[0])
    mean = to_host(sums).astype(np.float64) / count
    scatter, _ = backend.component_scatter(
        rows, labels, weights, from_host(mean, rows), diagonal
    )
    return Moments(count, mean[0], to_host(scatter).astype(np.float64)[0])


def derived(
    settings: Settings,
    x: Moments,
    y: Moments | None,
    bandwidth: float | None,
    omega: Float64,
    seed: int,
    like: Array,
) -> Fitted:
    """Return the state that follows from statistics."""
    if settings.bandwidth == "scale":
        bandwidth = _scale_bandwidth(x, y)
    elif settings.bandwidth != "median":
        bandwidth = float(settings.bandwidth)
    assert bandwidth is not None
    factor = math.sqrt(1.0 if settings.scale is None else settings.scale) / bandwidth
    left = x.scaled(factor)
    right = left if y is None else y.scaled(factor)
    expected = shrunk(left), shrunk(right)
    found = []
    for family in settings.candidates():
        geometry = _canonical(
            fit_geometry(
                family,
                left,
                right,
                objective=settings.objective,
                regularization=settings.regularization,
            )
        )
        expectation = geometry
        if not settings.is_trigonometric:
            expectation = expecting(geometry, *expected)
        predicted = np.asarray(_predicted(settings, expectation), np.float64)
        found.append((family, geometry, expectation, predicted))
    predictions = {family.name: predicted for family, _, _, predicted in found}
    values = [
        math.inf if np.isnan(value).any() else float(np.mean(value))
        for value in predictions.values()
    ]
    # The cheapest of those that are as good as the best.
    best = min(values)
    chosen = next(i for i, value in enumerate(values) if value <= best + _TIE)
    family, geometry, expectation, _ = found[chosen]
    fitted = Fitted(
        settings,
        x,
        y,
        bandwidth,
        family,
        geometry,
        predictions,
        omega,
        seed,
        like,
    )
    fitted.cached("expectation", lambda: expectation)
    fitted.prepare()
    return fitted


def _canonical(geometry: Geometry) -> Geometry:
    """Return an equally good geometry that rounding cannot turn.

    Eigenvectors are known but for their sign, and those of equal eigenvalues but for a
    rotation, which one library or batch may have otherwise than another: features would
    have nothing in common then. Here the products of the basis with numbers that have
    nothing to do with data are triangular with a positive diagonal.
    """
    if geometry.is_diagonal:
        return geometry
    *heads, d = geometry.phi.shape
    numbers = np.random.default_rng(0).standard_normal((d, d))
    sign = np.where(geometry.basis @ numbers[:, 0] < 0.0, -1.0, 1.0)
    rows = [
        sign[..., None] * geometry.basis,
        sign[..., None] * geometry.inverse_transpose,
    ]
    if geometry.mean is not None:
        rows.append((sign * geometry.mean)[..., None])
    for head in np.ndindex(*heads):
        phi = geometry.phi[head]
        order = np.argsort(phi, kind="stable")
        borders = np.flatnonzero(np.diff(phi[order]) > _EQUAL * np.max(phi)) + 1
        if len(borders) == d - 1:
            continue
        for group in np.split(order, borders):
            if len(group) == 1:
                continue
            products = rows[0][head][group] @ numbers[:, : len(group)]
            square, triangle = np.linalg.qr(products)
            turn = np.where(np.diagonal(triangle) < 0.0, -square, square).T
            for part in rows:
                part[head][group] = turn @ part[head][group]
    return dataclasses.replace(
        geometry,
        basis=rows[0],
        inverse_transpose=rows[1],
        mean=None if geometry.mean is None else rows[2][..., 0],
    )


def _predicted(settings: Settings, geometry: Geometry) -> Float64:
    if settings.is_trigonometric:
        return predicted_trigonometric_log_variance(
            geometry, settings.n_rows, settings.coupling, settings.objective
        )
    return predicted_log_variance(
        geometry,
        settings.n_rows,
        settings.coupling,
        settings.has_pairs,
        settings.objective,
    )


def shrunk(moments: Moments) -> Moments:
    """Return the moments to be expected of other rows.

    Few rows leave dimensions in which they hardly vary, where others will, and a mean
    that others do not have: a family that trusts these would seem the best. Means are
    shrunk to 0 (James and Stein, 1961), and covariances to a multiple of the identity
    (Chen, Wiesel, Eldar and Hero, 2010), by as much as the moments themselves say; the
    trace of the second moment stays.
    """
    d, n = moments.mean.shape[-1], moments.count
    length = np.sum(moments.mean * moments.mean, axis=-1)
    covariance = moments.to_diagonal().covariance
    # A single row tells its size and no more.
    size = length if n <= 1.0 else np.sum(covariance, axis=-1) * (n / (n - 1.0))
    excess = np.maximum(length - size / n, 0.0)
    share = excess / np.where(length > 0.0, length, 1.0)
    if not moments.is_diagonal:
        covariance = _shrunk_covariance(moments.covariance, n)
    extra = (share * (1.0 - share) * length / d)[..., None]
    if n <= 1.0:
        extra = extra + (size / d)[..., None]
    else:
        covariance = covariance * (n / (n - 1.0))
    if not moments.is_diagonal:
        extra = extra[..., None] * np.eye(d)
    return Moments(n, share[..., None] * moments.mean, n * (covariance + extra))


def _shrunk_covariance(covariance: Float64, n: float) -> Float64:
    d = covariance.shape[-1]
    size = np.trace(covariance, axis1=-2, axis2=-1)
    squares = np.sum(covariance * covariance, axis=(-2, -1))
    over = (n + 1.0 - 2.0 / d) * (squares - size * size / d)
    with np.errstate(all="ignore"):
        share = ((1.0 - 2.0 / d) * squares + size * size) / over
    share = np.where(over > 0.0, np.minimum(share, 1.0), 1.0)[..., None, None]
    spherical = (size / d)[..., None, None] * np.eye(d)
    return cast(Float64, (1.0 - share) * covariance + share * spherical)


def expecting(geometry: Geometry, x: Moments, y: Moments) -> Geometry:
    """Return the geometry of a positive family with the φ that moments give it."""
    phi = np.zeros_like(geometry.phi)
    mean = np.zeros_like(geometry.phi)
    for basis, shift, moments in (
        (geometry.basis, geometry.shift_x, x),
        (geometry.inverse_transpose, geometry.shift_y, y),
    ):
        covariance = moments.covariance
        if moments.is_diagonal:
            phi = phi + np.sum(basis * basis * covariance[..., None, :], axis=-1)
        else:
            phi = phi + np.sum((basis @ covariance) * basis, axis=-1)
        mean = mean + (basis @ (moments.mean - shift)[..., None])[..., 0]
    return dataclasses.replace(geometry, phi=phi + mean * mean, mean=mean)


def _scale_bandwidth(x: Moments, y: Moments | None) -> float:
    """Return the bandwidth of scikit-learn's gamma = "scale", 1 / (d var)."""
    sides = [x] if y is None else [x, y]
    counts = np.array([float(side.count) for side in sides])
    shares = counts / counts.sum()
    # Variances within and between dimensions, heads and sides: no squares of means are
    # subtracted.
    means = np.stack([side.mean for side in sides])
    within = sum(
        share * np.mean(side.to_diagonal().covariance)
        for share, side in zip(shares, sides, strict=True)
    )
    by_side = np.mean(means.reshape(len(sides), -1), axis=1)
    center = float(shares @ by_side)
    between = shares @ np.mean((means.reshape(len(sides), -1) - center) ** 2, axis=1)
    variance = float(within + between)
    d = x.mean.shape[-1]
    # scikit-learn has gamma = 1 where nothing varies.
    return math.sqrt(d * variance / 2.0) if variance > 0 else math.sqrt(0.5)


def _median_distance(rows: Array, others: Array | None, seed: int) -> float:
    """Return the median distance of some rows of X from each other, or from keys."""
    generator = np.random.default_rng([seed, 1])
    left = _some_rows(rows, generator)
    right = left if others is None else _some_rows(others, generator)
    squares = np.stack(
        [
            np.sum((right - left[..., i : i + 1, :]) ** 2, axis=-1)
            for i in range(left.shape[-2])
        ],
        axis=-2,
    )
    if others is None:
        upper = np.triu_indices(left.shape[-2], 1)
        squares = squares[..., upper[0], upper[1]]
    apart = np.sqrt(squares[squares > 0])
    return float(np.median(apart)) if apart.size else 1.0


def _some_rows(rows: Array, generator: np.random.Generator) -> Float64:
    """Return a draw of rows, the same ones of all heads."""
    n = rows.shape[-2]
    if n > _MEDIAN_ROWS:
        chosen = np.sort(generator.choice(n, _MEDIAN_ROWS, replace=False))
        if _dispatch.library_of(rows).name == "dask":
            rows = rows[..., chosen, :]
        else:
            xp = _dispatch.namespace_of(rows)
            index = from_host(chosen.astype(np.int64), rows)
            rows = xp.take(rows, index, axis=rows.ndim - 2)
    return to_host(rows).astype(np.float64)


def merged(a: Fitted, b: Fitted) -> Fitted:
    """Return the state of the rows of both, with the projections of a."""
    for name, of_a, of_b in zip(Settings._fields, a.settings, b.settings, strict=True):
        if of_a != of_b:
            message = f"a and b must have the same {name}, got {of_a!r} and {of_b!r}"
            raise ValueError(message)
    if (a.n_features, a.heads) != (b.n_features, b.heads):
        message = (
            "a and b must have the same number of features and leading dimensions, got "
            f"{(*a.heads, a.n_features)} and {(*b.heads, b.n_features)}"
        )
        raise ValueError(message)
    if (a.y is None) != (b.y is None):
        message = "a and b must both be fitted with keys, or both without"
        raise ValueError(message)
    _dispatch.backend_for(a=a.like, b=b.like)
    y = None if a.y is None or b.y is None else a.y.merge(b.y)
    return derived(a.settings, a.x.merge(b.x), y, a.bandwidth, a.omega, a.seed, a.like)


# -------- storing

_GEOMETRY = ("basis", "inverse_transpose", "shift_x", "shift_y", "rho", "phi")


def packed(fitted: Fitted) -> tuple[dict[str, Any], Arrays]:
    """Return a state as numbers by name and arrays by name, without its settings.

    What was computed is stored too: another machine would compute the same to rounding
    only, and features must stay as they are.
    """
    geometry = fitted.geometry
    header = {
        "seed": fitted.seed,
        "bandwidth": fitted.bandwidth,
        "counts": [side.count for side in (fitted.x, fitted.y) if side is not None],
        "family": dataclasses.asdict(fitted.family),
        "predicted": list(fitted.predictions),
        "is_orthogonal": bool(geometry.is_orthogonal),
        "is_diagonal": bool(geometry.is_diagonal),
    }
    arrays: Arrays = {name: getattr(geometry, name) for name in _GEOMETRY}
    if geometry.mean is not None:
        arrays["mean"] = geometry.mean
    arrays["omega"] = fitted.omega
    arrays["predictions"] = np.stack(list(fitted.predictions.values()))
    for name, side in (("x", fitted.x), ("y", fitted.y)):
        if side is not None:
            arrays[f"{name}_mean"], arrays[f"{name}_scatter"] = side.mean, side.scatter
    return header, arrays


def unpacked(
    settings: Settings, header: dict[str, Any], arrays: Arrays, like: Array
) -> Fitted:
    """Return the state that was packed; KeyError where something is missing."""
    sides = [
        Moments(float(count), arrays[f"{name}_mean"], arrays[f"{name}_scatter"])
        for name, count in zip("xy", header["counts"], strict=False)
    ]
    geometry = Geometry(
        **{name: arrays[name] for name in _GEOMETRY},
        is_orthogonal=header["is_orthogonal"],
        is_diagonal=header["is_diagonal"],
        mean=arrays.get("mean"),
    )
    fitted = Fitted(
        settings,
        sides[0],
        sides[1] if len(sides) > 1 else None,
        header["bandwidth"],
        Family(**header["family"]),
        geometry,
        dict(zip(header["predicted"], arrays["predictions"], strict=True)),
        arrays["omega"],
        header["seed"],
        like,
    )
    fitted.prepare()
    return fitted
