"""The estimator `NadarayaWatson`, re-exported by `subquad.features`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._estimators import Arrays, as_rows, type_name
from ._feature_couplings import Coupling
from ._feature_families import Basis, Scales
from ._feature_regression import (
    FeatureRegression,
    Targets,
    companion,
    determination,
    inconsistent_targets,
    is_of_library,
    on_host,
    place_of,
    real_targets,
    require_finite_sums,
    require_targets,
    row_weights,
    times_coefficients,
    wide_product,
)
from ._host import HostArray, from_host, to_host
from ._random_features import FamilyName, Kernel, RandomFeatures
from .attention import AttentionState, linear_attention

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]


class NadarayaWatson(FeatureRegression):
    """Kernel means of targets, or of classes, in time linear in the number of rows.

    Predicts Σⱼ K(x, xⱼ) yⱼ / Σⱼ K(x, xⱼ) with the kernel `features_.kernel_matrix`.
    Integers, booleans and strings as y are classes, whose means are probabilities;
    floating numbers are regressed.

    Parameters
    ----------
    n_components : int, default=256
        Number of features.
    family : str, default="auto"
        Family of the features; "auto" chooses among the positive ones.
    kernel : {"gaussian", "softmax"}, default="gaussian"
        The kernel.
    bandwidth : float or {"median", "scale"}, default="scale"
        What rows are divided by; "scale" as scikit-learn's gamma="scale".
    scale : float, optional
        Multiplies |x - y|² or x·y.
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}, default="orthogonal"
        How the projections depend on each other.
    antithetic : bool, default=True
        Whether each projection serves twice, as it is and negated.
    objective : {"log", "mean"}, default="log"
        What the fit of the features minimises.
    regularization : float or "auto", default="auto"
        What is added to the diagonals of covariances that are inverted.
    basis : {"identity", "diagonal", "eigen", "balanced"}, optional
        Replaces the family's basis.
    centered : bool, optional
        Replaces the family's choice whether means are subtracted.
    scales : {"one", "scalar", "per_dimension"}, optional
        Replaces the family's choice of scales.
    random_state : int, numpy.random.Generator or None, default=None
        Seed of the features.

    Attributes
    ----------
    features_ : RandomFeatures
        The fitted features.
    classes_ : ndarray, shape (k,)
        The classes, where y held classes.
    n_features_in_ : int
        Number of features d of a row of X.

    See Also
    --------
    KernelRidge : Least squares on the same features.
    RandomFeatures : The features, and what the parameters from `family` on mean.
    linear_attention : The means, for keys without `fit`.

    Notes
    -----
    O(n n_components (d + k)) time, and memory for n_components k numbers and the
    features of a block of rows. Positive features are summed in logarithms, and nothing
    is added to denominators: predictions are means of the targets with positive weights
    however far a row lies from all others. The weights of trigonometric features have
    signs, and where few rows are near their sum can come close to 0.

    References
    ----------
    E. A. Nadaraya, "On estimating regression", Theory of Probability and its
    Applications, 1964.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 4.0])
    >>> y = np.repeat(["near", "far"], 100)
    >>> model = sq.features.NadarayaWatson(64, family="cderf", random_state=0)
    >>> model.fit(X, y).predict([[0.0, 0.0], [4.0, 4.0]])
    array(['near', 'far'], dtype='<U4')
    """

    classes_: npt.NDArray[Any]
    _state: AttentionState | None
    _sums: Float64 | None

    def __init__(
        self,
        n_components: int = 256,
        *,
        family: FamilyName = "auto",
        kernel: Kernel = "gaussian",
        bandwidth: float | Literal["median", "scale"] = "scale",
        scale: float | None = None,
        coupling: Coupling = "orthogonal",
        antithetic: bool = True,
        objective: Literal["log", "mean"] = "log",
        regularization: float | Literal["auto"] = "auto",
        basis: Basis | None = None,
        centered: bool | None = None,
        scales: Scales | None = None,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.n_components = n_components
        self.family = family
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.scale = scale
        self.coupling = coupling
        self.antithetic = antithetic
        self.objective = objective
        self.regularization = regularization
        self.basis = basis
        self.centered = centered
        self.scales = scales
        self.random_state = random_state

    def fit(
        self, X: Array, y: Array, sample_weight: Array | None = None
    ) -> NadarayaWatson:
        """Fit features to X, and sum the targets' products with them.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of any array library, as `RandomFeatures.fit` takes them.
        y : array, shape (n,) or (n, k)
            Targets: floating, of the library of X, NumPy arrays or lists; or one class
            for each row.
        sample_weight : array, shape (n,), optional
            Weights of the rows.

        Returns
        -------
        NadarayaWatson
            The estimator itself.

        Raises
        ------
        ValueError
            If X, y or the weights do not fit together or are not finite, or a parameter
            has no meaning.
        TypeError
            If X is sparse, or X and y are of different libraries.

        Warns
        -----
        InaccurateFeaturesWarning, UserWarning
            As `RandomFeatures.fit`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.NadarayaWatson(64, family="cderf", random_state=0)
        >>> model.fit(X, X[:, 0] > 0.0).classes_
        array([False,  True])
        """
        self._learn(X, y, None, sample_weight, anew=True)
        return self

    def partial_fit(
        self,
        X: Array,
        y: Array,
        classes: Array | None = None,
        sample_weight: Array | None = None,
    ) -> NadarayaWatson:
        """Add rows to those learned so far.

        The first call fits the features to its rows; they stay as they are.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of the same array library in every call.
        y : array, shape (n,) or (n, k)
            Targets.
        classes : array, shape (k,), optional
            All classes there will be, in the first call; by default those in its y.
        sample_weight : array, shape (n,), optional
            Weights of the rows.

        Returns
        -------
        NadarayaWatson
            The estimator itself.

        Raises
        ------
        ValueError, TypeError
            As `fit`, and if y holds a class that is not known, or the shape of y or
            parameters change.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.NadarayaWatson(64, family="cderf", random_state=0)
        >>> for part in (slice(0, 50, 2), slice(1, 50, 2)):
        ...     model = model.partial_fit(X[part], X[part, 0])
        >>> model.predict([[0.5]]).shape
        (1,)
        """
        self._learn(X, y, classes, sample_weight, anew=False)
        return self

    def _learn(
        self,
        X: Array,
        y: Array,
        classes: Array | None,
        sample_weight: Array | None,
        *,
        anew: bool,
    ) -> None:
        rows = as_rows(X)
        is_first = anew or not self._is_fitted()
        known = None if is_first else getattr(self, "classes_", None)
        if is_first and classes is not None:
            known = np.unique(on_host(classes)[0])
        labels = _labels(y, rows)
        if labels is None:
            if known is not None:
                message = "y must hold classes, as in the first call, got numbers"
                raise ValueError(message)
            targets = real_targets(y, rows)
        else:
            if not is_first and known is None:
                message = "y must be of floating type, as in the first call"
                raise ValueError(message)
            found = np.unique(labels)
            known = found if known is None else known
            unknown = np.setdiff1d(found, known)
            if len(unknown):
                message = f"y must hold classes of {known}, got {unknown[0]!r}"
                raise ValueError(message)
            columns = labels[:, None] == known[None, :]
            targets = Targets(companion(columns.astype(np.float64), rows), True)
        weights = row_weights(sample_weight, rows)
        features = self._features_for(rows, weights, anew=anew)
        width = 0 if is_first else self._width()
        if not is_first and (width, self._is_vector) != (
            targets.values.shape[1],
            targets.is_vector,
        ):
            message = "y must have the shape of the first call's but for its length"
            raise ValueError(message)
        self._add(features, rows, targets.values, weights, is_first)
        self._is_vector = targets.is_vector
        self.features_ = features
        self.n_features_in_ = features.n_features_in_
        if known is not None:
            self.classes_ = known
        elif hasattr(self, "classes_"):
            del self.classes_

    def _width(self) -> int:
        sums = self._sums if self._state is None else self._state.value_sums
        assert sums is not None
        return int(sums.shape[-1]) - (1 if self._state is None else 0)

    def _add(
        self,
        features: RandomFeatures,
        rows: Array,
        values: Array,
        weights: Array | None,
        is_first: bool,
    ) -> None:
        """Add up the products of features and targets."""
        if features.family == "trigonometric":
            sums = _signed_sums(features, self._blocks(rows), rows, values, weights)
            known = None if is_first else self._sums
            self._state, self._sums = None, sums if known is None else known + sums
            return
        state = None if is_first else self._state
        shape = (int(self.n_components), int(values.shape[1]))
        for block in self._blocks(rows):
            log_k = features.log_key_features(rows[block, :])
            xp = _dispatch.namespace_of(rows)
            if weights is not None:
                with np.errstate(divide="ignore"):
                    log_k = log_k + xp.log(weights[block])[:, None]
            value = xp.astype(values[block, :], log_k.dtype)
            part = AttentionState.init((), *shape, like=log_k).update(log_k, value)
            if _dispatch.library_of(rows).name == "dask":
                part = AttentionState(*on_host(part.key_sums, part.value_sums))
            state = part if state is None else state.merge(part)
        assert state is not None
        require_finite_sums(*on_host(state.denominator, state.numerator))
        self._state, self._sums = state, None

    def _means(self, rows: Array) -> Array:
        """Return the means of the targets' columns, (n, k)."""
        if self._state is None:
            sums = times_coefficients(self.features_.key_features(rows), self._sums)
            return sums[:, :-1] / sums[:, -1:]
        log_q = self.features_.log_query_features(rows)
        state = self._state
        if _dispatch.library_of(rows).name == "dask":
            from ._backends.dask.common import as_dask

            state = AttentionState(as_dask(state.key_sums), as_dask(state.value_sums))
        xp = _dispatch.namespace_of(log_q)
        nothing = xp.zeros((0, self._width()), dtype=log_q.dtype, **place_of(log_q))
        return linear_attention(log_q, log_q[:0, :], nothing, state=state)

    def predict(self, X: Array) -> Array:
        """Return the predictions for rows.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of the library that was fitted.

        Returns
        -------
        array, shape (n,) or (n, k)
            Means of targets; or the most probable classes, of which strings come as
            NumPy arrays.

        Raises
        ------
        ValueError
            If X has the wrong shape or is not finite.
        TypeError
            If X is sparse, or of another library or device than the fitted arrays.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Notes
        -----
        O(n n_components (d + k)) time.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.NadarayaWatson(
        ...     64, family="cderf", bandwidth=0.1, random_state=0
        ... )
        >>> model.fit(X, X[:, 0] ** 3).predict([[0.5]]).round(1)
        array([0.1])
        """
        rows = self._asked(X)
        means = self._means(rows)
        classes = getattr(self, "classes_", None)
        if classes is None:
            return means[:, 0] if self._is_vector else means
        xp = _dispatch.namespace_of(means)
        best = xp.argmax(means, axis=1)
        if classes.dtype.kind not in "biuf":
            return classes[to_host(best)]
        if _dispatch.library_of(best).name == "dask":
            return best.map_blocks(lambda index: classes[index], dtype=classes.dtype)
        return xp.take(from_host(classes, best), best, axis=0)

    def predict_proba(self, X: Array) -> Array:
        """Return the kernel means of the classes.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of the library that was fitted.

        Returns
        -------
        array, shape (n, k)
            In the order of `classes_`. At least 0 but for trigonometric features; rows
            add up to 1.

        Raises
        ------
        AttributeError
            If y held no classes.
        ValueError, TypeError
            As `predict`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.NadarayaWatson(64, family="cderf", random_state=0)
        >>> p = model.fit(X, X[:, 0] > 0.0).predict_proba([[0.5]])
        >>> bool(p[0, 1] > 0.7)
        True
        """
        rows = self._asked(X)
        if not hasattr(self, "classes_"):
            message = "predict_proba needs classes, and y held floating numbers"
            raise AttributeError(message)
        return self._means(rows)

    def score(self, X: Array, y: Array, sample_weight: Array | None = None) -> float:
        """Return the accuracy of predicted classes, or R² of predicted numbers.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows.
        y : array, shape (n,) or (n, k)
            Targets.
        sample_weight : array, shape (n,), optional
            Weights of the rows.

        Returns
        -------
        float

        Raises
        ------
        ValueError, TypeError
            As `predict`, and if y does not fit X.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.NadarayaWatson(64, family="cderf", random_state=0)
        >>> model.fit(X, X[:, 0] > 0.0).score(X, X[:, 0] > 0.0) > 0.9
        True
        """
        predicted = self.predict(X)
        if not hasattr(self, "classes_"):
            return determination(predicted, y, sample_weight)
        found, given = on_host(predicted, y)
        if found.shape != given.shape:
            given = given.reshape(-1)
        if found.shape != given.shape:
            raise inconsistent_targets(found.shape[0], given.shape)
        weights = None if sample_weight is None else on_host(sample_weight)[0]
        return float(np.average(found == given, weights=weights))

    # -------- scikit-learn and files

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import TargetTags

        tags = super().__sklearn_tags__()
        tags.target_tags = TargetTags(required=True, multi_output=True)
        return tags

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        header, arrays = super()._packed()
        if self._state is None:
            assert self._sums is not None
            arrays["sums"] = self._sums
        else:
            sums = self._state.key_sums, self._state.value_sums
            arrays["key_sums"], arrays["value_sums"] = on_host(*sums)
        classes = getattr(self, "classes_", None)
        if classes is not None:
            header["has_objects"] = classes.dtype.kind == "O"
            arrays["classes"] = (
                classes.astype(str) if header["has_objects"] else classes
            )
        return header, arrays

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        loaded = super()._unpacked(header, arrays, like)
        loaded._state, loaded._sums = None, arrays.get("sums")
        if loaded._sums is None:
            names = ("key_sums", "value_sums")
            loaded._state = AttentionState(
                *(from_host(arrays[name], like) for name in names)
            )
        if "classes" in arrays:
            kind = object if header["has_objects"] else arrays["classes"].dtype
            loaded.classes_ = arrays["classes"].astype(kind)
        return loaded


def _labels(y: Any, rows: Array) -> HostArray | None:
    """Return the classes that y holds, None for numbers."""
    require_targets(y)
    if is_of_library(y) and type_name(y).startswith(("float", "bfloat")):
        return None
    (host,) = on_host(y)
    if host.dtype.kind == "f":
        return None
    if host.ndim == 2 and host.shape[1] == 1:
        host = host[:, 0]
    if host.shape != (rows.shape[0],):
        n = int(rows.shape[0])
        message = (
            f"y must have shape ({n},), one class for each row of X, got shape "
            f"{host.shape}"
        )
        raise ValueError(message)
    if host.dtype.kind == "O" and not all(isinstance(item, str) for item in host):
        message = (
            "Unknown label type: y must hold integers, booleans or strings, which are "
            "classes, or floating numbers"
        )
        raise ValueError(message)
    return host


def _signed_sums(
    features: RandomFeatures,
    blocks: Iterator[slice],
    rows: Array,
    values: Array,
    weights: Array | None,
) -> Float64:
    """Return Σⱼ wⱼ φ(xⱼ) [yⱼ, 1], (n_components, k + 1)."""
    sums: Array = 0.0
    for block in blocks:
        phi = features.key_features(rows[block, :])
        xp = _dispatch.namespace_of(phi)
        part = xp.astype(values[block, :], phi.dtype)
        part = xp.concat([part, xp.ones_like(part[:, :1])], axis=1)
        if weights is not None:
            part = part * xp.astype(weights[block], phi.dtype)[:, None]
        (added,) = on_host(wide_product(phi, part))
        sums = sums + added
    require_finite_sums(sums, sums)
    return np.asarray(sums, np.float64)
