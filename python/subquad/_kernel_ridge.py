"""The estimator `KernelRidge`, re-exported by `subquad.features`."""

from __future__ import annotations

from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._estimators import Arrays, as_rows, is_number
from ._feature_couplings import Coupling
from ._feature_families import Basis, Scales
from ._feature_regression import (
    FeatureRegression,
    determination,
    on_host,
    real_targets,
    require_finite_sums,
    row_weights,
    times_coefficients,
    wide_product,
)
from ._host import from_host
from ._random_features import FamilyName, Kernel, RandomFeatures

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]


class KernelRidge(FeatureRegression):
    """Ridge regression on random features, in time linear in the number of rows.

    What kernel ridge regression with the kernel `features_.kernel_matrix` predicts,
    found in the space of the features: Φ(x)·β with (ΦᵀWΦ + alpha I) β = ΦᵀW y.

    Parameters
    ----------
    n_components : int, default=256
        Number of features.
    alpha : float, default=1.0
        Strength of the penalty alpha |β|², at least 0.
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
    coef_ : array of float64, shape (n_components,) or (n_components, k)
        β, in the library of X.
    n_features_in_ : int
        Number of features d of a row of X.

    See Also
    --------
    NadarayaWatson : Kernel means in place of least squares.
    RandomFeatures : The features, for other linear models, and what the parameters from
        `family` on mean.

    Notes
    -----
    O(n n_components (d + n_components) + n_components³) time, and memory for
    n_components² numbers and the features of a block of rows: ΦᵀWΦ is accumulated in
    float64, and solved by Cholesky's factorisation, or where that is singular to
    rounding by the eigenvectors, for the shortest β. There is no intercept.

    References
    ----------
    A. Rahimi and B. Recht, "Random features for large-scale kernel machines", NIPS,
    2007.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(-2.0, 2.0, size=(500, 2))
    >>> y = np.sin(X[:, 0]) * X[:, 1]
    >>> model = sq.features.KernelRidge(
    ...     128, alpha=1e-3, family="trigonometric", random_state=0
    ... )
    >>> model.fit(X, y).score(X, y) > 0.999
    True
    """

    _gram: Float64
    _products: Float64
    _coef: Float64

    def __init__(
        self,
        n_components: int = 256,
        *,
        alpha: float = 1.0,
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
        self.alpha = alpha
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
    ) -> KernelRidge:
        """Fit features to X, and a linear function of them to y.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of any array library, as `RandomFeatures.fit` takes them.
        y : array, shape (n,) or (n, k)
            Targets, of the library of X, NumPy arrays or lists.
        sample_weight : array, shape (n,), optional
            Weights of the rows' squared errors.

        Returns
        -------
        KernelRidge
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
        >>> model = sq.features.KernelRidge(64, family="trigonometric", random_state=0)
        >>> model.fit(X, np.column_stack([X, X**2])).coef_.shape
        (64, 2)
        """
        self._learn(X, y, sample_weight, anew=True)
        return self

    def partial_fit(
        self, X: Array, y: Array, sample_weight: Array | None = None
    ) -> KernelRidge:
        """Add rows to those learned so far.

        The first call fits the features to its rows; they stay as they are.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of the same array library in every call.
        y : array, shape (n,) or (n, k)
            Targets.
        sample_weight : array, shape (n,), optional
            Weights of the rows' squared errors.

        Returns
        -------
        KernelRidge
            The estimator itself.

        Raises
        ------
        ValueError, TypeError
            As `fit`, and if the shape of y or parameters change.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.KernelRidge(64, family="trigonometric", random_state=0)
        >>> for part in (slice(0, 50, 2), slice(1, 50, 2)):
        ...     model = model.partial_fit(X[part], X[part, 0])
        >>> model.predict([[0.5]]).shape
        (1,)
        """
        self._learn(X, y, sample_weight, anew=False)
        return self

    def _learn(
        self, X: Array, y: Array, sample_weight: Array | None, *, anew: bool
    ) -> None:
        if not is_number(self.alpha) or self.alpha < 0:
            message = f"alpha must be a finite number >= 0, got {self.alpha!r}"
            raise ValueError(message)
        rows = as_rows(X)
        targets = real_targets(y, rows)
        weights = row_weights(sample_weight, rows)
        features = self._features_for(rows, weights, anew=anew)
        gram, products = self._sums(features, rows, targets.values, weights)
        if self._is_fitted() and not anew:
            if (targets.is_vector, products.shape) != (
                self._is_vector,
                self._products.shape,
            ):
                message = "y must have the shape of the first call's but for its length"
                raise ValueError(message)
            gram, products = self._gram + gram, self._products + products
        self._coef = _solved(gram, products, float(self.alpha))
        self._gram, self._products = gram, products
        self._is_vector = targets.is_vector
        self.features_ = features
        self.n_features_in_ = features.n_features_in_

    def _sums(
        self, features: RandomFeatures, rows: Array, values: Array, weights: Array
    ) -> tuple[Float64, Float64]:
        """Return ΦᵀWΦ and ΦᵀW y."""
        gram: Array = 0.0
        products: Array = 0.0
        for block in self._blocks(rows):
            phi = features.key_features(rows[block, :])
            weighed = phi
            if weights is not None:
                xp = _dispatch.namespace_of(phi)
                weighed = phi * xp.astype(weights[block], phi.dtype)[:, None]
            added = on_host(
                wide_product(weighed, phi),
                wide_product(weighed, values[block, :]),
            )
            gram, products = gram + added[0], products + added[1]
        require_finite_sums(gram, products)
        return gram, products

    @property
    def coef_(self) -> Array:
        self._require_fitted()
        coef = self._coef[:, 0] if self._is_vector else self._coef
        return from_host(coef.copy(), self.features_._learned().like)

    def predict(self, X: Array) -> Array:
        """Return the predictions for rows.

        Parameters
        ----------
        X : array, shape (n, d)
            Rows, of the library that was fitted.

        Returns
        -------
        array, shape (n,) or (n, k)

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
        >>> model = sq.features.KernelRidge(
        ...     64, alpha=1e-6, family="trigonometric", random_state=0
        ... )
        >>> model.fit(X, X[:, 0] ** 3).predict([[0.5]]).round(1)
        array([0.1])
        """
        rows = self._asked(X)
        predicted = times_coefficients(self.features_.key_features(rows), self._coef)
        return predicted[:, 0] if self._is_vector else predicted

    def score(self, X: Array, y: Array, sample_weight: Array | None = None) -> float:
        """Return the coefficient of determination R² of the predictions.

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
            The mean over the columns of y.

        Raises
        ------
        ValueError, TypeError
            As `predict`, and if y does not fit X.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> X = np.linspace(-1.0, 1.0, 50)[:, None]
        >>> model = sq.features.KernelRidge(
        ...     64, alpha=1e-6, family="trigonometric", random_state=0
        ... )
        >>> model.fit(X, X[:, 0] ** 3).score(X, X[:, 0] ** 3) > 0.99
        True
        """
        return determination(self.predict(X), y, sample_weight)

    # -------- scikit-learn and files

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import RegressorTags, TargetTags

        tags = super().__sklearn_tags__()
        tags.estimator_type = "regressor"
        tags.regressor_tags = RegressorTags()
        tags.target_tags = TargetTags(required=True, multi_output=True)
        return tags

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        header, arrays = super()._packed()
        sums = {"gram": self._gram, "products": self._products, "coef": self._coef}
        return header, {**arrays, **sums}

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        loaded = super()._unpacked(header, arrays, like)
        loaded._gram, loaded._products = arrays["gram"], arrays["products"]
        loaded._coef = arrays["coef"]
        return loaded


def _solved(gram: Float64, products: Float64, alpha: float) -> Float64:
    """Return the β of least length with (gram + alpha I) β = products."""
    width = len(gram)
    matrix = gram + alpha * np.eye(width)
    limit = width * float(np.finfo(np.float64).eps)
    try:
        root = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        root = None
    if root is not None:
        pivots = np.diagonal(root)
        if float(np.min(pivots)) ** 2 > limit * float(np.max(np.diagonal(matrix))):
            half = np.linalg.solve(root, products)
            return np.linalg.solve(root.T, half)
    values, vectors = np.linalg.eigh(matrix)
    kept = values > limit * max(float(values[-1]), 0.0)
    inverse = np.where(kept, 1.0 / np.where(kept, values, 1.0), 0.0)
    return np.asarray(vectors @ (inverse[:, None] * (vectors.T @ products)))
