"""The estimator `RandomFeatures`, re-exported by `subquad.features`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _random_features_diagnostics as diagnostics
from . import _random_features_evaluation as evaluation
from ._estimators import Arrays, Estimator, plain
from ._feature_couplings import Coupling
from ._feature_families import Basis, Scales
from ._feature_maps import FeatureMap
from ._host import HostArray
from ._random_features_state import Fitted, Settings, learn, merged, packed, unpacked

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
FamilyName: TypeAlias = Literal[
    "auto",
    "trigonometric",
    "positive",
    "oprf",
    "saderf",
    "sderf",
    "aderf",
    "saderf+",
    "bderf",
    "csderf",
    "csaderf+",
    "cderf",
]
Kernel: TypeAlias = Literal["softmax", "gaussian"]


class InaccurateFeaturesWarning(UserWarning):
    """So few random features cannot tell the kernel of these rows.

    The relative second moment of one projection's estimate, exp(Σ κ(ρ) + ρ φ) for
    typical rows, exceeds the number of projections.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> import subquad as sq
    >>> rows = 3.0 * np.random.default_rng(0).normal(size=(100, 64))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     features = sq.RandomFeatures(256, random_state=0).fit(rows)
    >>> caught[0].category.__name__
    'InaccurateFeaturesWarning'
    """


class RandomFeatures(Estimator):
    """Random features of the softmax and the Gaussian kernel, in logarithms.

    With features φ of queries and ψ of keys, Σₘ φₘ(x) ψₘ(y) is an unbiased estimate of
    exp(s x·y / b²) or of exp(-s |x - y|² / (2 b²)), s the scale and b the bandwidth:
    of exp(x·y) or exp(-|x - y|² / 2) for rows times √s / b. All positive families are
    one construction: x·y = G(x - c)·G⁻ᵀ(y - e) + e·x + c·y - c·e for any basis G and
    shifts c and e, and exponentials of projections on normal ω, whose l-th component is
    sampled with the variance (1 + 1/ρ_l) / 2. `fit` finds the G, c, e and ρ of least
    variance in closed form; families differ in what they leave free.

    Parameters
    ----------
    n_components : int, default=256
        Number of features, both halves of pairs counted. Even with pairs.
    family : str, default="auto"
        "positive" (FAVOR+ [1]_), "oprf" (FAVOR++ [2]_), "saderf", "sderf" and "aderf"
        (FAVOR# [3]_); "saderf+", "bderf", "csderf", "csaderf+" and "cderf", which have
        scales of their own for all dimensions or are centred as well; "trigonometric"
        (random Fourier features [4]_), whose features have signs. "auto" takes the
        positive family whose predicted variance is smallest, the cheapest of equals.
    kernel : {"softmax", "gaussian"}, default="softmax"
        exp(x·y) or exp(-|x - y|² / 2), of rows times √scale / bandwidth.
    bandwidth : float or {"median", "scale"}, default=1.0
        What rows are divided by. "median": the median of the distances, where not 0,
        between 256 rows that are drawn from X (and 256 of `keys`) in the first call.
        "scale": that of scikit-learn's gamma="scale", sqrt(d var / 2) with var the
        variance of all numbers in X (and `keys`), as far as they have come.
    scale : float, optional
        Multiplies x·y, or |x - y|²: 1/√d in attention.
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}, default="orthogonal"
        How the projections depend on each other; each for itself is normal. Blocks of d
        orthogonal ones, the vertices of a simplex, or orthogonal ones of three
        randomised Hadamard transforms.
    antithetic : bool, default=True
        Whether each projection serves twice, as it is and negated. Trigonometric
        features are always pairs.
    objective : {"log", "mean"}, default="log"
        What `fit` minimises and "auto" compares: the mean over pairs of rows of the
        logarithm of the relative second moment, as the papers do, or the logarithm of
        its mean, for normal rows.
    regularization : float or "auto", default="auto"
        What is added to the covariances' diagonals, relative to their mean, where they
        are inverted. "auto": 0.2 d/n, between 1e-4 and 0.3.
    basis : {"identity", "diagonal", "eigen", "balanced"}, optional
        Replaces the family's basis G: none, a scale per dimension, the eigenvectors of
        the covariances' sum, or what makes both covariances the same diagonal matrix.
    centered : bool, optional
        Replaces the family's choice whether the means are subtracted.
    scales : {"one", "scalar", "per_dimension"}, optional
        Replaces the family's choice of ρ: 1, one number, or one for each dimension.
    random_state : int, numpy.random.Generator or None, default=None
        Seed of the projections and of draws of rows. One integer gives the same
        features on every array library and thread count.

    Attributes
    ----------
    family_ : str
        The family that was chosen; "custom" where `basis`, `centered` and `scales` make
        it another than all above, or what these are where there are several of the
        kind to choose from, as in "diagonal-one-centered".
    basis_ : array of float64, shape (..., d, d)
        G, for rows times √scale / bandwidth.
    shift_x_, shift_y_ : array of float64, shape (..., d)
        c and e, for such rows.
    rho_ : array of float64, shape (..., d)
        ρ, in (0, 1].
    projection_ : array of float64, shape (rows, d)
        ω, which all heads share; with pairs there are n_components / 2.
    query_map_, key_map_ : named tuple
        Arrays projection, bias, quadratic, shift and linear: with them
        `subquad.log_features` (`subquad.trigonometric_features`) returns what
        `log_query_features` and `log_key_features` (`query_features` and
        `key_features`) do.
    predicted_log_variance_ : float or ndarray of shape (heads, ...), or dict of these
        The logarithm of the predicted relative variance of an estimate of the kernel
        for the objective; for "auto" by the names of all families compared.
    bandwidth_ : float
        The number that the bandwidth is.
    n_samples_seen_, n_keys_seen_ : int
        Rows of X and of `keys` so far; the same without `keys`.
    n_features_in_ : int
        Number of features d of a row.

    See Also
    --------
    random_feature_attention : Attention with fitted features.
    log_features : The functional form.
    subquad.linear_attention : What attention with log-features is.

    Notes
    -----
    Learned arrays are of the library of X and on its device. Rows must be of that
    library too; Dask rows leave NumPy arrays behind, and work with these.

    X may have leading dimensions, for instance (heads, n, d): each head is then fitted
    by itself, and rows (..., heads, n, d) have features (..., heads, n, n_components).

    `fit` costs O(n d²), or O(n d) for families of the bases "identity" and "diagonal",
    and O(d³); features of n rows O(n n_components d) whatever the family.

    Every value of G, c, e and ρ gives an unbiased estimate. What rows were fitted
    decides the variance alone, so features may be fitted to a sample and used on
    others.

    References
    ----------
    .. [1] K. Choromanski et al., "Rethinking attention with Performers", ICLR, 2021,
       arXiv:2009.14794.
    .. [2] V. Likhosherstov et al., "Chefs' random tables: Non-trigonometric random
       features", NeurIPS, 2022, arXiv:2205.15317.
    .. [3] V. Likhosherstov et al., "FAVOR#: Sharp attention kernel approximations via
       new classes of positive random features", NeurIPS, 2023, arXiv:2302.00787.
    .. [4] A. Rahimi and B. Recht, "Random features for large-scale kernel machines",
       NIPS, 2007.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> queries, keys = rng.normal(size=(2, 1000, 8)) / 3
    >>> features = sq.RandomFeatures(1024, random_state=0).fit(queries, keys=keys)
    >>> estimate = features.kernel_matrix(queries[:50], keys[:50])
    >>> exact = np.exp(queries[:50] @ keys[:50].T)
    >>> bool(np.linalg.norm(estimate - exact) < 0.1 * np.linalg.norm(exact))
    True
    """

    _fitted: Fitted

    def __init__(
        self,
        n_components: int = 256,
        *,
        family: FamilyName = "auto",
        kernel: Kernel = "softmax",
        bandwidth: float | Literal["median", "scale"] = 1.0,
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

    # -------- fitting

    def fit(
        self, X: Array, y: Any = None, *, keys: Array | None = None
    ) -> RandomFeatures:
        """Choose the features that suit queries and keys.

        Parameters
        ----------
        X : array, shape (..., n, d)
            Queries, of any array library. Integers become float64, half precision
            float32. Lists and data frames become NumPy arrays. Dask arrays are read
            chunk by chunk.
        y : ignored
            There for the conventions of scikit-learn.
        keys : array, shape (..., m, d), optional
            Keys, of the library of X. By default the queries are the keys too, and both
            have the same features.

        Returns
        -------
        RandomFeatures
            The estimator itself.

        Raises
        ------
        ValueError
            If an array is not of finite rows of one size, there are no rows, the batch
            dimensions differ, or a parameter has no meaning.
        TypeError
            If an array is sparse, or the libraries or devices differ.

        Warns
        -----
        InaccurateFeaturesWarning
            If the rows' kernel is out of reach: the mean logarithm of one projection's
            relative second moment exceeds that of their number.
        UserWarning
            If "auto" chose features of the Gaussian kernel, and the trigonometric
            family is predicted to have half their variance or less.

        Notes
        -----
        O((n + m) d² + d³) time, and O(n_components d) more for the maps.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(64, random_state=0).fit(rows)
        >>> features.log_key_features(rows).shape
        (500, 64)
        """
        self._learn(None, X, keys)
        return self

    def partial_fit(
        self, X: Array, y: Any = None, *, keys: Array | None = None
    ) -> RandomFeatures:
        """Choose the features that suit the rows learned so far and more.

        Means and second moments accumulate: batches leave what one `fit` leaves, to
        rounding. The projections, and the bandwidth "median", stay those of the first
        call.

        Parameters
        ----------
        X : array, shape (..., n, d)
            Queries, of the same array library and with the same leading dimensions in
            every call.
        y : ignored
            There for the conventions of scikit-learn.
        keys : array, shape (..., m, d), optional
            Keys: in all calls or in none.

        Returns
        -------
        RandomFeatures
            The estimator itself.

        Raises
        ------
        ValueError
            As `fit`, and if parameters were changed, or `keys` come in some calls only.
        TypeError
            As `fit`.

        Warns
        -----
        InaccurateFeaturesWarning, UserWarning
            As `fit`, once it comes to that.

        Notes
        -----
        Log-features from before a call do not go with those from after it: features
        must stay as they are while an attention state made of them lives.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(64, random_state=0)
        >>> for batch in (rows[:100], rows[100:]):
        ...     features = features.partial_fit(batch)
        >>> features.n_samples_seen_
        500
        """
        known = self._fitted if self._is_fitted() else None
        self._learn(known, X, keys)
        return self

    def fit_transform(self, X: Array, y: Any = None) -> Array:
        """Fit to X and return its features.

        Parameters
        ----------
        X : array, shape (..., n, d)
            As in `fit`.
        y : ignored
            There for the conventions of scikit-learn.

        Returns
        -------
        array, shape (..., n, n_components)

        Raises
        ------
        ValueError, TypeError
            As `fit`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> sq.RandomFeatures(64, kernel="gaussian", family="cderf").fit_transform(
        ...     rows
        ... ).shape
        (500, 64)
        """
        return self.fit(X).transform(X)

    @staticmethod
    def merge(a: RandomFeatures, b: RandomFeatures) -> RandomFeatures:
        """Return the estimator of the rows of both.

        Parameters
        ----------
        a, b : RandomFeatures
            Fitted with the same parameters (`random_state` may differ), both with keys
            or both without.

        Returns
        -------
        RandomFeatures
            A new estimator, with the parameters and projections of a, and its bandwidth
            where that is "median". The rest is as of one `fit`, to rounding.

        Raises
        ------
        ValueError
            If the parameters, the number of features or the leading dimensions differ,
            or one alone was given keys.
        TypeError
            If an argument is no RandomFeatures, or the two hold arrays of different
            libraries or devices.

        Notes
        -----
        O(d³) time, whatever the number of rows.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> first = sq.RandomFeatures(64, random_state=0).fit(rows[:100])
        >>> second = sq.RandomFeatures(64, random_state=0).fit(rows[100:])
        >>> merged = sq.RandomFeatures.merge(first, second)
        >>> whole = sq.RandomFeatures(64, random_state=0).fit(rows)
        >>> np.allclose(merged.rho_, whole.rho_)
        True
        """
        require_features("a", a)
        require_features("b", b)
        state = merged(a._learned(), b._learned())
        both = type(a)(**a.get_params())
        both._adopt(state)
        return both

    def _learn(
        self,
        known: Fitted | None,
        X: Array,
        keys: Array | None,
        weights: Array | None = None,
        stacklevel: int = 4,
    ) -> None:
        fitted = learn(known, self._settings(), X, keys, weights, self.random_state)
        self._adopt(fitted)
        _warn(fitted, known, stacklevel)

    def _settings(self) -> Settings:
        return Settings(*(getattr(self, name) for name in Settings._fields))

    def _adopt(self, fitted: Fitted) -> None:
        self._fitted = fitted
        self.n_features_in_ = fitted.n_features

    def _learned(self) -> Fitted:
        self._require_fitted()
        return self._fitted

    # -------- what was learned

    @property
    def family_(self) -> str:
        return self._learned().family.name

    @property
    def bandwidth_(self) -> float:
        return self._learned().bandwidth

    @property
    def n_samples_seen_(self) -> int:
        return int(self._learned().x.count)

    @property
    def n_keys_seen_(self) -> int:
        fitted = self._learned()
        return int((fitted.x if fitted.y is None else fitted.y).count)

    @property
    def basis_(self) -> Array:
        return self._array("basis_", lambda fitted: fitted.geometry.basis)

    @property
    def shift_x_(self) -> Array:
        return self._array("shift_x_", lambda fitted: fitted.geometry.shift_x)

    @property
    def shift_y_(self) -> Array:
        return self._array("shift_y_", lambda fitted: fitted.geometry.shift_y)

    @property
    def rho_(self) -> Array:
        return self._array("rho_", lambda fitted: fitted.geometry.rho)

    @property
    def projection_(self) -> Array:
        return self._array("projection_", lambda fitted: fitted.omega)

    @property
    def query_map_(self) -> FeatureMap:
        return self._learned().map("query", "float64")

    @property
    def key_map_(self) -> FeatureMap:
        return self._learned().map("key", "float64")

    @property
    def predicted_log_variance_(self) -> Any:
        fitted = self._learned()
        values = {
            name: float(value) if np.ndim(value) == 0 else np.array(value)
            for name, value in fitted.predictions.items()
        }
        return values if self.family == "auto" else values[fitted.family.name]

    def _array(self, name: str, make: Callable[[Fitted], HostArray]) -> Array:
        fitted = self._learned()
        return fitted.learned(name, lambda: make(fitted))

    # -------- features

    def log_query_features(self, x: Array) -> Array:
        """Return the logarithms of the features of queries.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries, of the library that was fitted. Leading dimensions broadcast with
            those of `fit`.

        Returns
        -------
        array, shape (..., n, n_components)
            In float64 for float64, else in float32; differentiable in torch and JAX.

        Raises
        ------
        ValueError
            If x has the wrong shape, or the features are trigonometric: these have
            signs.
        TypeError
            If x is not floating, or of another library or device than the fitted
            arrays.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        See Also
        --------
        log_features : The functional form, on the arrays of `query_map_`.

        Notes
        -----
        O(n n_components d) time.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(64, random_state=0).fit(rows)
        >>> projection, bias, quadratic, shift, linear = features.query_map_
        >>> np.array_equal(
        ...     features.log_query_features(rows),
        ...     sq.log_features(
        ...         rows,
        ...         projection,
        ...         bias,
        ...         quadratic,
        ...         shift=shift,
        ...         linear=linear,
        ...         antithetic=True,
        ...     ),
        ... )
        True
        """
        return evaluation.log_features(self._learned(), "query", x, "x")

    def log_key_features(self, y: Array) -> Array:
        """Return the logarithms of the features of keys.

        Parameters
        ----------
        y : array of floating type, shape (..., m, d)
            Keys, as the queries of `log_query_features`.

        Returns
        -------
        array, shape (..., m, n_components)
            In float64 for float64, else in float32.

        Raises
        ------
        ValueError, TypeError
            As `log_query_features`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(64, random_state=0).fit(rows)
        >>> logs = features.log_key_features(rows)
        >>> np.allclose(np.exp(logs), features.key_features(rows))
        True
        """
        return evaluation.log_features(self._learned(), "key", y, "y")

    def query_features(self, x: Array) -> Array:
        """Return the features of queries.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries, as those of `log_query_features`.

        Returns
        -------
        array, shape (..., n, n_components)
            Of trigonometric features the cosines, then the sines. inf and 0 where
            exponentials leave the range of the data type: logarithms have none.

        Raises
        ------
        ValueError, TypeError
            As `log_query_features`, but for trigonometric features, which are welcome.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(64, family="trigonometric", random_state=0)
        >>> features.fit(rows).query_features(rows).shape
        (500, 64)
        """
        return evaluation.features_of(self._learned(), "query", x, "x")

    def key_features(self, y: Array) -> Array:
        """Return the features of keys.

        Parameters
        ----------
        y : array of floating type, shape (..., m, d)
            Keys, as the queries of `log_query_features`.

        Returns
        -------
        array, shape (..., m, n_components)

        Raises
        ------
        ValueError, TypeError
            As `query_features`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(4096, random_state=0).fit(rows)
        >>> estimate = features.query_features(rows) @ features.key_features(rows).T
        >>> bool(np.abs(estimate / np.exp(rows @ rows.T) - 1.0).mean() < 0.02)
        True
        """
        return evaluation.features_of(self._learned(), "key", y, "y")

    def transform(self, X: Array) -> Array:
        """Return the features of rows, for linear models and scikit-learn's pipelines.

        Parameters
        ----------
        X : array, shape (..., n, d)
            Rows, of the library that was fitted; lists, data frames and integers as in
            `fit`.

        Returns
        -------
        array, shape (..., n, n_components)

        Raises
        ------
        ValueError
            If X has the wrong shape or (in libraries that compute at once) is not
            finite, or queries and keys have features of their own: `fit` was given
            keys, and `query_features` and `key_features` tell the two apart.
        TypeError
            If X is sparse, or of another library or device than the fitted arrays.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6))
        >>> features = sq.RandomFeatures(
        ...     64, family="cderf", kernel="gaussian", bandwidth="median"
        ... )
        >>> features.fit(rows).transform(rows).shape
        (500, 64)
        """
        return evaluation.transformed(self._learned(), X)

    def get_feature_names_out(
        self, input_features: Any = None
    ) -> npt.NDArray[np.object_]:
        """Return a name for each feature.

        Parameters
        ----------
        input_features : ignored
            There for the conventions of scikit-learn.

        Returns
        -------
        ndarray of str objects, shape (n_components,)

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> features = sq.RandomFeatures(2, random_state=0).fit(np.zeros((3, 1)))
        >>> features.get_feature_names_out()
        array(['randomfeatures0', 'randomfeatures1'], dtype=object)
        """
        count = self._learned().settings.n_components
        names = [f"{type(self).__name__.lower()}{i}" for i in range(count)]
        return np.array(names, dtype=object)

    # -------- kernels and their errors

    def kernel_matrix(self, x: Array, y: Array) -> Array:
        """Return the estimates of the kernel, the sums of products of features.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries, of the library that was fitted.
        y : array of floating type, shape (..., m, d)
            Keys.

        Returns
        -------
        array, shape (..., n, m)
            In float64 if any input is, else in float32.

        Raises
        ------
        ValueError, TypeError
            As `query_features`, for both arrays.

        Notes
        -----
        O(n m n_components) time. Positive features are summed relative to each row's
        largest, in logarithms where these are too far apart: nothing is lost to the
        range of the data type but what the result itself is too large or small for.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(1024, random_state=0).fit(rows)
        >>> error = features.kernel_matrix(rows, rows) - np.exp(rows @ rows.T)
        >>> bool(np.sqrt(np.mean(error**2)) < 0.02)
        True
        """
        return evaluation.kernel_matrix(self._learned(), x, y)

    def log_relative_variance(self, x: Array, y: Array) -> Array:
        """Return the logarithms of Var / K² of the estimates of `kernel_matrix`.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries, of the library that was fitted.
        y : array of floating type, shape (..., m, d)
            Keys.

        Returns
        -------
        array, shape (..., n, m)
            For n_components features, over the draw of the projections. -inf where the
            estimate is exact.

        Raises
        ------
        ValueError, TypeError
            As `query_features`, for both arrays.

        Notes
        -----
        A closed form, computed in float64 in host memory. Exact for independent
        projections; for orthogonal ones exact where ρ is the same in all dimensions,
        else an approximation, which simplex and Hadamard projections share.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(1024, random_state=0).fit(rows)
        >>> predicted = np.exp(features.log_relative_variance(rows, rows))
        >>> error = features.kernel_matrix(rows, rows) / np.exp(rows @ rows.T) - 1.0
        >>> bool(0.3 < np.mean(error**2) / np.mean(predicted) < 3.0)
        True
        """
        return diagnostics.log_relative_variances(self._learned(), x, y)

    def required_components(self, relative_error: float) -> int:
        """Return how many features it would take for a relative error of the kernel.

        Parameters
        ----------
        relative_error : float
            Of typical pairs of the fitted rows: the square root of their relative
            variance, averaged as `objective` says.

        Returns
        -------
        int
            Even with pairs; of several heads that which needs most. It can be a number
            of many digits.

        Raises
        ------
        ValueError
            If `relative_error` is no number above 0, or no number of features has a
            finite variance.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rows = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> features = sq.RandomFeatures(64, random_state=0).fit(rows)
        >>> features.required_components(0.01) > features.required_components(0.1)
        True
        """
        return diagnostics.required_components(self._learned(), relative_error)

    def attention_error(
        self, q: Array, k: Array, v: Array, *, causal: bool = False
    ) -> Array:
        """Return the predicted error of each row of attention with these features.

        Parameters
        ----------
        q : array of floating type, shape (..., n, d)
            Queries, of the library that was fitted.
        k : array of floating type, shape (..., m, d)
            Keys.
        v : array of floating type, shape (..., m, d_v)
            Values.
        causal : bool, default=False
            Whether row i attends keys up to i only; then n = m.

        Returns
        -------
        array, shape (..., n)
            Root mean square of |error of the row|, over the draw of the projections.

        Raises
        ------
        ValueError, TypeError
            As `log_query_features`, for all arrays.

        Notes
        -----
        The delta method on the covariances of the estimates of a row, at most the
        distance of its attention from the farthest value; what coupled projections
        change is approximate. O(n m²) time and O(m² + n m) memory, in float64 in host
        memory: for some rows, not for all of a long sequence.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> rng = np.random.default_rng(0)
        >>> q, k, v = rng.normal(size=(3, 100, 8)) / 2
        >>> features = sq.RandomFeatures(256, random_state=0).fit(q, keys=k)
        >>> w = np.exp(q @ k.T)
        >>> exact = w @ v / w.sum(axis=1, keepdims=True)
        >>> error = sq.random_feature_attention(q, k, v, features) - exact
        >>> predicted = features.attention_error(q, k, v)
        >>> bool(0.5 < np.sqrt(np.sum(error**2) / np.sum(predicted**2)) < 2.0)
        True
        """
        return diagnostics.attention_errors(self._learned(), q, k, v, bool(causal))

    # -------- scikit-learn and files

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import TransformerTags

        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=["float64", "float32"])
        return tags

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        fitted = self._fitted
        parameters = {**self.get_params(), **fitted.settings._asdict()}
        if isinstance(parameters["random_state"], np.random.Generator):
            parameters["random_state"] = fitted.seed
        header, arrays = packed(fitted)
        return {"parameters": plain(parameters), **header}, arrays

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        loaded = cls(**header["parameters"])
        loaded._adopt(unpacked(loaded._settings(), header, arrays, like))
        return loaded


def require_features(name: str, value: Any) -> None:
    if not isinstance(value, RandomFeatures):
        kind = type(value).__qualname__
        message = f"{name} must be a RandomFeatures, got {kind}"
        raise TypeError(message)


def _warn(fitted: Fitted, known: Fitted | None, stacklevel: int) -> None:
    """Warn of what the predictions say, unless they said so before."""
    for category, message_of in (
        (InaccurateFeaturesWarning, diagnostics.inaccuracy),
        (UserWarning, diagnostics.trigonometric_advantage),
    ):
        message = message_of(fitted)
        if message is not None and (known is None or message_of(known) is None):
            warnings.warn(message, category, stacklevel=stacklevel)
