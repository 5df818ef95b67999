"""The estimator `GaussianNormalizer`, re-exported by `subquad.normalizers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from . import _dispatch, _validation
from ._estimators import Arrays, Estimator, require_integer
from ._gaussian_evaluation import Method, checked_queries, evaluate
from ._gaussian_state import (
    CovarianceType,
    Fitted,
    Settings,
    learn,
    merged,
    packed,
    unpacked,
)
from ._gaussian_statistics import quiet_log
from ._host import HostArray

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
SelfTerm: TypeAlias = Literal["include", "exclude"]


class GaussianNormalizer(Estimator):
    """Softmax normalizers log Σⱼ exp(x·yⱼ) in time independent of the number of keys.

    The keys are split into components. Within one, the scores x·yⱼ have mean x·μ and
    variance xᵀΩx exactly; treated as a normal law, their exponentials add up to n
    exp(x·μ + xᵀΩx / 2). What is lost are the third and higher cumulants.

    Parameters
    ----------
    n_components : int, default=1
        Number of components k. Unless `fit` is given labels, they are found by k-means.
    covariance_type : {"full", "diag", "low_rank"}, default="full"
        What is kept of the covariance Ω of each component. "low_rank" keeps the `rank`
        largest eigenpairs, and the diagonal of what is left of Ω.
    rank : int, optional
        Number of eigenpairs for "low_rank", at most the number of features. By default
        16, or all if there are fewer.
    control_samples : int or "auto", default=0
        Number of keys to draw at `fit`, evenly and without replacement (three of each
        component at least), whose exact scores correct the estimate: each component's
        sum gets the sampled mean of exp(t) - q(t), where t is the centred score and q a
        polynomial whose sum is known from the moments. The corrected sum is unbiased,
        and exact once all keys are drawn. "auto" draws 512, and uses the correction for
        the rows where its standard error is below the estimated error of the Gaussian
        value less the standard error of that estimate.
    max_iter : int, default=25
        Most iterations of a k-means run.
    random_state : int, numpy.random.Generator or None, default=None
        Seed of k-means and of the draws. One integer gives the same result on every
        array library and thread count.

    Attributes
    ----------
    counts_ : array of float64, shape (k,)
        Number of keys of each component, or the sum of their weights.
    log_counts_ : array of float64, shape (k,)
        The logarithms of the counts, -inf for an empty component.
    means_ : array of float64, shape (k, d)
    covariances_ : array of float64, shape (k, d, d), or (k, d) for "diag"
        Moments about the means divided by the counts (not by counts less one). Not
        there for "low_rank".
    factors_ : array of float64, shape (k, d, r)
        Triangular F with Ω = F Fᵀ for "full", and the scaled eigenvectors for
        "low_rank". For "full", `subquad.gaussian_log_normalizer` of the log counts, the
        means and these returns what the estimator does without control samples.
    diagonal_ : array of float64, shape (k, d)
        For "low_rank": what Ω has on its diagonal beyond the factors, at least 0.
    radii_ : array of float64, shape (k,)
        Bounds on the distance of a component's keys from their mean, attained when all
        came in one `fit`.
    labels_ : array of int64, shape (n,)
        Component of every key, in the order they came.
    centers_ : array of float64, shape (k, d)
        Centroids that keys were assigned to, where no labels were given and k > 1.
    n_features_in_ : int
        Number of features d.

    Notes
    -----
    The arrays are of the library of the keys and on their device. Queries must be of
    that library too; Dask keys leave NumPy arrays behind, and Dask queries work with
    NumPy arrays. Queries of float16 and bfloat16 are computed in float32.

    `fit` costs O(n d²) and a query O(k d²), or O(k d) with diagonal covariances,
    O(k d r) with rank r, and O(d s) more with s control samples. Memory: O(k d²), a few
    bytes a key for its label, and O(n) for n queries.

    The relative error of the sum is about a sixth of the scores' third cumulant within
    a component: small where |x||y| is about 1, or where components are tight; see
    `error_estimate` and `error_bound`.

    References
    ----------
    L. Dall'Amico and E. M. Belliardo, "Learning distributed representations with
    efficient SoftMax normalization", arXiv:2303.17475.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> keys = rng.normal(size=(1000, 8)) / 4
    >>> queries = rng.normal(size=(5, 8)) / 4
    >>> estimator = sq.GaussianNormalizer(n_components=4, random_state=0).fit(keys)
    >>> error = estimator.log_normalizer(queries) - sq.log_normalizer(queries, keys)
    >>> bool(np.all(np.abs(error) < 1e-3))
    True
    >>> bool(np.all(np.abs(error) <= estimator.error_bound(queries)))
    True
    """

    _fitted: Fitted

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: CovarianceType = "full",
        rank: int | None = None,
        control_samples: int | Literal["auto"] = 0,
        max_iter: int = 25,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.rank = rank
        self.control_samples = control_samples
        self.max_iter = max_iter
        self.random_state = random_state

    # -------- fitting

    def fit(
        self,
        X: Array,
        y: Any = None,
        *,
        labels: Array | None = None,
        sample_weight: Array | None = None,
    ) -> GaussianNormalizer:
        """Learn the statistics of the keys.

        Parameters
        ----------
        X : array, shape (n, d)
            Keys, of any array library. Integers become float64, half precision float32.
            Lists and data frames become NumPy arrays. Dask arrays are read once, chunk
            by chunk.
        y : ignored
            There for the conventions of scikit-learn.
        labels : array of int, shape (n,), optional
            Component of each key, in [0, n_components). By default k-means finds them.
        sample_weight : array, shape (n,), optional
            Weights wⱼ >= 0 of Σⱼ wⱼ exp(x·yⱼ). A key of weight 0 is not there, but for
            its label and its place in the order.

        Returns
        -------
        GaussianNormalizer
            The estimator itself.

        Raises
        ------
        ValueError
            If X is not a matrix of finite numbers, there are fewer keys than components
            to find, `labels` or `sample_weight` do not fit X or have values out of
            range, or a parameter has no meaning.
        TypeError
            If X is sparse.

        Notes
        -----
        O(n d²) time; k-means trains on at most 256 n_components of the keys.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.array([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
        >>> estimator = sq.GaussianNormalizer(2).fit(keys, labels=[0, 0, 1])
        >>> estimator.counts_, estimator.means_
        (array([2., 1.]), array([[0., 2.],
               [2., 0.]]))
        """
        self._learn(None, X, labels, sample_weight)
        return self

    def partial_fit(
        self,
        X: Array,
        y: Any = None,
        *,
        labels: Array | None = None,
        sample_weight: Array | None = None,
    ) -> GaussianNormalizer:
        """Add keys to those learned so far.

        The first call without labels fixes the components by k-means on its keys; later
        keys join the nearest. Keys that come in several batches leave the statistics of
        `fit` with the same labels, to rounding, and the same control samples; only the
        radii grow to cover the motion of the means.

        Parameters
        ----------
        X : array, shape (n, d)
            Keys, of the same array library in every call.
        y : ignored
            There for the conventions of scikit-learn.
        labels : array of int, shape (n,), optional
            Component of each key: in all calls or in none, unless there is one
            component.
        sample_weight : array, shape (n,), optional
            Weights of the keys.

        Returns
        -------
        GaussianNormalizer
            The estimator itself.

        Raises
        ------
        ValueError
            As `fit`, and if labels come in some calls only, or the number of features
            changes.
        TypeError
            If X is sparse, or of another library or device than before.

        Notes
        -----
        O(n d² + k d²) time.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> estimator = sq.GaussianNormalizer()
        >>> for batch in (keys[:30], keys[30:]):
        ...     estimator = estimator.partial_fit(batch)
        >>> np.allclose(estimator.means_, keys.mean(axis=0))
        True
        """
        known = self._fitted if self._is_fitted() else None
        self._learn(known, X, labels, sample_weight)
        return self

    @staticmethod
    def merge(a: GaussianNormalizer, b: GaussianNormalizer) -> GaussianNormalizer:
        """Return the estimator of the keys of both, those of b following those of a.

        Parameters
        ----------
        a, b : GaussianNormalizer
            Fitted with the same parameters (`max_iter` and `random_state` may differ)
            on the same components: with labels, with one component, or as copies of one
            estimator.

        Returns
        -------
        GaussianNormalizer
            A new estimator, with the parameters of a. Its statistics are those of one
            `fit` to rounding; its control samples are drawn as evenly, though not the
            same.

        Raises
        ------
        ValueError
            If the parameters, the number of features or the components differ.
        TypeError
            If an argument is no GaussianNormalizer, or the two hold arrays of different
            libraries or devices.

        Notes
        -----
        O(k d²) time, and O(n) to join the labels.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> first = sq.GaussianNormalizer().fit(keys[:30])
        >>> second = sq.GaussianNormalizer().fit(keys[30:])
        >>> merged = sq.GaussianNormalizer.merge(first, second)
        >>> np.allclose(merged.covariances_[0], np.cov(keys.T, ddof=0))
        True
        """
        _require_estimator("a", a)
        _require_estimator("b", b)
        state = merged(a._learned(), b._learned())
        both = type(a)(**a.get_params())
        both._adopt(state)
        return both

    def _learn(
        self,
        known: Fitted | None,
        X: Array,
        labels: Array | None,
        sample_weight: Array | None,
    ) -> None:
        settings = self._settings()
        settings.check()
        require_integer("max_iter", self.max_iter, 1)
        fitted = learn(
            known,
            settings,
            X,
            labels,
            sample_weight,
            max_iter=self.max_iter,
            random_state=self.random_state,
        )
        self._adopt(fitted)

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
    def counts_(self) -> Array:
        return self._array("counts_", lambda fitted: fitted.statistics.weights)

    @property
    def log_counts_(self) -> Array:
        return self._array(
            "log_counts_", lambda fitted: quiet_log(fitted.statistics.weights)
        )

    @property
    def means_(self) -> Array:
        return self._array("means_", lambda fitted: fitted.statistics.means)

    @property
    def covariances_(self) -> Array:
        if self._learned().settings.covariance_type == "low_rank":
            message = (
                "low-rank covariances are kept as factors_ and diagonal_, not as "
                "covariances_"
            )
            raise AttributeError(message)
        return self._array(
            "covariances_", lambda fitted: fitted.statistics.covariances()
        )

    @property
    def factors_(self) -> Array:
        if self._learned().settings.covariance_type == "diag":
            message = "diagonal covariances are kept as covariances_, not as factors_"
            raise AttributeError(message)
        return self._array("factors_", lambda fitted: fitted.factors()[0])

    @property
    def diagonal_(self) -> Array:
        if self._learned().settings.covariance_type != "low_rank":
            message = "only low-rank covariances have a diagonal_"
            raise AttributeError(message)
        return self._array(
            "diagonal_", lambda fitted: cast(Float64, fitted.factors()[1])
        )

    @property
    def radii_(self) -> Array:
        return self._array("radii_", lambda fitted: fitted.statistics.radii)

    @property
    def labels_(self) -> Array:
        return self._array(
            "labels_", lambda fitted: fitted.statistics.all_labels().astype(np.int64)
        )

    @property
    def centers_(self) -> Array:
        partition = self._learned().partition
        if partition is None:
            message = (
                "there are no centers_: the components were given by labels, or are one"
            )
            raise AttributeError(message)
        return self._array("centers_", lambda _: partition)

    def _array(self, name: str, make: Callable[[Fitted], HostArray]) -> Array:
        fitted = self._learned()
        return fitted.learned(name, lambda: make(fitted))

    # -------- evaluation

    def log_normalizer(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return estimates of log Σⱼ wⱼ exp(xᵢ·yⱼ) over the fitted keys.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries, of the library of the fitted arrays.
        self_index : array of int, shape (n,), optional
            Which fitted key row i is itself, in the order the keys came (-1: none). Its
            term is then computed exactly, and the others from the statistics without
            it. Batches share it.
        self_term : {"include", "exclude"}, default="include"
            Whether the sum of row i holds its own key; "exclude" needs `self_index`.

        Returns
        -------
        array, shape (..., n)
            In the data type of x; float32 for float16 and bfloat16.

        Raises
        ------
        ValueError
            If x has the wrong shape, or `self_index` the wrong shape or values out of
            range, or `self_term` no meaning.
        TypeError
            If x is not floating, or of another library or device than the fitted
            arrays.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Notes
        -----
        O(n k d²) time and O(n) memory without control samples.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 6)) / 3
        >>> estimator = sq.GaussianNormalizer().fit(keys)
        >>> log_z = estimator.log_normalizer(keys, self_index=np.arange(500))
        >>> bool(np.max(np.abs(log_z - sq.log_normalizer(keys, keys))) < 0.02)
        True
        """
        return self._evaluate("log_normalizer", x, self_index, self_term)

    def standard_error(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return the standard error of log Z that the draw of control samples causes.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        self_index : array of int, shape (n,), optional
            As in `log_normalizer`.
        self_term : {"include", "exclude"}, default="include"
            As in `log_normalizer`.

        Returns
        -------
        array, shape (..., n)
            0 where every key was drawn. With "auto" it is that of the corrected value,
            whether or not that was used.

        Raises
        ------
        ValueError
            Without control samples, and as `log_normalizer`.
        TypeError
            As `log_normalizer`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 6)) / 3
        >>> estimator = sq.GaussianNormalizer(control_samples=100, random_state=0)
        >>> estimator = estimator.fit(keys)
        >>> estimator.standard_error(keys[:4]).shape
        (4,)
        """
        if self._learned().settings.control_samples == 0:
            message = "standard_error needs control_samples > 0, got 0"
            raise ValueError(message)
        return self._evaluate("standard_error", x, self_index, self_term)

    def error_estimate(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return a prediction of |error of log Z|, which may be exceeded.

        Without control samples it is a sixth of the third cumulant of the scores, the
        first that the Gaussian value leaves out, measured on 256 keys drawn at `fit`.
        With control samples it is the standard error, to which components whose
        correction had to be given up (their corrected sum was not positive) add the
        third cumulant. With "auto" it is the smaller of the two, as is the choice of
        the value.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        self_index : array of int, shape (n,), optional
            As in `log_normalizer`.
        self_term : {"include", "exclude"}, default="include"
            As in `log_normalizer`.

        Returns
        -------
        array, shape (..., n)

        Raises
        ------
        ValueError, TypeError
            As `log_normalizer`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).exponential(size=(500, 6)) / 4
        >>> estimator = sq.GaussianNormalizer(random_state=0).fit(keys)
        >>> error = estimator.log_normalizer(keys) - sq.log_normalizer(keys, keys)
        >>> estimate = estimator.error_estimate(keys)
        >>> bool(0.5 < np.mean(estimate) / np.mean(np.abs(error)) < 2)
        True
        """
        return self._evaluate("error_estimate", x, self_index, self_term)

    def error_bound(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return a bound on |error of log Z| that always holds, rounding included.

        A component's centred scores lie in an interval of width w = 2 r |x|, r its
        radius. With v their variance as kept, the logarithm of its sum is wrong by at
        most b = max(w²/8 - v/2, v/2), and for full covariances by at most w³/(36√3);
        log Z is wrong by at most log Σ Ẑ exp(b) - log Σ Ẑ over the components. It grows
        fast with |x| r, and is of use where that is about 1 or less.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        self_index : array of int, shape (n,), optional
            As in `log_normalizer`.
        self_term : {"include", "exclude"}, default="include"
            As in `log_normalizer`.

        Returns
        -------
        array, shape (..., n)
            For the value of `log_normalizer` with the same arguments.

        Raises
        ------
        ValueError, TypeError
            As `log_normalizer`.

        Notes
        -----
        Computed in float64 whatever the type of x. The rounding of the computation in
        that type is bounded by the standard analysis of inner products (Higham,
        "Accuracy and Stability of Numerical Algorithms", chapter 3), so the bound
        exceeds 0 where the value is exact.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 3)) / 4
        >>> estimator = sq.GaussianNormalizer().fit(keys)
        >>> error = estimator.log_normalizer(keys) - sq.log_normalizer(keys, keys)
        >>> bool(np.all(np.abs(error) <= estimator.error_bound(keys)))
        True
        """
        return self._evaluate("error_bound", x, self_index, self_term)

    def log_probabilities(self, x: Array, y: Array) -> Array:
        """Return xᵢ·yⱼ - log Zᵢ, log probabilities of the softmax over the fitted keys.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        y : array of floating type, shape (..., m, d)
            Keys of interest, fitted ones or not, of the library of x.

        Returns
        -------
        array, shape (..., n, m)

        Raises
        ------
        ValueError, TypeError
            As `log_normalizer`, for both arrays.

        Notes
        -----
        O(n k d² + n m d) time.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> estimator = sq.GaussianNormalizer().fit(keys)
        >>> p = np.exp(estimator.log_probabilities(keys[:3], keys))
        >>> bool(np.allclose(p.sum(axis=1), 1.0, atol=0.01))
        True
        """
        log_z = self.log_normalizer(x)
        _dispatch.backend_for(x=x, y=y)
        x, y = _validation.common_floats(("x", "y"), (x, y))
        y = checked_queries(self._fitted, y, "y")
        xp = _dispatch.namespace_of(x)
        return xp.matmul(x, xp.matrix_transpose(y)) - log_z[..., None]

    def _evaluate(
        self, method: Method, x: Array, self_index: Array | None, self_term: SelfTerm
    ) -> Array:
        return evaluate(
            self._learned(), x, self_index, method=method, self_term=self_term
        )

    # -------- files

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        fitted = self._fitted
        parameters = {**self.get_params(), **fitted.settings._asdict()}
        if isinstance(parameters["random_state"], np.random.Generator):
            parameters["random_state"] = fitted.seed
        parameters = {
            name: value if value is None or isinstance(value, str) else int(value)
            for name, value in parameters.items()
        }
        numbers, arrays = packed(fitted)
        return {"parameters": parameters, **numbers}, arrays

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        loaded = cls(**header["parameters"])
        loaded._adopt(unpacked(loaded._settings(), header, arrays, like))
        return loaded


def _require_estimator(name: str, value: Any) -> None:
    if not isinstance(value, GaussianNormalizer):
        kind = type(value).__qualname__
        message = f"{name} must be a GaussianNormalizer, got {kind}"
        raise TypeError(message)
