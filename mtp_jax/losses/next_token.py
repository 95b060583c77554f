"""Law of a token through the vocabulary table, as a form of the tiled loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import Array

from mtp_jax.model.layers import product


@dataclass(frozen=True)
class NextToken:
    """The form (`losses.tiles.Form`) of one law of one token, softmax(U x): the model's own of the next token. `table`
    names U among the parameters."""

    table: str = "unembed_VD"

    def tables(self, params: Any) -> Any:
        """The table itself."""
        return params

    def logits(self, tables: Any, x_BTD: Array) -> Array:
        """`[B, T, 1, 1, V]` in float32."""
        return product("btd,vd->btv", x_BTD, tables[self.table])[:, :, None, None]

    def rows(self, rank: int, window: int) -> int:
        """All of them."""
        return rank * window
