"""Verifiers: how the target chooses tokens and which drafts it accepts. One file each, one line in `VERIFIERS`."""

from __future__ import annotations

from mtp_jax.decode.verify.base import Verdict, Verifier
from mtp_jax.decode.verify.block import BlockRule
from mtp_jax.decode.verify.coupled import Coupled
from mtp_jax.decode.verify.greedy import Greedy
from mtp_jax.decode.verify.token import Token
from mtp_jax.registry import lookup

VERIFIERS: dict[str, Verifier] = {
    "greedy": Greedy(),
    "coupled": Coupled(),
    "token": Token(),
    "block": BlockRule(),
}


def get_verifier(name: str) -> Verifier:
    """The verifier of that name. Raises `ConfigError` on a name that is not in `VERIFIERS`."""
    return lookup(VERIFIERS, name, "verifier")


__all__ = ["VERIFIERS", "Verdict", "Verifier", "get_verifier"]
