"""The size of a batch, whatever it contains."""

from collections.abc import Sized
from typing import Any


def num_rows(batch: dict[str, Any]) -> int:
    """Return the number of rows B of a batch, from its first tensor, list or keyed noise.

    Raises ValueError if it has none.
    """
    for value in batch.values():
        if isinstance(value, Sized) and not isinstance(value, str):
            return len(value)
    raise ValueError(
        f"a batch of {', '.join(batch) or 'nothing'} has no rows; expected a tensor, a list or keyed noise in it"
    )
