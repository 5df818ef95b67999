"""The estimator `EDRep`, re-exported by `subquad.embedding`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._edrep_epochs import (
    Affinities,
    Epochs,
    Gradient,
    Schedule,
    State,
    as_affinities,
    as_null,
    clusters_of,
    initial_rows,
    one_cluster,
    placed_rows,
    random_rows,
    run,
)
from ._estimators import Arrays, Estimator, as_rows, like_of, plain, seed_of
from ._host import from_host, has_float64, to_host
from ._operator_chain import OperatorChain
from ._validation.common import as_dtype, dtype_name
from ._validation.embedding import (
    check_clusters,
    check_embedding_parameters,
    check_initial_shape,
    check_null_weights,
    check_operator_shape,
)

Array: TypeAlias = Any
Operator: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
# Null weights by their sum, None where they are equal, and the sum.
HostNull: TypeAlias = tuple[Float64 | None, float]


class EDRep(Estimator):
    """Embedding of anything with an affinity, in time linear in its links.

    Rows xᵢ and keys yⱼ of unit norm for which the softmax of xᵢ·yⱼ over all keys comes
    close to the affinities Pᵢⱼ, say how often walks from node i of a graph end in node
    j, or how often word j stands near word i. The loss, by row, is

    (1/n) [-Σᵢⱼ Pᵢⱼ xᵢ·yⱼ + Σᵢ log Zᵢ + Σᵢⱼ xᵢ·yⱼ fⱼ],

    log Zᵢ = log Σₐ (nₐ/m) exp(xᵢ·μₐ + xᵢᵀΩₐxᵢ/2): cross-entropy less log m, and a term
    against alignment with the mean key. The keys of each cluster a are told by their
    number nₐ, mean μₐ and covariance Ωₐ, so that Zᵢ takes no sum over keys; P may be a
    product of sparse matrices, which is never formed.

    Parameters
    ----------
    n_components : int, default=128
        Dimension d of the embedding.
    n_clusters : int, default=1
        Number of clusters of keys that log Z is made of. More than one come in with the
        second half of the epochs, by spherical k-means on the keys, and are found anew
        several times until the end. One is enough for graphs as a rule.
    max_iter : int, default=30
        Number of epochs T.
    learning_rate : float, default=0.8
        In (0, 1]: epoch t turns each row by the angle arcsin(learning_rate (1 - t/T)).
        At 1 the first epoch puts each row into the direction of its descent, wherever
        it was.
    symmetric : bool, default=True
        Whether rows are keys: for affinities among things of one kind. Otherwise rows
        and keys are embedded each by themselves, from an operator of any shape, and the
        loss gains |Σᵢ xᵢ|²/(2n²) + |Σⱼ pⱼyⱼ|²/(2nΣⱼpⱼ), with p the null weights, which
        centre both.
    gradient : {"source", "symmetric", "full"}, default="source"
        What rows move along. "source": the gradient through xᵢ with the statistics of
        the keys fixed; without `symmetric`, keys move along that through yⱼ.
        "symmetric", for `symmetric` alone, is the sum of both. "full" adds what a key
        does to the statistics of its cluster: the gradient of the loss.
    null_weights : array, shape (m,), optional
        Weights p >= 0 of the keys, f = p/Σp; by default equal ones. For words, counts
        to the power 3/4.
    tol : float, optional
        Stop where the best loss of the last five epochs is not lower by `tol` than the
        best before them, both counted from when all clusters are in.
    init : "random", array of shape (n, d) or pair of arrays, default="random"
        Rows to start from, or rows and keys where not `symmetric`; scaled to unit norm.
        "random" draws them evenly from the sphere.
    random_state : int, numpy.random.Generator or None, default=None
        Seed of the start and of k-means. One integer gives the same start on every
        array library.
    progress : bool, default=False
        Whether a bar on standard error tells the epochs done and the loss. Needs rich.

    Attributes
    ----------
    embedding_ : array, shape (n, d)
        The rows.
    key_embedding_ : array, shape (m, d)
        The keys; the same array with `symmetric`.
    labels_ : array of int64, shape (m,)
        Cluster of each key, zeros for one cluster.
    loss_ : ndarray of float64, shape (n_epochs + 1,)
        The loss before the first epoch, and after each.
    n_iter_ : int
        Number of epochs done.
    n_features_in_ : int
        Number of keys m.

    See Also
    --------
    random_walk : Operator of walks on a graph.
    cooccurrence : Operator of words near each other.
    temporal_walk : Operator of walks through events.
    subquad.OperatorChain : Product of sparse matrices, or mean of partial products.
    subquad.GaussianNormalizer : The log Z of given keys, and how far it is off.

    Notes
    -----
    An epoch takes O((nnz + n d) d) time, nnz the entries of all matrices of the
    operator, and O(k n d²) with k clusters; gradients other than "source" multiply by
    the transpose too. Beside the rows, the operator and its copy in the type of the
    rows, two arrays (n, d) live at once in the symmetric case with "source".

    Computed in float32 where the operator is float32, else in float64, with sums over
    rows in float64. Arrays are of the library and on the device of `init`, or of the
    operator where there are no initial arrays. The result does not depend on the
    number of threads.

    With P the mean of powers of D⁻¹A, "source" tells communities near the limit of
    what can be detected better than gradients that reach a lower loss.

    This is the algorithm of [1]_ but for these: the variance of the scores is
    xᵢᵀΩₐxᵢ, with covariances divided by nₐ, in place of Σ_d x²_id (Ωₐ1)_d; clusters are
    found within one run and kept up to date, where a second run would start from random
    rows; a row whose tangent gradient is 0 stays where it is.

    References
    ----------
    .. [1] L. Dall'Amico, E. M. Belliardo, "Efficient distributed representations with
       linear-time attention scores normalization", 2023, arXiv:2303.17475.

    Examples
    --------
    The two sides into which a karate club split, from walks of at most three steps:

    >>> import networkx
    >>> import numpy as np
    >>> import scipy.sparse
    >>> import subquad as sq
    >>> adjacency = networkx.to_scipy_sparse_array(networkx.karate_club_graph())
    >>> step = scipy.sparse.diags_array(1 / adjacency.sum(axis=1)) @ adjacency
    >>> walk = sq.OperatorChain([step] * 3, mean_of_partial_products=True)
    >>> model = sq.embedding.EDRep(8, learning_rate=1.0, random_state=0)
    >>> rows = model.fit_transform(walk)
    >>> rows.shape
    (34, 8)
    >>> bool(rows[0] @ rows[1] > 0 > rows[0] @ rows[33])
    True
    """

    embedding_: Array
    key_embedding_: Array
    labels_: Array
    loss_: Float64
    n_iter_: int
    _seed: int
    # Null weights by their sum, as they were fitted; None where they are equal.
    _null_shares: Float64 | None

    def __init__(
        self,
        n_components: int = 128,
        *,
        n_clusters: int = 1,
        max_iter: int = 30,
        learning_rate: float = 0.8,
        symmetric: bool = True,
        gradient: Gradient = "source",
        null_weights: Array | None = None,
        tol: float | None = None,
        init: Literal["random"] | Array | tuple[Array, Array] = "random",
        random_state: int | np.random.Generator | None = None,
        progress: bool = False,
    ) -> None:
        self.n_components = n_components
        self.n_clusters = n_clusters
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.symmetric = symmetric
        self.gradient = gradient
        self.null_weights = null_weights
        self.tol = tol
        self.init = init
        self.random_state = random_state
        self.progress = progress

    # -------- fitting

    def fit(self, operator: Operator, y: Any = None) -> EDRep:
        """Embed the rows of an operator.

        Parameters
        ----------
        operator : OperatorChain, sparse matrix, dense matrix or other, shape (n, m)
            Affinities P, as a rule with rows that sum to 1; rows of zeros are allowed.
            Sparse matrices of `scipy.sparse` or `cupyx.scipy.sparse`, dense ones of any
            array library but Dask, or anything with `shape`, `@` and `.T`. Square with
            `symmetric`.
        y : ignored
            There for the conventions of scikit-learn.

        Returns
        -------
        EDRep
            The estimator itself.

        Raises
        ------
        ValueError
            If the operator is empty, not finite or of the wrong shape, initial rows or
            null weights do not fit it, there are more clusters than keys, or a
            parameter has no meaning.
        TypeError
            If the operator is none, as a list or a graph, or of another library or
            device than the initial rows.
        ModuleNotFoundError
            If `progress` is true, and rich is missing.

        Examples
        --------
        >>> import networkx
        >>> import subquad as sq
        >>> adjacency = networkx.to_numpy_array(networkx.karate_club_graph())
        >>> step = adjacency / adjacency.sum(axis=1, keepdims=True)
        >>> model = sq.embedding.EDRep(4, max_iter=10, random_state=0).fit(step)
        >>> model.loss_.shape
        (11,)
        >>> bool(model.loss_[-1] < model.loss_[0])
        True
        """
        affinities, null = self._accepted(operator)
        seed = seed_of(self.random_state)
        generator = np.random.default_rng(seed)
        with _bar(bool(self.progress), int(self.max_iter)) as report:
            affinities, state = self._start(affinities, generator)
            # Clusters of rows that have no order yet would tell nothing.
            schedule = self._schedule(first_clusters=int(self.max_iter) // 2)
            losses = self._run(affinities, null, state, schedule, generator, report)
        self._adopt(state, losses, null)
        self._seed = seed
        return self

    def fit_transform(self, operator: Operator, y: Any = None) -> Array:
        """Embed the rows of an operator and return them.

        Parameters
        ----------
        operator : OperatorChain, sparse matrix, dense matrix or other, shape (n, m)
            As in `fit`.
        y : ignored
            There for the conventions of scikit-learn.

        Returns
        -------
        array, shape (n, n_components)
            `embedding_`.

        Raises
        ------
        ValueError, TypeError, ModuleNotFoundError
            As `fit`.

        Examples
        --------
        >>> import networkx
        >>> import subquad as sq
        >>> adjacency = networkx.to_numpy_array(networkx.karate_club_graph())
        >>> step = adjacency / adjacency.sum(axis=1, keepdims=True)
        >>> sq.embedding.EDRep(4, random_state=0).fit_transform(step).shape
        (34, 4)
        """
        return self.fit(operator).embedding_

    def partial_fit(self, operator: Operator, y: Any = None) -> EDRep:
        """Go on from the rows and keys there are, for `max_iter` epochs more.

        The step length starts from `learning_rate` again; clusters, where there are
        several, are there from the first epoch on. `loss_` and `n_iter_` go on. Before
        `fit`, as `fit`.

        Parameters
        ----------
        operator : OperatorChain, sparse matrix, dense matrix or other, shape (n, m)
            Affinities of the rows and keys that were fitted; they may have changed.
        y : ignored
            There for the conventions of scikit-learn.

        Returns
        -------
        EDRep
            The estimator itself. It stays as it was where an epoch fails.

        Raises
        ------
        ValueError
            As `fit`, and if `n_components`, `symmetric` or the shape of the operator
            changed.
        TypeError, ModuleNotFoundError
            As `fit`.

        Notes
        -----
        The former rows stay in memory until all epochs are done.

        Examples
        --------
        >>> import networkx
        >>> import subquad as sq
        >>> adjacency = networkx.to_numpy_array(networkx.karate_club_graph())
        >>> step = adjacency / adjacency.sum(axis=1, keepdims=True)
        >>> model = sq.embedding.EDRep(4, max_iter=10, random_state=0).fit(step)
        >>> model.set_params(learning_rate=0.2).partial_fit(step).n_iter_
        20
        """
        if not self._is_fitted():
            return self.fit(operator)
        affinities, null = self._accepted(operator, again=True)
        generator = np.random.default_rng(self._seed)
        with _bar(bool(self.progress), int(self.max_iter)) as report:
            affinities, state = self._continued(affinities)
            schedule = self._schedule(first_clusters=0)
            losses = self._run(affinities, null, state, schedule, generator, report)
        # Where this run began is where the former ended.
        self._adopt(state, np.concatenate([self.loss_, losses[1:]]), null)
        return self

    def transform(self, affinities: Operator) -> Array:
        """Embed new rows by their affinities to the fitted keys, which stay.

        Parameters
        ----------
        affinities : sparse matrix, dense matrix or other, shape (r, m)
            As `operator` in `fit`.

        Returns
        -------
        array, shape (r, n_components)
            Rows of unit norm, in the library of `embedding_`. Each depends on its own
            affinities alone.

        Raises
        ------
        ValueError
            If the affinities do not have m columns, or are not finite.
        TypeError
            As `fit`.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Notes
        -----
        Rows start from where the gradient at 0 sends them, the direction of P Y less
        the mean key and fᵀY, and take `max_iter` steps down the gradient through xᵢ.
        O(nnz d + r k d² max_iter + m d²) time.

        Examples
        --------
        >>> import networkx
        >>> import subquad as sq
        >>> adjacency = networkx.to_numpy_array(networkx.karate_club_graph())
        >>> step = adjacency / adjacency.sum(axis=1, keepdims=True)
        >>> model = sq.embedding.EDRep(4, learning_rate=1.0, random_state=0).fit(step)
        >>> new = model.transform(step[:2])
        >>> bool((new * model.embedding_[:2]).sum(axis=1).min() > 0.9)
        True
        """
        self._require_fitted()
        self._check_parameters()
        keys = self.key_embedding_
        found = as_affinities(affinities, "affinities")
        if len(found.shape) != 2 or found.shape[1] != self.n_features_in_:
            raise self._wrong_columns("affinities", found.shape)
        _require_one_library(found, keys, "key_embedding_")
        like = like_of(keys)
        labels = self.labels_
        k = int(np.max(to_host(labels))) + 1
        return placed_rows(
            found.astype(dtype_name(keys.dtype)),
            keys,
            clusters_of(labels, k, like),
            as_null(self._null_shares, 1.0, like),
            self._schedule(first_clusters=0),
        )

    # -------- parts of fitting

    def _check_parameters(self) -> None:
        check_embedding_parameters(
            n_components=self.n_components,
            n_clusters=self.n_clusters,
            max_iter=self.max_iter,
            learning_rate=self.learning_rate,
            symmetric=self.symmetric,
            gradient=self.gradient,
            tol=self.tol,
            progress=self.progress,
        )

    def _accepted(
        self, operator: Operator, *, again: bool = False
    ) -> tuple[Affinities, HostNull]:
        """Return an operator that fits the parameters, and null weights."""
        self._check_parameters()
        affinities = as_affinities(operator)
        if again:
            self._require_same(affinities)
        _, m = check_operator_shape(affinities.shape, bool(self.symmetric))
        check_clusters(int(self.n_clusters), m)
        if self.null_weights is None:
            return affinities, (None, float(m))
        weights, total = check_null_weights(_on_host(self.null_weights), m)
        return affinities, (weights / total, total)

    def _start(
        self, affinities: Affinities, generator: np.random.Generator
    ) -> tuple[Affinities, State]:
        """Return the operator in the type to compute in, and where a run begins."""
        (n, m), d = affinities.shape, int(self.n_components)
        given = self._initial_arrays(n, m)
        like = np.zeros(0) if affinities.like is None else affinities.like
        if given:
            for name, rows in given.items():
                _require_one_library(affinities, rows, name)
            _dispatch.backend_for(**given)
            like = like_of(next(iter(given.values())))
        dtype = affinities.dtype if has_float64(like) else "float32"
        found = [initial_rows(rows, name, dtype) for name, rows in given.items()]
        if not given:
            for size in (n,) if self.symmetric else (n, m):
                found.append(from_host(random_rows(generator, size, d, dtype), like))
        rows, keys = found[0], found[-1]
        state = State(rows, keys, one_cluster(m, like_of(rows)))
        return affinities.astype(dtype), state

    def _initial_arrays(self, n: int, m: int) -> dict[str, Array]:
        """Return the arrays of `init` by name; none where it is "random"."""
        init = self.init
        if isinstance(init, str):
            if init != "random":
                message = f'init must be "random" or arrays, got {init!r}'
                raise ValueError(message)
            return {}
        if init is None:
            message = 'init must be "random" or arrays, got None'
            raise TypeError(message)
        d = int(self.n_components)
        if self.symmetric:
            given = {"init": init}
        else:
            if not isinstance(init, (tuple, list)) or len(init) != 2:
                what = f"{len(init)} of them" if isinstance(init, (tuple, list)) else ""
                message = (
                    "init must be a pair of arrays with symmetric=False, rows and "
                    f"keys, got {what or type(init).__name__}"
                )
                raise ValueError(message)
            given = {"init[0]": init[0], "init[1]": init[1]}
        for (name, array), size, letter in zip(
            given.items(), (n, m), "nm", strict=False
        ):
            if type(array).__module__.partition(".")[0] == "dask":
                message = (
                    f"{name} must not be a Dask array: every epoch reads all its rows; "
                    "compute it first"
                )
                raise TypeError(message)
            rows = as_rows(array, name)
            check_initial_shape(name, tuple(rows.shape), (size, d), letter)
            given[name] = rows
        return given

    def _continued(self, affinities: Affinities) -> tuple[Affinities, State]:
        """Return the operator in the type to compute in, and rows to go on from."""
        rows, keys = self.embedding_, self.key_embedding_
        _require_one_library(affinities, rows, "embedding_")
        xp = _dispatch.namespace_of(rows)
        dtype = affinities.dtype if has_float64(rows) else "float32"
        wanted = as_dtype(xp, rows, dtype)
        others = wanted if keys is rows else as_dtype(xp, keys, dtype)
        state = State(wanted, others, one_cluster(keys.shape[0], like_of(wanted)))
        return affinities.astype(dtype), state

    def _require_same(self, affinities: Affinities) -> None:
        """Check that what was fitted can go on with these parameters."""
        (n, d), m = self.embedding_.shape, self.n_features_in_
        for name, before, now in (
            ("n_components", int(d), int(self.n_components)),
            ("symmetric", self._was_symmetric, bool(self.symmetric)),
        ):
            if before != now:
                message = (
                    f"{name} must stay as it was in the first call, {before!r}, got "
                    f"{now!r}; fit starts anew"
                )
                raise ValueError(message)
        if len(affinities.shape) == 2 and affinities.shape[1] != m:
            raise self._wrong_columns("operator", affinities.shape)
        if affinities.shape != (n, m):
            message = (
                f"operator must have the shape of the first call's, {(int(n), m)}, got "
                f"{affinities.shape}; fit starts anew"
            )
            raise ValueError(message)

    def _wrong_columns(self, name: str, shape: tuple[int, ...]) -> ValueError:
        m = self.n_features_in_
        return ValueError(
            f"{name} must have m = {m} columns, one for each key, got shape {shape}: X "
            f"has {shape[-1]} features, but {type(self).__name__} is expecting {m} "
            "features as input"
        )

    def _schedule(self, *, first_clusters: int) -> Schedule:
        return Schedule(
            int(self.max_iter),
            float(self.learning_rate),
            int(self.n_clusters),
            first_clusters,
            None if self.tol is None else float(self.tol),
        )

    def _run(
        self,
        affinities: Affinities,
        null: HostNull,
        state: State,
        schedule: Schedule,
        generator: np.random.Generator,
        report: Callable[[float], None] | None,
    ) -> Float64:
        """Take a state through the epochs; return their losses."""
        like = like_of(state.rows)
        largest = float(np.finfo(dtype_name(like.dtype)).max)
        if null[1] > largest:
            message = (
                "null_weights must have a sum within the range of "
                f"{dtype_name(like.dtype)}, {largest:.4g}, got {null[1]:.4g}"
            )
            raise ValueError(message)
        epochs = Epochs(
            affinities,
            as_null(*null, like),
            self.gradient,
            bool(self.symmetric),
            like,
        )
        return run(epochs, state, schedule, generator, report)

    def _adopt(self, state: State, losses: Float64, null: HostNull) -> None:
        self.embedding_, self.key_embedding_ = state.rows, state.keys
        self.labels_ = state.clusters.labels
        self.loss_, self.n_iter_ = losses, len(losses) - 1
        self.n_features_in_ = int(state.keys.shape[0])
        self._null_shares = null[0]
        self._was_symmetric = state.keys is state.rows

    # -------- scikit-learn and files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # What stores arrays one by one makes two of one that has two names.
        if state.get("_was_symmetric", False):
            self.key_embedding_ = self.embedding_

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import TransformerTags

        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=["float64", "float32"])
        tags.input_tags.sparse = True
        tags.input_tags.pairwise = bool(self.symmetric)
        return tags

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        parameters = self.get_params()
        arrays: Arrays = {
            "embedding": to_host(self.embedding_),
            "labels": to_host(self.labels_),
            "loss": self.loss_,
        }
        if not self._was_symmetric:
            arrays["key_embedding"] = to_host(self.key_embedding_)
        if self._null_shares is not None:
            arrays["null_shares"] = self._null_shares
        if self.null_weights is not None:
            arrays["null_weights"] = _on_host(parameters.pop("null_weights"))
        if not isinstance(self.init, str):
            init = parameters.pop("init")
            is_pair = isinstance(init, tuple if self.symmetric else (tuple, list))
            pair = init if is_pair else (init,)
            for name, array in zip(("init_rows", "init_keys"), pair, strict=False):
                arrays[name] = _on_host(array)
        if isinstance(parameters["random_state"], np.random.Generator):
            parameters["random_state"] = self._seed
        return {"parameters": plain(parameters), "seed": self._seed}, arrays

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        parameters = dict(header["parameters"])
        if "null_weights" in arrays:
            parameters["null_weights"] = arrays["null_weights"]
        given = [
            from_host(arrays[name], like)
            for name in ("init_rows", "init_keys")
            if name in arrays
        ]
        if given:
            parameters["init"] = given[0] if len(given) == 1 else tuple(given)
        loaded = cls(**parameters)
        loaded.embedding_ = from_host(arrays["embedding"], like)
        loaded.key_embedding_ = loaded.embedding_
        loaded._was_symmetric = "key_embedding" not in arrays
        if "key_embedding" in arrays:
            loaded.key_embedding_ = from_host(arrays["key_embedding"], like)
        loaded.labels_ = from_host(arrays["labels"], like)
        loaded.loss_ = arrays["loss"]
        loaded.n_iter_ = len(loaded.loss_) - 1
        loaded.n_features_in_ = int(loaded.key_embedding_.shape[0])
        loaded._null_shares = arrays.get("null_shares")
        loaded._seed = int(header["seed"])
        return loaded


def _on_host(values: Any) -> npt.NDArray[Any]:
    """Return an array of any library, or a list, in host memory."""
    if isinstance(values, np.ndarray) or not hasattr(values, "dtype"):
        return np.asarray(values)
    if hasattr(values, "iloc"):
        return np.asarray(values)
    return to_host(values)


def _require_one_library(affinities: Affinities, rows: Array, name: str) -> None:
    """Check that a dense operator can multiply rows; a chain tells by itself."""
    if affinities.like is None or isinstance(affinities.operator, OperatorChain):
        return
    _dispatch.backend_for(**{affinities.name: affinities.operator, name: rows})


@contextlib.contextmanager
def _bar(wanted: bool, max_iter: int) -> Iterator[Callable[[float], None] | None]:
    """Give a function that takes the loss before the first epoch, and after each."""
    if not wanted:
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError as error:
        message = 'progress=True needs rich: pip install "subquad[cli]"'
        raise ModuleNotFoundError(message, name="rich") from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("epochs", total=max_iter)
        done = -1

        def report(loss: float) -> None:
            nonlocal done
            done += 1
            bars.update(task, completed=done, description=f"epochs, loss {loss:.6f}")

        yield report
