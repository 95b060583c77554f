"""What plain decoding pays for being a case of speculative decoding: k = 0 against a loop without a word of it.

    python experiments/plain_loop.py                          # the demo's shape
    python experiments/plain_loop.py experiments/NAME.py      # another's

`decode` is written as one would write it who knew nothing of drafts: a forward of one token per row, choose, commit.
It does what k = 0 does: ragged rows, temperatures, stop tokens, limits, log-probabilities, rows whose law is not a
number. Both run as one compiled loop, in pairs, in turn; parameters are random. What the loop itself costs is seen next
to the same iterations written one after the other, with no loop around them.

Cost: about a minute on two CPU cores.
Expect: a ratio within 2% of 1, and no more operations than the plain loop has; the loop itself within 5% of nothing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import mtp_jax
from mtp_jax.commands.experiment import load_experiment
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, for_decoding
from mtp_jax.decode.decoding import Decoding
from mtp_jax.decode.law import Sampling, gumbel, process_logits
from mtp_jax.decode.loop import Plan, run, step
from mtp_jax.decode.state import DecodeState
from mtp_jax.model.cache import Cache
from mtp_jax.state import build_model

NEW, PAIRS = 256, 30
UNROLLED = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the loop carries; the names are those of `DecodeState`."""

    tokens_BS: Array
    logp_BS: Array
    finite_B: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    cache: Cache
    forwards_B: Array


def decode(
    greedy: bool, filtered: bool, model: Decoder, rows: Rows, sampling: Sampling, stops_n: Array, forwards: Array
) -> Rows:
    """Decode until every row is done, or for so many forwards."""

    def put(array_BS: Array, new_B: Array, at_B: Array) -> Array:
        return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new[None], (at,)))(array_BS, new_B, at_B)

    def step(carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        count, rows = carry
        last_B = jax.vmap(lambda row, at: lax.dynamic_index_in_dim(row, at, keepdims=False))(
            rows.tokens_BS, rows.length_B - 1
        )
        seen, cache = model.extend(last_B[:, None], rows.cache, rows.length_B - 1)
        logp_B1V = model.target(seen)[0]
        if greedy:
            token_B = jnp.argmax(logp_B1V[:, 0], axis=-1).astype(jnp.int32)
        else:
            logits_B1V = process_logits(logp_B1V, sampling, filtered=filtered)
            noise_B1V = gumbel(sampling.key_B, rows.length_B[:, None], logp_B1V.shape[-1])
            token_B = jnp.argmax((logits_B1V + noise_B1V)[:, 0], axis=-1).astype(jnp.int32)
        hit_BV = lax.broadcasted_iota(jnp.int32, logp_B1V[:, 0].shape, 1) == token_B[:, None]
        logp_B = jnp.sum(jnp.where(hit_BV, logp_B1V[:, 0], 0.0), axis=-1)
        live_B, broken_B = ~rows.done_B, jnp.isnan(logp_B)
        length_B = rows.length_B + live_B
        ended_B = jnp.any(token_B[:, None] == stops_n[None], axis=-1) | broken_B | (length_B >= rows.limit_B)
        return count + 1, Rows(
            tokens_BS=put(rows.tokens_BS, token_B, rows.length_B),
            logp_BS=put(rows.logp_BS, logp_B, rows.length_B),
            finite_B=rows.finite_B & ~(broken_B & live_B),
            length_B=length_B,
            limit_B=rows.limit_B,
            done_B=rows.done_B | ended_B,
            cache=cache,
            forwards_B=rows.forwards_B + live_B,
        )

    def live(carry: tuple[Array, Rows]) -> Array:
        return (carry[0] < forwards) & ~jnp.all(carry[1].done_B)

    return lax.while_loop(live, step, (jnp.zeros((), jnp.int32), rows))[1]


compiled_decode = jax.jit(decode, static_argnums=(0, 1), donate_argnums=3)


def rows_of(state: DecodeState) -> Rows:
    """The state after prefill, without what is there for drafts."""
    return Rows(**{field.name: getattr(state, field.name) for field in dataclasses.fields(Rows)})


def operations(text: str) -> dict[str, int]:
    """How often each operation occurs in a compiled program, without those that only name and move values."""
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "broadcast", "reshape", "iota"}
    found = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z][\w-]*)\(", text, re.MULTILINE)
    return {name: n for name, n in sorted(collections.Counter(found).items()) if name not in free}


def programs(model: Decoder, prompts: list[Any], **options: Any) -> tuple[Decoding, dict[str, Any]]:
    """The decoding, and both loops compiled for it: each takes a state after prefill and forwards."""
    d = Decoding(model, prompts, DecodeConfig(k=0, **options))
    greedy, n = d.plan.verifier == "greedy", np.int32(0)
    plain = compiled_decode.lower(greedy, d.plan.filtered, model, rows_of(d.state), d.sampling, d.stops_n, n).compile()
    ours = run.lower(d.plan, model, d.state, d.sampling, d.stops_n, n).compile()
    return d, {"plain": plain, "k = 0": ours}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def unrolled(plan: Plan, model: Decoder, state: DecodeState, sampling: Sampling, stops_n: Array) -> DecodeState:
    """`UNROLLED` iterations of `run` without its loop."""
    for _ in range(UNROLLED):
        state = step(plan, model, state, sampling, stops_n)
    return state


def loop_cost(model: Decoder, prompt: Any, k: int) -> np.ndarray:
    """Times of `UNROLLED` iterations in the loop over those without, by pair."""
    d = Decoding(model, [prompt], DecodeConfig(NEW, k=k))
    looped = run.lower(d.plan, model, d.state, d.sampling, d.stops_n, np.int32(0)).compile()
    flat = unrolled.lower(d.plan, model, d.state, d.sampling, d.stops_n).compile()
    calls = {
        "loop": lambda state: looped(model, state, d.sampling, d.stops_n, np.int32(UNROLLED)),
        "flat": lambda state: flat(model, state, d.sampling, d.stops_n),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for pair in range(4 * PAIRS + 1):
        for name in sorted(calls, reverse=bool(pair % 2)):
            d.prefill()
            begin = time.perf_counter()
            jax.block_until_ready(calls[name](d.state))
            seconds[name].append(time.perf_counter() - begin)
    return np.array(seconds["loop"][1:]) / np.array(seconds["flat"][1:])


def main() -> None:
    """Print the times and operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="experiments/code_cpu.py")
    config = load_experiment(parser.parse_args().experiment)
    with jax.set_mesh(mtp_jax.make_mesh()):
        model = for_decoding(jax.jit(lambda: build_model(config, jax.random.key(0)))())
        prompts = [np.arange(96) % config.model.vocab_size]
        for temperature in 0.0, 0.7:
            d, loops = programs(model, prompts, max_new_tokens=NEW, temperature=temperature)
            seconds: dict[str, list[float]] = {name: [] for name in loops}
            tokens: dict[str, Any] = {}
            for pair in range(PAIRS + 1):
                for name in sorted(loops, reverse=bool(pair % 2)):
                    d.prefill()
                    given = rows_of(d.state) if name == "plain" else d.state
                    begin = time.perf_counter()
                    out = loops[name](model, given, d.sampling, d.stops_n, np.int32(NEW))
                    jax.block_until_ready(out)
                    if pair:  # the first pair is for warming up
                        seconds[name].append(time.perf_counter() - begin)
                    tokens[name] = np.asarray(out.tokens_BS)[0, : int(out.length_B[0])]
            ratios = np.array(seconds["k = 0"]) / np.array(seconds["plain"])
            low, median, high = np.percentile(ratios, [25, 50, 75])
            counts = {name: sum(operations(loop.as_text()).values()) for name, loop in loops.items()}
            same = "the same" if np.array_equal(tokens["plain"], tokens["k = 0"]) else "OTHER"
            print(
                f"T = {temperature:g}: k = 0 takes {median:.3f} of the plain loop's time (quartiles {low:.3f} to "
                f"{high:.3f}, {PAIRS} pairs; {np.median(seconds['plain']) / (NEW - 1) * 1e3:.3f} ms per token), "
                f"{counts['k = 0']} operations against {counts['plain']}, {same} tokens"
            )
        for k in range(0, config.head.window, max(1, config.head.window - 1)):
            low, median, high = np.percentile(loop_cost(model, prompts[0], k), [25, 50, 75])
            print(
                f"k = {k}: {UNROLLED} iterations take {median:.3f} of their time without a loop (quartiles {low:.3f} "
                f"to {high:.3f}, {4 * PAIRS} pairs)"
            )


if __name__ == "__main__":
    main()
