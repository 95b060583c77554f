"""Registry of heads, by family."""

from __future__ import annotations

from flax import nnx

from mtp_jax.heads.base import Head
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.model.config import ModelConfig
from mtp_jax.registry import lookup

HEADS: dict[str, type[Head]] = {
    "mixture": MixtureHead,
}


def check_head(config: HeadConfig) -> type[Head]:
    """The family that `config.kind` names. Raises `ConfigError` on a name that is not there, or a config of no head."""
    family = lookup(HEADS, config.kind, "HeadConfig.kind")
    family.check(config)
    return family


def make_head(config: HeadConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> Head:
    """The head of a config, with fresh parameters. Errors as in `check_head`."""
    return check_head(config)(config, model, rngs=rngs)
