"""What regressions on random features share: targets, blocks, files, scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from . import _dispatch
from ._estimators import Arrays, Estimator, as_rows, as_weights, plain
from ._host import HostArray, from_host, has_float64, to_host
from ._random_features import RandomFeatures
from ._random_features_evaluation import accepted_rows

Array: TypeAlias = Any


# Numbers that the features of a block of rows hold at most.
_MOST = 1 << 22


class Targets(NamedTuple):
    """What y holds.

    Attributes
    ----------
    values : array, shape (n, k)
        In the library of X; of classes a column each, 1 for rows of that class.
    is_vector : bool
        Whether y had one dimension.
    """

    values: Array
    is_vector: bool


class FeatureRegression(Estimator):
    """What both estimators share: features, rows in blocks, scores and files."""

    n_components: int
    features_: RandomFeatures
    _is_vector: bool

    def _features_for(
        self, rows: Array, weights: Array | None, *, anew: bool
    ) -> RandomFeatures:
        """Return features for rows: those there are, or newly fitted ones."""
        if self._is_fitted() and not anew:
            for name, value in self.features_.get_params().items():
                given = getattr(self, name)
                if given is not value and given != value:
                    message = (
                        f"{name} must stay as it was in the first call, {value!r}, got "
                        f"{given!r}; fit starts anew"
                    )
                    raise ValueError(message)
            self._require_accepted(rows)
            return self.features_
        names = RandomFeatures._defaults()
        features = RandomFeatures(**{name: getattr(self, name) for name in names})
        features._learn(None, rows, None, weights, stacklevel=6)
        return features

    def _require_accepted(self, rows: Array) -> None:
        accepted_rows(self.features_._learned(), rows, type(self).__name__)

    def _asked(self, X: Array) -> Array:
        """Return rows to predict."""
        self._require_fitted()
        rows = as_rows(X)
        self._require_accepted(rows)
        return rows

    def _blocks(self, rows: Array) -> Iterator[slice]:
        """Yield rows whose features are few numbers; of Dask's arrays all at once."""
        n = int(rows.shape[0])
        if _dispatch.library_of(rows).name == "dask":
            yield slice(0, n)
            return
        size = max(1, _MOST // int(self.n_components))
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    # -------- files

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        features, arrays = self.features_._packed()
        parameters = self.get_params()
        parameters["random_state"] = features["parameters"]["random_state"]
        header = {
            "parameters": plain(parameters),
            "features": features,
            "is_vector": self._is_vector,
        }
        return header, {f"features_{name}": array for name, array in arrays.items()}

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        loaded = cls(**header["parameters"])
        prefix = "features_"
        own = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        loaded.features_ = RandomFeatures._unpacked(header["features"], own, like)
        loaded.n_features_in_ = loaded.features_.n_features_in_
        loaded._is_vector = bool(header["is_vector"])
        return loaded


# -------- targets and weights


def is_of_library(values: Any) -> bool:
    """Return whether values are an array of a library other than NumPy."""
    if isinstance(values, np.ndarray) or hasattr(values, "columns"):
        return False
    root = type(values).__module__.partition(".")[0]
    return hasattr(values, "__array_namespace__") or root in ("torch", "dask", "cupy")


def on_host(*values: Any) -> tuple[HostArray, ...]:
    """Return arrays, or what makes arrays, in host memory, Dask's at one go."""
    if any(type(value).__module__.partition(".")[0] == "dask" for value in values):
        import dask

        values = dask.compute(*values)
    return tuple(
        to_host(value) if is_of_library(value) else np.asarray(value)
        for value in values
    )


def inconsistent_targets(n: int, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"y must have shape ({n},) or ({n}, k), one row for each of X, got shape "
        f"{tuple(shape)}"
    )


def require_targets(y: Any) -> None:
    if y is None:
        message = "requires y to be passed, but the target y is None"
        raise ValueError(message)


def real_targets(y: Any, rows: Array) -> Targets:
    """Return numbers (n, k) in the library of X."""
    require_targets(y)
    if not is_of_library(y):
        y = np.asarray(y)
        if y.dtype.kind == "O":
            y = y.astype(np.float64)
    shape, n = tuple(y.shape), int(rows.shape[0])
    if len(shape) not in (1, 2) or shape[0] != n:
        raise inconsistent_targets(n, shape)
    xp = _dispatch.namespace_of(y)
    if not xp.isdtype(y.dtype, ("real floating", "integral", "bool")):
        message = f"y must hold real numbers, got dtype {y.dtype}"
        raise ValueError(message)
    if not xp.isdtype(y.dtype, "real floating"):
        y = xp.astype(y, xp.float64 if has_float64(y) else xp.float32)
    is_vector = len(shape) == 1
    return Targets(companion(y[:, None] if is_vector else y, rows), is_vector)


def row_weights(sample_weight: Any, rows: Array) -> Array | None:
    """Return weights (n,) in the library of X."""
    if sample_weight is None:
        return None
    weights = as_weights(sample_weight, int(rows.shape[0]))
    if not np.any(weights > 0.0):
        message = "sample_weight must not be zero for all rows"
        raise ValueError(message)
    return companion(weights, rows)


def companion(values: Array, rows: Array) -> Array:
    """Return an array along the rows of X in the library of X, cut as X is."""
    library = _dispatch.library_of(rows)
    if library.name == "dask":
        from ._backends.dask.common import as_dask

        if _dispatch.library_of(values).name not in ("numpy", "dask"):
            _dispatch.backend_for(X=rows, y=values)
        whole = dict.fromkeys(range(1, values.ndim), -1)
        return as_dask(values).rechunk({0: rows.chunks[0], **whole})
    if isinstance(values, np.ndarray):
        return from_host(values, rows, rows.dtype)
    _dispatch.backend_for(X=rows, y=values)
    return values


def place_of(like: Array) -> dict[str, Any]:
    device = _dispatch.device_of(like)
    return {} if device is None else {"device": device}


# -------- sums


def wide_product(left: Array, right: Array) -> Array:
    """Return leftᵀ right in float64, on the host where the library has none."""
    if not has_float64(left):
        left, right = on_host(left, right)
    xp = _dispatch.namespace_of(left)
    turned = xp.matrix_transpose(xp.astype(left, xp.float64))
    return xp.matmul(turned, xp.astype(right, xp.float64))


def times_coefficients(phi: Array, coef: HostArray | None) -> Array:
    """Return features times coefficients, in the type of the features."""
    assert coef is not None
    xp = _dispatch.namespace_of(phi)
    own = from_host(coef, phi, phi.dtype)
    if _dispatch.library_of(phi).name == "dask":
        from ._backends.dask.common import as_dask

        own = as_dask(coef.astype(phi.dtype))
    return xp.matmul(phi, own)


def require_finite_sums(sums: HostArray, products: HostArray) -> None:
    if not np.all(np.isfinite(sums)):
        message = (
            "X must be finite, and its features within the range of their data type: "
            "their sums are not"
        )
        raise ValueError(message)
    if not np.all(np.isfinite(products)):
        message = "y must be finite, but it contains NaN or infinity"
        raise ValueError(message)


def determination(predicted: Array, y: Any, sample_weight: Any) -> float:
    """Return R², the mean over columns."""
    require_targets(y)
    found, given = on_host(predicted, y)
    if found.shape != given.shape and found.size == given.size:
        given = given.reshape(found.shape)
    if found.shape != given.shape:
        raise inconsistent_targets(found.shape[0], given.shape)
    n = len(found)
    found = found.reshape(n, -1).astype(np.float64)
    given = given.reshape(n, -1).astype(np.float64)
    weights = np.ones(n) if sample_weight is None else as_weights(sample_weight, n)
    center = np.average(given, axis=0, weights=weights)
    missed = weights @ (given - found) ** 2
    spread = weights @ (given - center) ** 2
    # As scikit-learn has it where y does not vary.
    constant = np.where(missed == 0.0, 1.0, 0.0)
    safe = np.where(spread > 0.0, spread, 1.0)
    return float(np.mean(np.where(spread > 0.0, 1.0 - missed / safe, constant)))
