"""Next-token law of the model itself, as a form of the tiled loss."""

from __future__ import annotations

from typing import Any

from jax import Array

from mtp_jax.model.layers import product


class NextToken:
    """The form (`losses.tiles.Form`) of the model's own next-token law: R = W = 1, and its table is all there is."""

    @staticmethod
    def tables(params: Any) -> Any:
        """The table itself."""
        return params

    @staticmethod
    def logits(tables: Any, x_BTD: Array) -> Array:
        """`[B, T, 1, 1, V]` in float32."""
        return product("btd,vd->btv", x_BTD, tables["unembed_VD"])[:, :, None, None]
