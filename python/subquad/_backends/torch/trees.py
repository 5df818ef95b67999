"""States as trees of tensors, which torch's transforms take and return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree

from subquad._states import STATES


def register_states() -> None:
    """Tell torch of the classes of states."""
    for kind in STATES:
        _pytree.register_pytree_node(
            kind,
            _flattened,
            _maker(kind),
            serialized_type_name=f"subquad.{kind.__name__}",
        )


def _flattened(state: Any) -> tuple[list[Any], list[str]]:
    # Transforms refuse results that are no tensors: what is None is left out.
    names = [name for name in state.field_names() if getattr(state, name) is not None]
    return [getattr(state, name) for name in names], names


def _maker(kind: type) -> Any:
    def made(arrays: Iterable[Any], names: Iterable[str]) -> Any:
        return kind(**dict(zip(names, arrays, strict=True)))

    return made
