"""Tuning of k, the number of drafts: what k = "auto" stands for.

Candidates are timed once for each model, device and kind of request, in turn, on the first prompts and before any of
them is answered. The choice is kept in the user's cache.
"""

from __future__ import annotations

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
from jax import Array

import mtp_jax
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, mesh_in_scope
from mtp_jax.decode.decoding import Decoding, Prompt
from mtp_jax.decode.loop import Limits
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
        k = _read(path)
        if k not in candidates(decoder.head.config.window):
            seconds, acceptance = measure(decoder, prompts, config)
            k = choose(seconds, acceptance)
            _write(path, {"k": k, "seconds": seconds, "acceptance": acceptance, **key})
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
    ks = candidates(decoder.head.config.window)
    decodings = {k: _endless(decoder, prompts, dataclasses.replace(config, k=k)) for k in ks}
    for decoding in decodings.values():
        _burst(decoding, 1)  # which compiles
    once = sum(_burst(decoding, 1)[0] for decoding in decodings.values())
    forwards = int(np.clip(SECONDS / ROUNDS / once, 4, FORWARDS))
    seconds: dict[int, list[float]] = {k: [] for k in ks}
    drafted_k, accepted_k = np.zeros((2, ks[-1]))
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for k in rng.permutation(ks).tolist():
            each, drafted, accepted = _burst(decodings[k], forwards)
            seconds[k].append(each)
            drafted_k[:k] += drafted
            accepted_k[:k] += accepted
    return {k: float(np.median(each)) for k, each in seconds.items()}, (accepted_k / np.maximum(1, drafted_k)).tolist()


def _endless(decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig) -> Decoding:
    """A decoding that only the end of the cache ends, of the shapes that the request has."""
    decoding = Decoding(decoder, prompts, dataclasses.replace(config, stop_tokens=(-1,) * len(config.stop_tokens)))
    last_B = jnp.full_like(decoding.length_B, decoding.plan.slots - decoder.head.config.window)
    decoding.limits = Limits(last_B, decoding.limits.most_B)
    return decoding


def _burst(decoding: Decoding, forwards: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(seconds of a forward, drafts by offset, and how many of them were accepted) of at most so many forwards."""
    if decoding.done:
        decoding.prefill()
    decoding.wait()
    before = decoding.result()
    begun = time.perf_counter()
    decoding.advance(forwards)
    decoding.wait()
    seconds, after = time.perf_counter() - begun, decoding.result()
    drafted, accepted = ((getattr(after, name) - getattr(before, name)).sum(0) for name in ("drafted", "accepted"))
    return seconds / int((after.forwards - before.forwards).max()), drafted, accepted


def _key(decoder: Decoder, prompts: Sequence[Prompt], config: DecodeConfig) -> dict[str, Any]:
    """What a choice is for."""
    plan = Decoding(decoder, prompts, dataclasses.replace(config, k=None)).plan
    (device, *_) = jax.tree.leaves(decoder)[0].devices()
    return {
        "model": repr(decoder.config),
        "head": repr(decoder.head.config),
        "parameters": _fingerprint(decoder),
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "mesh": dict(mesh_in_scope().shape),
        "versions": [mtp_jax.__version__, jax.__version__],
        "batch": 1 << (len(prompts) - 1).bit_length(),
        "slots": plan.slots,
        "verifier": plan.verifier,
        "filtered": plan.filtered,
        "greedy": config.greedy,
    }


def _fingerprint(decoder: Decoder) -> str:
    """A hash over the sums of a decoder's arrays: other parameters have other acceptance."""
    if decoder not in _FINGERPRINTS:
        _FINGERPRINTS[decoder] = hashlib.sha256(np.asarray(_sums(decoder)).tobytes()).hexdigest()[:32]
    return _FINGERPRINTS[decoder]


@jax.jit
def _sums(decoder: Decoder) -> Array:
    return jnp.stack([jnp.sum(jnp.abs(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(decoder)])


def _read(path: Path) -> int | None:
    try:
        return json.loads(path.read_text())["k"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is none, or no file that can be read: it is measured


def _write(path: Path, found: dict[str, Any]) -> None:
    """In one go: another process may write the same."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found))
        aside.replace(path)
    except OSError:
        pass  # the cache cannot be written: this process remembers
