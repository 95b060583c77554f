"""Protocol of circuits."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx
from jax import Array

from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.validate import require


class Circuit(nnx.Module):
    """The weights of R components. `start` and `advance` take any axes in front of R.

    `TABLES` names the parameters of `unfold`, if there are any: what they give is large, so that the loss forms it tile
    by tile.
    """

    TABLES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, head: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        """Make the parameters, if there are any."""

    @classmethod
    def check(cls, head: HeadConfig) -> None:
        """Raise `ConfigError` on a config that such a circuit cannot have; `head.window` is how many offsets it is
        over."""
        require(
            not head.circuit_width or bool(cls.TABLES),
            f"HeadConfig.circuit_width is {head.circuit_width} and circuit is {head.circuit}, which has no "
            "transitions. Set it to 0.",
        )

    def latent(self, x_BTD: Array) -> Array:
        """The log-weights of its first component, `[B, T, R]` in float32, normalised."""
        raise NotImplementedError

    def tables(self) -> dict[str, Any]:
        """The parameters of `unfold` by name."""
        return {name: getattr(self, name)[...] for name in self.TABLES if hasattr(self, name)}

    @staticmethod
    def unfold(tables: dict[str, Any], latent: Array, x_BTD: Array) -> Any:
        """All that the hidden states say of the components: a tree of arrays with B and T in front, in float32; by
        default the latent."""
        return latent

    @staticmethod
    def unfolds(tables: dict[str, Any]) -> int:
        """How many numbers `unfold` forms at a position."""
        return 0

    @staticmethod
    def start(unfolded: Any) -> tuple[Any, Array]:
        """(what is carried along the window, log alpha_1 `[.., R]`, normalised): by default one array is both."""
        return unfolded, unfolded

    @staticmethod
    def advance(carry: Any, score_R: Array, offset: int) -> tuple[Any, Array]:
        """The same after the token at `offset` (1 is the first) is known: log p_r of it is `score_R`, `[.., R]`."""
        raise NotImplementedError

    @staticmethod
    def flops(head: HeadConfig, model: ModelConfig) -> int:
        """Forward FLOPs of `latent` and `unfold` for one position."""
        return 0
