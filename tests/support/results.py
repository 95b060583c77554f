"""A results file as `mtp-jax sweep` writes it, with effects that are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

DOCUMENTS = 40


def interval(mean: float) -> dict[str, float]:
    """A value with an interval of a tenth."""
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def results(
    ranks: tuple[int, ...] = (1, 2, 4),
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    loss: float = -0.3,
    kept: float = 0.2,
    first: float = 0.0,
    verify: float = 0.02,
    noise: float = 0.01,
    freeze: str = "trunk",
    sweep: str = "rank_code",
    source: str = "stdlib",
    d_model: int = 64,
    lengths: bool = False,
    cases: dict[str, dict[str, Any]] | None = None,
    draw: int = 0,
    second: float = 0.75,
    older: bool = False,
) -> dict[str, Any]:
    """A sweep over ranks: each doubling changes the joint loss by `loss` nats and tokens per forward by `kept`, the
    first token's loss by `first`, and the time of an iteration with drafts by `verify` plain ones; `noise` is the
    spread between seeds.

    With `cases`, named changes of the head's config, the effects are those of the cases in order, at the one rank.
    Two drafts give `second` of what three give, and one 0.4 of it; `older` files know three and none alone.
    """
    rng = np.random.default_rng(draw)
    difficulty = rng.normal(0, 2.0, DOCUMENTS)  # what runs share: a paired comparison does not see it
    ease = rng.uniform(0.7, 1.3, DOCUMENTS)
    points = [{"head.rank": rank} for rank in ranks]
    if cases:
        points = [{"case": case, "head.rank": ranks[0], **changes} for case, changes in cases.items()]
    runs = []
    for seed in seeds:
        for step, point in enumerate(points):
            effect = step if cases else float(np.log2(point["head.rank"]))
            more = rng.normal(0, noise, 4)
            measured = {}
            for reading, part in {"480": 1.0, "240": 0.8, "120": 0.6}.items():
                joint = 9 + difficulty + part * loss * effect + more[0] + rng.normal(0, noise, DOCUMENTS)
                forwards = np.full(DOCUMENTS, 250.0)
                rate = ease * (1.8 + part * kept * effect + more[1])
                three = rate * (1 - 0.1 * 0.7)
                shares = {3: 1.0} if older else {3: 1.0, 2: second, 1: 0.4}
                decoding = [row(0.7, "joint", 1 + share * (three - 1), forwards, k) for k, share in shares.items()]
                decoding += [
                    row(temperature, draft, rate * (1 - 0.1 * temperature - worse), forwards)
                    for temperature, draft, worse in (
                        (0.0, "joint", 0), (1.0, "joint", 0), (0.7, "unconditioned", 0.05 * effect),
                    )
                    if reading == "480"
                ]  # fmt: skip
                whole = seed == seeds[0] and reading == "240"
                measured[reading] = {
                    "loss": {"joint": interval(float(joint.mean())), "first_token": interval(1.7),
                             "offsets": [interval(value) for value in (1.8, 2.4, 2.8, 3.0)]},
                    "documents": {
                        "joint": (100 * joint).tolist(),
                        "first_token": (100 * (1.7 + difficulty / 4 + first * effect + more[2])).tolist(),
                        "windows": [100] * DOCUMENTS,
                    },
                    "gate": {"entropy": 1.0, "effective": 1.0 if point.get("head.balance") == "none" else 3.0,
                             "shares": [1.0]},
                    "decoding": decoding,
                    "speed": speeds() if whole else [],
                    "components": [
                        {"share": 1 / point["head.rank"], "windows": [["if |x\n", 3.0], ["self", 2.0]]}
                        for _ in range(point["head.rank"])
                    ] if whole else [],
                }  # fmt: skip
            readings = {"steps": 480, "flops": 240, "seconds": 240}
            readings |= {"quarter": 120, "half": 240} if lengths else {}
            head = {"rank": point["head.rank"], "window": 4, "factors": "full", "target": "ntp", "balance": "squared",
                    "balance_weight": 0.05}  # fmt: skip
            head |= {name.removeprefix("head."): value for name, value in point.items() if name.startswith("head.")}
            if freeze == "none":
                head["target"] = "marginal"
            cost = 1 + 0.1 * effect
            runs.append({
                "name": f"rank={point['head.rank']},seed={seed}",
                "changes": {**point, "seed": seed},
                "config": {
                    "model": {"d_model": d_model, "num_layers": 2, "vocab_size": 264, "dtype": "float32"},
                    "head": head, "freeze": freeze, "steps": 480, "optimizer": {"learning_rate": 1e-3},
                    "data": {"source": source, "tokenizer": "bytes", "seq_len": 16, "batch_size": 2},
                },
                "state": "done", "seconds": {"training": 1.0}, "curve": [],
                "cost": {
                    "seconds": 0.1 * cost, "flops": 1e9, "peak_bytes": 2**26,
                    "over_next_token": {"predicted": 0.4, "measured": 0.4 * cost},
                    "over_reference": {"predicted": cost, "measured": cost, "error": 0.01},
                    "decoding": iterations(verify * effect, (0, 3) if older else range(4)),
                },
                "readings": readings, "measured": measured,
            })  # fmt: skip
    return {
        "format": 3 if older else 4, "sweep": sweep, "size": "cpu", "title": "Does it pay?",
        "command": f"mtp-jax sweep experiments/{sweep}.py@cpu",
        "reference": {"case": next(iter(cases))} if cases else {"head.rank": 1},
        "fields": (["case"] if cases else []) + ["head.rank", "seed"], "measure": {"temperatures": [0.7, 0.0, 1.0]},
        "machine": {"processor": "a processor", "cores": 2, "device": "cpu"},
        "versions": {"mtp_jax": "0.1.0", "jax": "0.10.2"}, "first": {}, "runs": runs,
    }  # fmt: skip


def row(temperature: float, draft: str, rate: np.ndarray, forwards: np.ndarray, k: int = 3) -> dict[str, Any]:
    """One entry of `decoding`."""
    mean = float(rate.mean())
    kept = [(mean - 1) * part for part in (0.5, 0.3, 0.2)[:k]]
    return {
        "temperature": temperature, "draft": draft, "k": k, "verifier": "coupled",
        "verification_steps": int(forwards.sum()), "tokens_per_forward": interval(mean),
        "acceptance": [interval(value) for value in kept],
        "documents": {"emitted": (rate * forwards).tolist(), "forwards": forwards.tolist()},
    }  # fmt: skip


def speeds() -> list[dict[str, Any]]:
    """The entries of `speed`."""
    return [
        {
            **{"temperature": t, "k": k, "dtype": "float32", "verify_cost": 1 + k / 6},
            **{"speedup": 1 + k / 10, "tokens_per_second": 800 + 80 * k},
        }
        for t in (0.7, 0.0, 1.0)
        for k in range(4)
    ]


def iterations(more: float, ks: Iterable[int], rounds: int = 7) -> list[dict[str, Any]]:
    """The costs of decoding: a draft takes an eighth of a plain iteration, and what a rank costs `more`. Plain decoding
    is faster in the other dtype. Each round is a hundredth slower than the one before, for all alike."""
    drift = [1 + r / 100 for r in range(rounds)]

    def row(t: float, k: int, dtype: str, seconds: float) -> dict[str, Any]:
        return {"temperature": t, "k": k, "dtype": dtype, "iteration_seconds": [seconds * d for d in drift]}

    own = [row(0.7, k, "float32", 0.002 * (1 + k / 8 + more * (k > 0))) for k in ks]
    return [*own, row(0.7, 0, "bfloat16", 0.0019)]
