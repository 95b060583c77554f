"""Where the time of an iteration of the decode loop goes, part by part, beside the bytes and FLOPs that each needs.

    python experiments/iteration_parts.py runs/pretrained-cpu/head
    python experiments/iteration_parts.py RUN --ks 0 3 --temperatures 0 0.7 --batch 1

Parts of an iteration, each in a compiled loop of its own, all of them in turn:

| part | reads |
| --- | --- |
| trunk | the weights of the layers and the attended part of the cache, for k + 1 tokens |
| law | the vocabulary table, for k + 1 tokens |
| verify | the laws, and the noise that chooses |
| draft | k times the head, and the table of its drafts |
| rest | what the whole iteration takes more (or less) than these: commits, and what XLA fuses over their borders |

The limit of a part is the time of its bytes at the machine's bandwidth, or of its FLOPs at its peak, whichever is
longer; both are measured first, on a CPU. Drafting has one for a sequential head with one module and a shortlist.

Cost: about two minutes on two CPU cores for a model of 135M parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import mtp_jax
from mtp_jax import DecodeConfig, arrays
from mtp_jax.decode.decoder import Decoder, Packed, for_decoding, unpacked
from mtp_jax.decode.decoding import Decoding
from mtp_jax.decode.loop import advance, step
from mtp_jax.decode.state import DecodeState
from mtp_jax.decode.verify import get_verifier
from mtp_jax.language_model import in_dtype

ROUNDS, LOOPS = 7, 8
PROMPT, NEW = 96, 128


def bandwidth() -> float:
    """Bytes per second that all threads read together, the best of some."""
    threads = os.cpu_count() or 1
    parts = np.split(np.ones(2**26 // threads * threads, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / best(lambda: list(pool.map(np.sum, parts)))


def peak(dtype: str) -> float:
    """FLOPs per second of a large product, the best of some."""
    size = 2048
    a = jnp.ones((size, size), dtype)
    run = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return 2 * size**3 / best(lambda: jax.block_until_ready(run(a)))


def best(call: Callable[[], Any], rounds: int = 7) -> float:
    """The shortest time of a call, once it has run."""
    call()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def looped(decoding: Decoding, part: Callable[[Decoder, DecodeState], tuple[DecodeState, Any]]) -> Callable[[], None]:
    """A call that runs a part `LOOPS` times, each time of a state that XLA cannot know to be the one before."""

    @jax.jit
    def run(packed: Packed, state: DecodeState) -> Array:
        decoder = unpacked(packed)

        def once(_: int, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
            state, seen = lax.optimization_barrier(carry)
            state, found = lax.optimization_barrier(part(decoder, state))  # all of it is wanted
            return state, seen + sum(jnp.sum(leaf[..., :1].astype(jnp.float32)) for leaf in jax.tree.leaves(found))

        return lax.fori_loop(0, LOOPS, once, (state, jnp.zeros(())))[1]

    packed, state = Packed.of(decoding.decoder), decoding.state
    return lambda: jax.block_until_ready(run(packed, state))


def parts(decoding: Decoding) -> dict[str, Callable[[], None]]:
    """A call for each part, of a batch that is some tokens behind its prompts."""
    plan, sampling, stops_n = decoding.plan, decoding.sampling, decoding.stops_n
    verifier = get_verifier(plan.verifier)

    def trunk(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Any]:
        at_B = state.length_B - 1
        last_B1 = arrays.at(state.tokens_BS, at_B)[:, None]
        inputs_BT = jnp.concatenate([last_B1, state.draft_Bk], axis=1)
        seen, cache = decoder.extend(inputs_BT, state.cache, at_B, plan.attended)
        return dataclasses.replace(state, cache=cache), seen.x_BTD

    seen = jax.jit(lambda packed, state: unpacked(packed).extend(
        jnp.concatenate([state.tokens_BS[:, :1], state.draft_Bk], axis=1), state.cache, state.length_B - 1
    )[0].x_BTD)(Packed.of(decoding.decoder), decoding.state)  # fmt: skip

    def seen_of(decoder: Decoder, state: DecodeState) -> Any:
        x_BTD = lax.optimization_barrier((seen, state.length_B))[0]
        return decoder.seen(x_BTD, state.tokens_BS[:, : x_BTD.shape[1]], ())

    def law(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Any]:
        return state, decoder.target(seen_of(decoder, state))[0]

    def behind(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Any]:
        after = advance(plan, decoder, state, seen_of(decoder, state), sampling, stops_n)
        return state, (after.tokens_BS, after.draft_Bk, after.noise_BTV)

    def verified(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Any]:
        logp_BTV = decoder.target(seen_of(decoder, state))[0]
        logits_BTV = verifier.law(logp_BTV, sampling, filtered=plan.filtered)
        noise_BTV = verifier.noise(sampling, state.length_B, plan.k + 1, logits_BTV.shape[-1])
        return state, (verifier.verify(logits_BTV, state, sampling), noise_BTV)

    def whole(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Any]:
        after = step(plan, decoder, state, sampling, stops_n)
        return dataclasses.replace(state, cache=after.cache), (after.tokens_BS, after.draft_Bk, after.noise_BTV)

    named = {"trunk": trunk, "law": law, "law, verify": verified, "law, verify, draft": behind, "whole": whole}
    return {name: looped(decoding, part) for name, part in named.items()}


def split(seconds: dict[str, float]) -> dict[str, float]:
    """The parts by themselves, from those that were measured together."""
    found = {name: seconds[name] for name in ("trunk", "law")}
    found["verify"] = seconds["law, verify"] - seconds["law"]
    found["draft"] = seconds["law, verify, draft"] - seconds["law, verify"]
    return found | {"rest": seconds["whole"] - sum(found.values()), "whole": seconds["whole"]}


def needs(decoding: Decoding) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) of the parts that read weights, at this number of drafts."""
    decoder, state, k = decoding.decoder, decoding.state, decoding.plan.k
    rows = state.length_B.shape[0] * (k + 1)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    trunk, table, head = decoder.trunk, decoder.unembed_VD, decoder.head
    read = (decoding.attended or decoding.plan.slots) / decoding.plan.slots
    found = {"trunk": (size(trunk) + read * size(state.cache), 2.0 * rows * count(trunk))}
    if table is not None:
        found["law"] = size(table), 2.0 * rows * count(table)
    config = head.config
    if k and config.kind == "sequential" and config.shortlist and not config.per_offset:
        found["draft"] = k * size(head), 2.0 * state.length_B.shape[0] * k * count(head)
    return found


def main() -> None:
    """Print a table for each dtype, temperature and number of drafts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--weights", choices=("params", "ema"), default="params")
    parser.add_argument("--ks", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--batch", type=int, default=1)
    a = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("the bandwidth that it measures is a processor's; run it with JAX_PLATFORMS=cpu.")
    run = mtp_jax.load(a.run, weights=a.weights)
    reads = bandwidth()
    print(f"bandwidth {reads / 1e9:.1f} GB/s")
    for dtype in ("float32", "bfloat16"):
        flops = peak(dtype)
        print(f"\n{dtype}: peak {flops / 1e9:,.0f} GFLOP/s")
        with jax.set_mesh(run.mesh):
            decoder = for_decoding(in_dtype(run.model, dtype))
            calls, decodings = {}, {}
            for t in a.temperatures:
                for k in a.ks:
                    prompts = [np.arange(PROMPT) % run.config.model.known] * a.batch
                    decoding = decodings[t, k] = Decoding(decoder, prompts, DecodeConfig(NEW, t, k=k))
                    decoding.advance(4)
                    calls |= {(t, k, name): call for name, call in parts(decoding).items()}
            taken: dict[Any, list[float]] = {key: [] for key in calls}
            for call in calls.values():
                call()
            for _ in range(ROUNDS):
                for key, call in calls.items():
                    begun = time.perf_counter()
                    call()
                    taken[key].append((time.perf_counter() - begun) / LOOPS)
        median = {key: float(np.median(found)) for key, found in taken.items()}
        for (t, k), decoding in decodings.items():
            alone = split({name: value for (*at, name), value in median.items() if at == [t, k]})
            print(f"\nT = {t:g}, k = {k}\n{'part':8} {'ms':>8} {'MB':>8} {'GFLOP':>7} {'limit ms':>9} {'of limit':>9}")
            bytes_and_flops = needs(decoding)
            for name, seconds in alone.items():
                line = f"{name:8} {seconds * 1e3:8.2f}"
                if name in bytes_and_flops:
                    size, work = bytes_and_flops[name]
                    limit = max(size / reads, work / flops)
                    line += f" {size / 1e6:8.1f} {work / 1e9:7.2f} {limit * 1e3:9.2f} {seconds / limit:9.2f}"
                print(line)


if __name__ == "__main__":
    main()
