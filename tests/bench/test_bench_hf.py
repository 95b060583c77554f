"""Decoding beside `transformers`: who meets whom, and how they are timed."""

from types import SimpleNamespace

import numpy as np

from mtp_jax.bench import decode as bench
from mtp_jax.bench import hf


def test_two_decoders_are_timed_in_turn(monkeypatch):
    fake, calls = SimpleNamespace(now=0.0, perf_counter=lambda: fake.now), []
    monkeypatch.setattr(hf, "time", fake)

    def decoder(name, seconds, tokens):
        def decode(prompt):
            fake.now += seconds
            calls.append((name, prompt))
            return np.array(tokens[prompt])

        return decode

    both = decoder("theirs", 5.0, [[1, 2], [3, 5]]), decoder("ours", 2.0, [[1, 2], [3, 4]])
    theirs, ours = hf.compare(both, [0, 1], 2, lambda _: None)
    assert theirs == {"tokens_per_second": 0.4, "rows_that_differ": 0}
    assert ours == {"tokens_per_second": 1.0, "rows_that_differ": 1}
    assert calls[4:] == [(name, prompt) for _ in range(2) for prompt in (0, 1) for name in ("theirs", "ours")]


def test_transformers_meets_the_drafts_that_are_fastest_one_prompt_at_a_time():
    def rows(batch, temperature, *rates):
        return [
            {"batch": batch, "temperature": temperature, "k": k, "tokens_per_second": rate}
            for k, rate in enumerate(rates)
        ]

    measured = [*rows(8, 0.0, 90.0, 80.0, 99.0), *rows(2, 0.0, 60.0, 50.0, 40.0), *rows(2, 0.7, 1.0, 2.0, 70.0)]
    assert bench.fastest_k(measured, 3) == 1
    assert bench.fastest_k(rows(1, 0.7, 1.0, 2.0), 3) == 3
