"""Networks that can say how they were made, so that a card can."""

from __future__ import annotations

import inspect
from typing import Any

from flax import nnx

__all__ = ["Described"]


class Described(nnx.Module):
    """A module that keeps each argument of its constructor, ``rngs`` aside, under the argument's name."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that build this module again."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name not in ("self", "rngs")}
