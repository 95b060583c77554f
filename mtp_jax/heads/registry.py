"""Registry of heads, by family."""

from __future__ import annotations

from mtp_jax.heads.base import Head
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.encoded import EncodedHead
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.heads.none import NoHead
from mtp_jax.heads.sequential import SequentialHead
from mtp_jax.registry import lookup

HEADS: dict[str, type[Head]] = {
    "mixture": MixtureHead,
    "sequential": SequentialHead,
    "none": NoHead,
}


def check_head(config: HeadConfig) -> type[Head]:
    """The family that `config.kind` names, behind an encoder if there is one.

    Raises `ConfigError` on a name that is not there, or a config of no head.
    """
    family = lookup(HEADS, config.kind, "HeadConfig.kind")
    family = family if config.encoder == "none" else EncodedHead
    family.check(config)
    return family
