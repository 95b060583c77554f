"""Distributions over the next W tokens: one protocol (`Head`), one file per head, one line in `HEADS`."""

from __future__ import annotations

from flax import nnx

from mtp_jax.config import HeadConfig, ModelConfig
from mtp_jax.heads.base import DraftState, Head
from mtp_jax.heads.cpd import CPDHead
from mtp_jax.heads.independent import IndependentHead
from mtp_jax.registry import lookup

HEADS: dict[str, type[Head]] = {
    "independent": IndependentHead,
    "cpd": CPDHead,
}


def make_head(config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> Head:
    """The head that `config.kind` names. Raises `ConfigError` on a name that is not in `HEADS`."""
    return lookup(HEADS, config.kind, "HeadConfig.kind")(config, model, rngs=rngs)


__all__ = ["HEADS", "DraftState", "Head", "make_head"]
