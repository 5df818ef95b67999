"""What all running totals share: batches, files, and the list that backends register.

A state is a frozen dataclass of arrays, or None where it holds none. `STATES` lists all
of them: libraries that know trees of arrays are told of them when their backend is
loaded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from subquad._dispatch import Array, backend_for, library_of, namespace_of
from subquad._estimators import foreign_file, load_archive, save_archive
from subquad._host import from_host, to_host

STATES: list[type[State]] = []

_S = TypeVar("_S", bound="State")


def listed(kind: type[_S]) -> type[_S]:
    """Enter a class of states in the list of all."""
    STATES.append(kind)
    return kind


class State:
    """A running total: arrays whose leading dimensions are a batch."""

    _format_version = 1

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    def _arrays(self) -> Iterator[tuple[str, Array]]:
        for name in self.field_names():
            array = getattr(self, name)
            if array is not None:
                yield name, array

    def _mapped(self: _S, function: Callable[[Array], Array]) -> _S:
        """Return a state of what a function gives of each array."""
        changed = {name: function(array) for name, array in self._arrays()}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    def __getitem__(self: _S, index: Any) -> _S:
        index = index if isinstance(index, tuple) else (index,)
        return self._mapped(lambda array: array[(*index, ...)])

    def take(self: _S, indices: Array, axis: int = 0) -> _S:
        """Return the states of a batch that are asked for, in their order.

        Parameters
        ----------
        indices : int array of shape (k,)
            Which states; some may be asked for several times, as a beam search does.
        axis : int
            The dimension of the batch, counted from the first.

        Returns
        -------
        State
            Of the same class.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> state = sq.LogSumExpState.init((3,)).update(np.array([[0.0], [1.0], [2.0]]))
        >>> state.take(np.array([2, 0, 0])).finalize()
        array([2., 0., 0.])
        """
        first = next(array for _, array in self._arrays())
        xp = namespace_of(first)
        return self._mapped(lambda array: xp.take(array, indices, axis=axis))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, a plain `.npz` archive of arrays.

        Parameters
        ----------
        path : str or path-like
            Name of the file, used as it is.

        Raises
        ------
        OSError
            If the file cannot be written; an older one is left as it was.

        Examples
        --------
        >>> import subquad as sq
        >>> sq.LogSumExpState.init().save("state.npz")
        >>> sq.LogSumExpState.load("state.npz").finalize()
        array(-inf)
        """
        arrays = {name: to_host(array) for name, array in self._arrays()}
        save_archive(path, type(self).__name__, self._format_version, {}, arrays)

    @classmethod
    def load(
        cls: type[_S], path: str | os.PathLike[str], *, like: Array | None = None
    ) -> _S:
        """Read a state that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            Name of the file.
        like : array, optional
            An array of the library and on the device that the state is to come in. By
            default NumPy.

        Returns
        -------
        State
            Of this class.

        Raises
        ------
        ValueError
            If the file was not written by `save`, or by a later version of it.
        OSError
            If the file cannot be read.

        Examples
        --------
        >>> import subquad as sq
        >>> sq.AttentionState.init((), 2, 3).save("state.npz")
        >>> sq.AttentionState.load("state.npz").value_sums.shape
        (2, 2, 3)
        """
        _, arrays = load_archive(path, cls.__name__, cls._format_version)
        del arrays["header"]
        if like is not None:
            # Elsewhere Dask arrays have NumPy companions.
            is_lazy = library_of(like).name == "dask"
            move = (
                namespace_of(like).asarray if is_lazy else partial(from_host, like=like)
            )
            arrays = {name: move(array) for name, array in arrays.items()}
        try:
            return cls(**arrays)
        except TypeError as error:
            raise foreign_file(path, cls.__name__) from error


def of_states(function: Callable[..., tuple[Array, ...]], *arrays: Any) -> Any:
    """Call a function of states: for arrays of Dask, in one task that runs later."""
    if library_of(arrays[0]).name == "dask":
        from subquad._backends.dask.common import one_task

        return one_task(function, *arrays)
    return function(*arrays)


def type_of_state(like: Array | None) -> tuple[Any, Any, Any]:
    """Return namespace, floating type and device of a new state's arrays.

    The library's backend is loaded, so that it knows of states before it meets one.
    """
    import array_api_compat.numpy as numpy_namespace

    if like is None:
        return numpy_namespace, numpy_namespace.float64, None
    from subquad._dispatch import device_of
    from subquad._validation import common_floats

    backend_for(like=like)
    array: Any = common_floats(("like",), (like,))[0]
    return library_of(like).xp, array.dtype, device_of(like)
