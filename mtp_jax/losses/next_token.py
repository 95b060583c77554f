"""Laws of tokens through the vocabulary table, as forms of the tiled loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import Array

from mtp_jax.model.layers import product


@dataclass(frozen=True)
class NextToken:
    """The form (`losses.tiles.Form`) of one law of one token, softmax(U x): the model's own of the next token. `table`
    names U among the parameters; logits are divided by `temperature`."""

    table: str = "unembed_VD"
    temperature: float = 1.0

    def tables(self, params: Any) -> Any:
        """The table itself."""
        return params

    def logits(self, tables: Any, x_BTD: Array) -> Array:
        """`[B, T, 1, 1, V]` in float32."""
        return self._cool(product("btd,vd->btv", x_BTD, tables[self.table])[:, :, None, None])

    def rows(self, rank: int, window: int) -> int:
        """All of them."""
        return rank * window

    def _cool(self, logits: Array) -> Array:
        return logits if self.temperature == 1 else logits / self.temperature


class EachToken(NextToken):
    """The same of W tokens, each of which has a hidden state of its own: `[B, T, W, D]` in place of `[B, T, D]`."""

    def logits(self, tables: Any, x_BTWD: Array) -> Array:
        """`[B, T, 1, W, V]` in float32."""
        return self._cool(product("btwd,vd->btwv", x_BTWD, tables[self.table])[:, :, None])
