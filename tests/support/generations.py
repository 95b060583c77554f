"""Generations of known tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_jax.decode.decoding import Generation


def generation(tokens: Sequence[int], forwards: int, accepted: Sequence[int] = (), batch: int = 1) -> Generation:
    """Of one row, which used all drafts in every forward, or of a batch of such rows."""
    accepted_Bk = np.array([accepted] * batch, np.int32).reshape(batch, -1)
    return Generation(
        tokens=[np.array(tokens)] * batch,
        forwards=np.array([forwards] * batch),
        accepted=accepted_Bk,
        drafted=np.full_like(accepted_Bk, forwards),
        logprobs=[np.zeros(len(tokens))] * batch,
        finite=np.array([True] * batch),
        k=len(accepted),
    )
