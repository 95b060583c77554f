"""Tuning of k, the number of drafts: what k = "auto" stands for.

Candidates are timed once for each model, device and kind of request, in turn, on the first prompts and before any of
them is answered. The choice is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mtp_jax
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, mesh_in_scope
from mtp_jax.decode.decoding import Decoding, Prompt
from mtp_jax.decode.verify import get_verifier
from mtp_jax.validate import require

ROUNDS, FORWARDS, SECONDS = 3, 48, 2.0  # forwards of each candidate in a round at most, seconds for all of them
MARGIN = 1.03  # by which more drafts must win: less than that is noise

_CHOSEN: dict[str, int] = {}  # by key, for caches that cannot be written
_FINGERPRINTS: weakref.WeakKeyDictionary[Decoder, str] = weakref.WeakKeyDictionary()


def tuned(decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig) -> DecodeConfig:
    """`config` with the number that its k = "auto" stands for, which may be measured here; any other as it is.

    Raises:
      ConfigError: a seed is given to a verifier whose tokens depend on k, or what is asked cannot be decoded.
    """
    if not isinstance(config.k, str):
        return config
    require(
        config.seed is None or not get_verifier(config.rule).keeps_q,
        f"k is {config.k!r}, the verifier {config.rule} and seed {config.seed}; its tokens depend on k, which may be "
        "another one elsewhere. Give a number for k, leave the seed out, or use coupled.",
    )
    return dataclasses.replace(config, k=best_k(decoder, prompts, config))


def best_k(decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig) -> int:
    """The k of most tokens per second for requests of this kind, whatever `config.k` is: remembered, or measured now.

    What is decoded to measure it is thrown away. Errors as in `Decoding`.
    """
    key = _key(decoder, prompts, config)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if digest not in _CHOSEN:
        path = Path(os.environ.get("MTP_JAX_CACHE") or "~/.cache/mtp_jax").expanduser() / "tune" / f"{digest}.json"
        k = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it makes no sense
            k = json.loads(path.read_text())["k"]
        if k not in candidates(decoder.head.config.window):
            seconds, acceptance = measure(decoder, prompts, config)
            k = choose(seconds, acceptance)
            with contextlib.suppress(OSError):  # it cannot be written: this process remembers
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"k": k, "seconds": seconds, "acceptance": acceptance, **key}))
        _CHOSEN[digest] = k
    return _CHOSEN[digest]


def candidates(window: int) -> list[int]:
    """The numbers of drafts that are tried for a head of W offsets."""
    return sorted(k for k in {0, 1, 3, window - 1} if k < window)


def choose(seconds: Mapping[int, float], acceptance: Sequence[float]) -> int:
    """The k of most tokens per second; of those within `MARGIN` of it the fewest drafts.

    Args:
      seconds: of a forward, by k.
      acceptance: at each offset, the share of drafts that were accepted.
    """
    rates = {k: (1 + sum(acceptance[:k])) / each for k, each in seconds.items()}
    return min(k for k, rate in rates.items() if MARGIN * rate >= max(rates.values()))


def measure(decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig) -> tuple[dict[int, float], list[float]]:
    """Decode the prompts with each candidate in turn: what `choose` asks for.

    Acceptance at an offset is over all candidates that draft there.
    """
    window, decodings = decoder.head.config.window, {}
    for k in reversed(candidates(window)):
        # Of the shapes that the request has, but only the end of the cache ends it.
        asked = dataclasses.replace(config, k=k, stop_tokens=(-1,) * len(config.stop_tokens))
        decodings[k] = endless = Decoding(decoder, prompts, asked)
        last_B = jnp.full_like(endless.length_B, endless.plan.slots - window)
        endless.limits = endless.limits._replace(length_B=last_B)
        widest = next(iter(decodings.values()))
        if widest is not endless:  # prompts are read once
            endless.state = widest.state.narrowed(k)
        _burst(endless, 1)  # which compiles
    once = sum(_burst(decoding, 1)[0] for decoding in decodings.values())
    forwards = int(np.clip(SECONDS / ROUNDS / once, 3, FORWARDS))
    seconds, counts_2k = {k: [] for k in decodings}, np.zeros((2, max(decodings)))
    for k in list(decodings) * ROUNDS:
        each, counts = _burst(decodings[k], forwards)
        seconds[k].append(each)
        counts_2k[:, :k] += counts
    acceptance = counts_2k[1] / np.maximum(1, counts_2k[0])
    return {k: float(np.median(seconds[k])) for k in sorted(seconds)}, acceptance.tolist()


def _burst(decoding: Decoding, forwards: int) -> tuple[float, np.ndarray]:
    """(seconds of a forward, by offset the drafts and how many of them were accepted) of at most so many forwards."""
    if decoding.done:
        decoding.prefill()
    before, begun = decoding.result(), time.perf_counter()
    decoding.advance(forwards)
    decoding.wait()
    seconds, after = time.perf_counter() - begun, decoding.result()
    counts_2Bk = np.stack([after.drafted - before.drafted, after.accepted - before.accepted])
    return seconds / int((after.forwards - before.forwards).max()), counts_2Bk.sum(1)


def _key(decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig) -> dict[str, Any]:
    """What a choice is for."""
    plan = Decoding(decoder, prompts, dataclasses.replace(config, k=None)).plan
    (device, *_) = jax.tree.leaves(decoder)[0].devices()
    return {
        "model": [repr(decoder.config), repr(decoder.head.config), _fingerprint(decoder)],
        "machine": [device.device_kind, os.cpu_count(), dict(mesh_in_scope().shape)],
        "versions": [mtp_jax.__version__, jax.__version__],
        "request": [repr(plan), 1 << (len(prompts) - 1).bit_length(), config.greedy],
    }


def _fingerprint(decoder: Decoder) -> str:
    """A hash over the sums of a decoder's arrays: other parameters have other acceptance."""
    if decoder not in _FINGERPRINTS:
        sums = jax.jit(lambda leaves: jnp.stack([jnp.sum(jnp.abs(leaf.astype(jnp.float32))) for leaf in leaves]))
        found = np.asarray(sums(jax.tree.leaves(decoder))).tobytes()
        _FINGERPRINTS[decoder] = hashlib.sha256(found).hexdigest()[:32]
    return _FINGERPRINTS[decoder]
