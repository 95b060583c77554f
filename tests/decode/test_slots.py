"""Continuous batching: a request's output is that of `generate`, whatever goes on around it."""

import dataclasses

import jax
import numpy as np
import pytest

from mtp_jax import Slots
from mtp_jax.decode import loop, slots
from mtp_jax.decode.generate import Generation, generate
from mtp_jax.validate import ConfigError
from support import tiny
from support.decoding import LAWS, cut

SIZE, MAX_PROMPT, NEW = 3, 32, 16
# More requests than slots, in two buckets.
PROMPTS = [np.random.default_rng(n).integers(0, tiny.VOCAB, n) for n in (3, 17, 1, 32, 10, 16, 5, 2, 25)]
LIMITS = dict(max_new_tokens=[16, 3, 9, 1, 16, 12, 5, 16, 2], k=[3, 0, 1, 2, 3, 3, 2, 3, 3])
SAMPLED = dict(
    zip(("temperature", "top_k", "top_p"), map(list, zip(*(LAWS * 3)[:9], strict=True)), strict=True),
    seed=[7, 7, 0, 1, 2**32 - 1, 4, 5, 6, 8],
)
OPTIONS = {verifier: LIMITS | SAMPLED for verifier in ("coupled", "token")} | {"greedy": LIMITS}


def make(model, **options) -> Slots:
    return Slots(model, size=SIZE, max_prompt=MAX_PROMPT, max_new=NEW, **options)


def row(options: dict[str, list], i: int) -> dict:
    return {name: values[i] for name, values in options.items()}


def serve(made: Slots, options: dict[str, list], order=range(9), *, forwards: int = 3, trickle: bool = False):
    """The steps of each request, which arrive in this order: at once, or one before each step."""
    waiting, names, steps = list(order), {}, {}
    while waiting or made.busy:
        for i in waiting[:1] if trickle else waiting:
            names[made.submit(PROMPTS[i], **row(options, i))] = i
        waiting = waiting[1:] if trickle else []
        for number, progress in made.step(forwards).items():
            steps.setdefault(names[number], []).append(progress)
    return steps


def joined(steps) -> np.ndarray:
    return np.concatenate([progress.tokens for progress in steps])


def agree(steps, whole: Generation) -> bool:
    return set(steps) == set(range(9)) and all(np.array_equal(joined(steps[i]), whole.tokens[i]) for i in steps)


# Losslessness.


@pytest.mark.parametrize(
    "verifier", [pytest.param(name, marks=() if name == "greedy" else pytest.mark.slow) for name in OPTIONS]
)
def test_a_request_gets_what_generate_gives(model, verifier):
    """In any order, at once or one by one, whatever the slots did before and however many forwards a step has."""
    made, options = make(model, verifier=verifier), OPTIONS[verifier]
    whole = generate(model, PROMPTS, verifier=verifier, **options)
    assert len({tuple(r) for r in whole.tokens}) == 9 and whole.accepted.sum() > 9
    for order, forwards, trickle in (
        (range(9), 1, False),
        ([4, 1, 8, 0, 3, 7, 6, 2, 5], 3, True),
        (range(9), 99, False),
    ):
        steps = serve(made, options, order, forwards=forwards, trickle=trickle)
        assert agree(steps, whole)
        for i, own in steps.items():
            assert [progress.finished for progress in own] == [False] * (len(own) - 1) + [True]
            assert all(progress.finite for progress in own)
            np.testing.assert_allclose(np.concatenate([p.logprobs for p in own]), whole.logprobs[i], atol=1e-5)
    alone = generate(model, [PROMPTS[4]], verifier=verifier, **{n: [v] for n, v in row(options, 4).items()})
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[4])


def test_options_of_slots_are_those_of_requests_that_do_not_say(model):
    """Request i samples as row i of `generate` does."""
    options = dict(max_new_tokens=10, temperature=1.3, top_p=0.9, seed=5)
    made, steps = make(model, **options), {}
    for i, prompt in enumerate(PROMPTS):
        assert made.submit(prompt) == i
    while made.busy:
        for i, progress in made.step().items():
            steps.setdefault(i, []).append(progress)
    assert agree(steps, generate(model, PROMPTS, **options))
    later = make(model, **options, row=2)
    later.submit(PROMPTS[2], seed=None)  # as if it were not given
    np.testing.assert_array_equal(
        next(iter(later.step(99).values())).tokens, generate(model, PROMPTS, **options).tokens[2]
    )


def test_a_stop_token_ends_a_request_wherever_it_stands(model):
    whole = generate(model, PROMPTS, **LIMITS).tokens
    stops = [int(whole[0][0]), int(whole[4][6])]
    steps = serve(make(model, stop_tokens=stops), LIMITS)
    ended = [min((cut(r, stop) for stop in stops), key=len) for r in whole]
    assert any(len(a) < len(b) for a, b in zip(ended, whole, strict=True))
    for i, expected in enumerate(ended):
        np.testing.assert_array_equal(joined(steps[i]), expected)


def test_slots_are_refilled_while_the_others_go_on(model):
    """One request of 16 tokens and then seven of 2: two slots serve the seven, two a step, before the first ends."""
    made = Slots(model, size=SIZE, max_prompt=MAX_PROMPT, max_new=NEW, k=0)
    for new in [16, *[2] * 7]:
        made.submit([5], max_new_tokens=new)
    steps = [made.step(1) for _ in range(4)]
    assert [sorted(step) for step in steps] == [[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7]]
    assert [[len(step[i].tokens) for i in sorted(step)] for step in steps] == [[2, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2]]
    assert made.busy and sum(len(made.step(4)[0].tokens) for _ in range(3)) == 11
    assert not made.busy and made.step() == {}


def test_what_a_row_that_is_not_finite_leaves_behind_is_gone(model):
    """Its keys and values are not numbers, behind the prompt of the request that gets its slot too."""
    made, whole = make(model), generate(model, PROMPTS, **LIMITS)
    number = made.submit(PROMPTS[8], max_new_tokens=NEW)
    made.step(1)
    state = made._batch.state
    cache = jax.tree.map(lambda a: jax.device_put(np.full(a.shape, np.nan, a.dtype), a.sharding), state.cache)
    made._batch.state = dataclasses.replace(state, cache=cache)
    broken = made.step()[number]
    assert broken.finished and not broken.finite and len(broken.tokens) == 1
    assert agree(serve(made, LIMITS), whole)


@pytest.mark.parametrize("kept", ["cache", "noise_BTV", "sampling"])
def test_fault_something_of_the_row_before_is_kept(model, monkeypatch, kept):
    right = slots._insert

    def insert(batch, row, slot):
        before = jax.tree.map(jax.numpy.copy, batch)
        state, sampling = right(batch, row, slot)
        if kept == "sampling":
            return state, before[1]
        return dataclasses.replace(state, **{kept: getattr(before[0], kept)}), sampling

    made, options = make(model, verifier="coupled"), OPTIONS["coupled"]
    whole = generate(model, PROMPTS, verifier="coupled", **options)
    assert agree(serve(made, options), whole)
    monkeypatch.setattr(slots, "_insert", insert)
    assert not agree(serve(made, options), whole)


# What is compiled, and what is copied.


def test_nothing_compiles_after_the_first_use_of_a_bucket(model):
    functions = loop.run, loop.read, loop.begin, slots._insert, slots._repeat
    loop.read.clear_cache()  # what it is compiled for, other tests may have asked for

    def more(before: list[int]) -> list[int]:
        return [f._cache_size() - n for f, n in zip(functions, before, strict=True)]

    zero = more([0] * 5)
    made = Slots(model, size=2, max_prompt=64, max_new=32, temperature=0.9, k=0)
    made.submit([1])
    made.step(1)
    assert more(zero) == [1] * 5, "idle slots are of the first bucket"
    made.submit([1] * 17)
    made.step(1)
    assert more(zero) == [1, 2, 2, 1, 1]
    for n, options in enumerate([{}, {"temperature": 0.0}, {"seed": 9}, {"max_new_tokens": 3}] * 3):
        made.submit(PROMPTS[n % 9], **options)
    while made.busy:
        made.step(2)
    assert more(zero) == [1, 2, 2, 1, 1]
    for options in {"top_k": 3}, {"top_p": 0.5}, {}:  # the first is a plan of its own
        made.submit([1, 2], **options)
        made.step(2)
        assert more(zero) == [2, 2, 3, 1, 1]


def test_a_request_is_put_in_place(model, monkeypatch):
    """The batch is given away and written where it lies, never copied."""
    lowered, insert = [], slots._insert
    monkeypatch.setattr(slots, "_insert", lambda *args: lowered.append(insert.lower(*args)) or insert(*args))
    made = make(model)
    before = made._batch.state, made._batch.sampling
    made.submit([1, 2])
    made.step(1)
    size = sum(a.nbytes for a in jax.tree.leaves(before[0].cache))
    assert all(a.is_deleted() for a in jax.tree.leaves(before))
    memory = lowered[0].compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < 0.1 * size


# Bad requests.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "Slots: size is 0; it must be at least 1"),
        ({"max_prompt": 0}, "Slots: max_prompt is 0"),
        ({"max_new": -1}, "Slots: max_new is -1"),
        ({"k": "auto"}, r"Slots: k is 'auto', and the loop is compiled before requests come; give a number"),
        ({"k": tiny.WINDOW}, "k is 4 and the head's window is 4"),
        ({"verifier": "blok"}, "blok"),
        ({"temperature": [0.5, 0.6]}, "temperature has 2 values"),
        ({"max_new_tokens": 17}, "max_new_tokens is 17 and these slots have max_new = 16"),
    ],
    ids=str,
)
def test_bad_slots_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        Slots(model, **{"size": 2, "max_prompt": 16, "max_new": NEW, **options})


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 33, {}, "prompt's length is 33 and these slots have max_prompt = 32"),
        ([], {}, "is empty"),
        ([tiny.VOCAB], {}, "the vocabulary is 0..31"),
        ([1], {"max_new_tokens": 17}, "max_new_tokens is 17 and these slots have max_new = 16"),
        ([1], {"k": 3}, "k is 3 and these slots have k = 2"),
        ([1], {"temperature": 0.5}, "temperature is 0.5 and these slots are greedy"),
        ([1], {"temperature": -1}, "temperature is -1"),
        ([1], {"verifier": "token"}, "verifier belongs to all requests; give it to Slots"),
        ([1], {"stop_tokens": [3]}, "stop_tokens belongs to all requests"),
        ([1], {"k": "auto"}, "k is 'auto'"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_when_they_are_submitted(model, prompt, options, message):
    made = make(model, k=2)
    with pytest.raises(ConfigError, match=message):
        made.submit(prompt, **options)
    with pytest.raises(ConfigError, match="max_forwards is 0"):
        made.step(0)
    assert not made.busy and made.submit([1]) == 0


def test_slots_are_for_one_data_device(models):
    with tiny.mesh(data=2), pytest.raises(ConfigError, match="the mesh has 2 data x fsdp devices"):
        Slots(models.ready, size=2, max_prompt=16, max_new=NEW)
