"""What every estimator shares: parameters, seeds, arguments of fit, files."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import numbers
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._host import has_float64, to_host

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked for what only `fit` can tell."""


class Estimator:
    """The conventions of scikit-learn, and files.

    The parameters are those of the constructor, kept as attributes of the same names.
    An estimator that has `n_features_in_` is fitted. A subclass says in `_packed` what
    a file holds of it, and in `_unpacked` how to make it of that.
    """

    n_features_in_: int
    _format_version: ClassVar[int] = 1

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Return the parameters of the constructor and what they are by default."""
        parameters = inspect.signature(cls).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the constructor.

        Parameters
        ----------
        deep : bool
            There for the conventions of scikit-learn; no parameter is an estimator.

        Returns
        -------
        dict

        Examples
        --------
        >>> import subquad as sq
        >>> sq.GaussianNormalizer(3).get_params()["n_components"]
        3
        """
        return {name: getattr(self, name) for name in self._defaults()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the constructor, for the next `fit`.

        Parameters
        ----------
        **params
            New values by name.

        Returns
        -------
        Estimator
            The estimator itself.

        Raises
        ------
        ValueError
            If there is no parameter of a name.

        Examples
        --------
        >>> import subquad as sq
        >>> sq.GaussianNormalizer().set_params(n_components=3)
        GaussianNormalizer(n_components=3)
        """
        known = list(self._defaults())
        for name in params:
            if name not in known:
                message = (
                    f"Invalid parameter {name!r} for estimator {self!r}. "
                    f"Valid parameters are: {known}."
                )
                raise ValueError(message)
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = []
        for name, default in self._defaults().items():
            value = getattr(self, name)
            if hasattr(value, "shape") or isinstance(value, (list, tuple)):
                # Arrays cannot be compared with defaults, and would fill the screen.
                changed.append(f"{name}=...")
            elif value is not default and value != default:
                changed.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            array_api_support=True,
            input_tags=InputTags(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a file.

        The file is a plain `.npz` archive of arrays without pickled objects. It takes
        the place of an older one only once it is complete.

        Parameters
        ----------
        path : str or path-like
            Name of the file, used as it is.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.
        OSError
            If the file cannot be written.

        Notes
        -----
        A `random_state` that is a Generator is saved as the seed that was drawn from
        it.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> sq.GaussianNormalizer(2, random_state=0).fit(keys).save("keys.npz")
        >>> sq.GaussianNormalizer.load("keys.npz")
        GaussianNormalizer(n_components=2, random_state=0)
        """
        self._require_fitted()
        header, arrays = self._packed()
        kind = type(self).__name__
        save_archive(path, kind, self._format_version, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: Array | None = None) -> Self:
        """Read an estimator that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            Name of the file.
        like : array, optional
            An array of the library and on the device that the learned arrays are to
            come in. By default NumPy.

        Returns
        -------
        Estimator

        Raises
        ------
        ValueError
            If the file was not written by `save`, or by a later version of it.
        OSError
            If the file cannot be read.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> fitted = sq.GaussianNormalizer().fit(keys)
        >>> fitted.save("keys.npz")
        >>> loaded = sq.GaussianNormalizer.load("keys.npz")
        >>> np.array_equal(fitted.log_normalizer(keys), loaded.log_normalizer(keys))
        True
        """
        kind = cls.__name__
        header, arrays = load_archive(path, kind, cls._format_version)
        companion = np.zeros(0) if like is None else like_of(like)
        try:
            return cls._unpacked(header, arrays, companion)
        except (KeyError, TypeError) as error:
            raise foreign_file(path, kind) from error

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        """Return what JSON can hold, and arrays by name."""
        raise NotImplementedError

    @classmethod
    def _unpacked(cls, header: dict[str, Any], arrays: Arrays, like: Array) -> Self:
        """Return an estimator as it was packed, with arrays of the kind of `like`.

        KeyError or TypeError mean that the file is not one of this class.
        """
        raise NotImplementedError

    def _is_fitted(self) -> bool:
        return hasattr(self, "n_features_in_")

    def _require_fitted(self) -> None:
        if self._is_fitted():
            return
        kind: type[Exception] = NotFittedError
        if "sklearn" in sys.modules:
            from sklearn import exceptions

            kind = exceptions.NotFittedError
        message = (
            f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with "
            "appropriate arguments before using this estimator."
        )
        raise kind(message)


# -------- arguments


def require_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless a parameter is an integer of at least so much."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least:
        message = f"{name} must be an integer >= {least}, got {value!r}"
        raise ValueError(message)


def is_number(value: Any) -> bool:
    """Return whether a parameter is a finite real number."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters as JSON can hold them: numbers as Python's own."""

    def as_plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        is_other = isinstance(value, numbers.Real) and not isinstance(value, int)
        return float(value) if is_other else value

    return {name: as_plain(value) for name, value in parameters.items()}


def seed_of(random_state: Any) -> int:
    """Return the seed that `random_state` is, or one drawn from it."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**63))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63))
    is_integer = isinstance(random_state, (int, np.integer))
    if not is_integer or isinstance(random_state, bool) or random_state < 0:
        message = (
            "random_state must be None, an integer >= 0 or a numpy.random.Generator, "
            f"got {random_state!r}"
        )
        raise ValueError(message)
    return int(random_state)


def type_name(array: Array) -> str:
    """Return the name of an array's data type without its library."""
    return str(array.dtype).rpartition(".")[2]


def as_rows(X: Any, name: str = "X", *, heads: bool = False) -> Array:
    """Return X as a matrix of float32 or float64 of its library.

    With `heads` it may have batch dimensions in front.
    """
    if hasattr(X, "tocsr"):
        message = f"{name} must be dense, got a sparse matrix; pass {name}.toarray()"
        raise TypeError(message)
    known = isinstance(X, np.ndarray) or hasattr(X, "__array_namespace__")
    known = known or type(X).__module__.partition(".")[0] in ("torch", "dask", "cupy")
    rows: Array = X if known and not hasattr(X, "columns") else np.asarray(X)
    library = _dispatch.library_of(rows, name)
    if rows.ndim < 2 or (rows.ndim > 2 and not heads):
        expected = "of shape (..., n, d)" if heads else "a matrix of shape (n, d)"
        message = (
            f"{name} must be {expected}, got shape {tuple(rows.shape)}. "
            f"Reshape your data using {name}.reshape(-1, 1) if it has one feature, or "
            f"{name}.reshape(1, -1) if it is one row"
        )
        raise ValueError(message)
    xp = library.xp
    kind = type_name(rows)
    if library.name == "dask" and any(math.isnan(size) for size in rows.shape):
        rows = rows.compute_chunk_sizes()
    if rows.shape[-1] == 0:
        message = (
            f"0 feature(s) (shape={tuple(rows.shape)}) while a minimum of 1 is "
            "required."
        )
        raise ValueError(message)
    if kind.startswith("complex"):
        message = (
            f"Complex data not supported: {name} must be real, got dtype {rows.dtype}"
        )
        raise ValueError(message)
    if kind in ("float16", "bfloat16"):
        return xp.astype(rows, xp.float32)
    if kind in ("float32", "float64"):
        if isinstance(rows, np.ndarray) and not rows.dtype.isnative:
            rows = rows.astype(rows.dtype.newbyteorder("="))
        return rows
    if library.name in ("numpy", "dask"):
        return rows.astype(np.float64)
    return xp.astype(rows, xp.float64 if has_float64(rows) else xp.float32)


def like_of(rows: Array) -> Array:
    """Return an empty array that tells the library and device of others."""
    library = _dispatch.library_of(rows)
    if library.name in ("numpy", "dask"):
        return np.zeros(0, dtype=rows.dtype)
    return library.xp.zeros((0,), dtype=rows.dtype, device=_dispatch.device_of(rows))


def as_labels(labels: Any, n: int, n_components: int) -> npt.NDArray[Any]:
    host = _to_host_or_list(labels)
    if host.ndim != 1 or host.shape[0] != n:
        message = (
            f"labels must have shape ({n},), one for each row of X, got {host.shape}"
        )
        raise ValueError(message)
    if host.dtype.kind not in "iu" and n > 0:
        message = f"labels must be integers, got dtype {host.dtype}"
        raise ValueError(message)
    if n > 0 and (host.min() < 0 or host.max() >= n_components):
        message = (
            f"labels must be in [0, n_components={n_components}), got values in "
            f"[{host.min()}, {host.max()}]"
        )
        raise ValueError(message)
    return host


def as_weights(sample_weight: Any, n: int) -> Float64:
    host = _to_host_or_list(sample_weight).astype(np.float64)
    if host.shape != (n,):
        message = (
            f"sample_weight must have shape ({n},), one for each row of X, got "
            f"{host.shape}"
        )
        raise ValueError(message)
    bad = np.flatnonzero(~((host >= 0) & np.isfinite(host)))
    if len(bad):
        message = (
            "sample_weight must be finite and not negative, but "
            f"sample_weight[{bad[0]}] is {host[bad[0]]}"
        )
        raise ValueError(message)
    return host


def _to_host_or_list(values: Any) -> npt.NDArray[Any]:
    known = hasattr(values, "__array_namespace__") and not isinstance(
        values, np.ndarray
    )
    if known or type(values).__module__.partition(".")[0] in ("torch", "dask", "cupy"):
        return to_host(values)
    return np.asarray(values)


def require_finite(rows: Array, start: int = 0, name: str = "X") -> None:
    """Raise ValueError naming the first row that holds NaN or infinity."""
    xp = _dispatch.namespace_of(rows)
    bad = np.argwhere(~to_host(xp.all(xp.isfinite(rows), axis=-1)))
    if len(bad):
        *head, row = (int(index) for index in bad[0])
        place = f" of {tuple(head)}" if head else ""
        message = (
            f"{name} must be finite, but row {start + row}{place} contains NaN or "
            "infinity"
        )
        raise ValueError(message)


# -------- files


def save_archive(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    header: dict[str, Any],
    arrays: Arrays,
) -> None:
    """Write a fitted estimator as a plain `.npz` archive, whole or not at all.

    Parameters
    ----------
    path : str or path-like
    kind : str
        Name of the estimator's class.
    version : int
        Of the format, for those who read it.
    header : dict
        What JSON can hold.
    arrays : dict of ndarray
        By name; "header" is taken.
    """
    header = {"format": f"subquad.{kind}", "version": version, **header}
    arrays = {"header": np.array(json.dumps(header)), **arrays}
    target = Path(path)
    handle, temporary = tempfile.mkstemp(
        prefix=target.name, suffix=".part", dir=target.parent
    )
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load_archive(
    path: str | os.PathLike[str], kind: str, version: int
) -> tuple[dict[str, Any], Arrays]:
    """Read what `save_archive` wrote: header and arrays.

    Raises
    ------
    ValueError
        If the file holds something else, or a later version of the format.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive.items())
            header = json.loads(str(arrays["header"][()]))
            is_ours = header["format"] == f"subquad.{kind}"
            written = int(header["version"])
        except Exception as error:
            raise foreign_file(path, kind) from error
    if not is_ours:
        raise foreign_file(path, kind)
    if written > version:
        message = (
            f"{os.fspath(path)!r} has format version {written}, "
            f"this version of subquad reads up to {version}"
        )
        raise ValueError(message)
    return header, arrays


def foreign_file(path: str | os.PathLike[str], kind: str) -> ValueError:
    """Return the error of a file that does not hold an estimator of a class."""
    return ValueError(f"{os.fspath(path)!r} is not a file that {kind}.save wrote")
