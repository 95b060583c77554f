"""Decoding: the output is the target's whatever was drafted, at every width, in every batch; and what is counted."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from test_law import FALSE_ALARM, POWER, goodness_of_fit, reference_law

from mtp_jax.config import ConfigError
from mtp_jax.decode import generate as decoding
from mtp_jax.decode import loop, text
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import for_decoding, generate, make_request, proceed, result, start, stream
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.state import Stops
from mtp_jax.decode.text import continue_text, find_stop, held_back
from mtp_jax.decode.verify import Verdict
from mtp_jax.decode.verify.greedy import Greedy
from mtp_jax.heads.base import DraftState, Head
from mtp_jax.model import attention
from mtp_jax.model.cache import write
from mtp_jax.model.transformer import LanguageModel
from mtp_jax.sharding import BATCH
from mtp_jax.train.step import build_model

WINDOW, VOCAB = tiny.WINDOW, tiny.VOCAB
NEW = 16
PROMPTS = [[5, 1, 9], [4, 30, 6, 7, 8, 2, 10, 11, 12, 13], [3], [7, 20] * 8]
# Each row samples by a law of its own: temperature, top-k, top-p.
LAWS = [(0.8, 6, 0.95), (1.3, 0, 0.9), (0.0, 0, 1.0), (1.0, 10, 1.0)]


@dataclasses.dataclass(frozen=True)
class Models:
    """One model twice: as training has it, and as decoding wants it."""

    stacked: LanguageModel
    ready: LanguageModel


def build(mesh: jax.sharding.Mesh, **changes) -> Models:
    """A model whose drafts are sometimes right, more often if the head is conditioned.

    Component r expects permutation r of the last token to come next, and then what the model finds most likely after
    that. The trunk is random, so the tokens before the last one matter too. All of it is filled in on the host: drawing
    parameters on the device costs more compile time than the loop.
    """
    config = tiny.train_config(tiny.model_config(**changes))
    shapes = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    embed_VD = rng.normal(size=(VOCAB, config.model.d_model))
    gate_DR = 0.5 * rng.normal(size=(config.model.d_model, tiny.RANK))
    permutation_RV = np.stack([rng.permutation(VOCAB) for _ in range(tiny.RANK)])
    likely_V = np.choose(np.argmax(embed_VD @ gate_DR, axis=1), permutation_RV)
    expected_RWV = np.repeat(permutation_RV[:, None], WINDOW, axis=1)
    for s in range(1, WINDOW):
        expected_RWV[:, s] = likely_V[expected_RWV[:, s - 1]]
    special = {
        "embed_VD": embed_VD,
        "gate_DR": gate_DR,
        "u_DRWV": 0.9 * np.einsum("vd,rwvu->drwu", embed_VD, np.eye(VOCAB)[expected_RWV]),
    }

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        value = np.ones(leaf.shape) if "scale" in name else 0.4 * rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5
        value = next((special[key] for key in special if key in name), value)
        return jax.device_put(value.astype(leaf.dtype), jax.NamedSharding(mesh, leaf.sharding.spec))

    stacked = jax.tree_util.tree_map_with_path(fill, shapes)
    return Models(stacked, for_decoding(stacked))


def ask(model, prompts=PROMPTS, *, laws=None, stop=-1, **options) -> decoding.Request:
    """A request of the shapes that all tests share: 4 prompts of up to 16 tokens, up to 16 new ones, one stop token."""
    if laws is not None:
        options.update(temperature=1.0, top_k=1)  # compiled for top-k and top-p
    request = make_request(model, prompts, DecodeConfig(**{"max_new_tokens": NEW, **options}))
    request = dataclasses.replace(request, stops=Stops(jax.numpy.asarray(np.array([stop], np.int32))))
    if laws is None:
        return request
    temperature, top_k, top_p = zip(*laws, strict=True)
    rows = np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32)
    return dataclasses.replace(request, sampling=Sampling(*map(tiny.shard, rows), request.sampling.key_B))


def prefilled(model, request: decoding.Request):
    """The shapes of the state after prefill; nothing is compiled."""
    arrays = model, request.prompt_BP, request.length_B, request.limits, request.sampling, request.stops
    return jax.eval_shape(functools.partial(loop.prefill, request.plan), *arrays)


def finish(model, request: decoding.Request, *, chunk: int | None = None) -> decoding.Generation:
    """Decode to the end, `chunk` forwards at a time."""
    state = start(model, request)
    while not np.all(state.done_B):
        state = proceed(model, request, state) if chunk is None else proceed(model, request, state, chunk)
    return result(request, state)


def drive(model, request: decoding.Request, drafts) -> decoding.Generation:
    """Decode with drafts `[B, k]` that `drafts(how many new tokens each row has)` gives, in place of the head's."""
    state = start(model, request)
    while not np.all(state.done_B):
        draft_Bk = drafts(np.asarray(state.length_B - request.length_B)).astype(np.int32)
        state = proceed(model, request, dataclasses.replace(state, draft_Bk=tiny.shard(draft_Bk)), 1)
    return result(request, state)


def same(rows, others) -> bool:
    return all(map(np.array_equal, rows, others))


@functools.partial(jax.jit)
def full_log_probs(model, tokens_BT):
    """The target's law after every position, by one forward of the whole sequence without a cache."""
    return model.head.target_log_probs(model(tokens_BT))


def by_hand(models: Models, choose, prompts=PROMPTS) -> list[np.ndarray]:
    """Plain decoding in Python: row b's token at `position` is `choose(b, position, logp_V)`."""
    rows = [list(p) for p in prompts]
    with tiny.mesh():
        for _ in range(NEW):
            tokens_BT = tiny.shard(np.array([row + [0] * (32 - len(row)) for row in rows], np.int32))
            logp_BTV = np.asarray(full_log_probs(models.stacked, tokens_BT))
            for b, row in enumerate(rows):
                row.append(int(choose(b, len(row), logp_BTV[b, len(row) - 1])))
    return [np.array(row[len(p) :]) for row, p in zip(rows, prompts, strict=True)]


def chooser(laws, seed: int = 0):
    """Sampling by the definition: argmax of log law + the noise of (seed + row, position)."""

    @functools.cache
    def noise(b):
        key = jax.random.key(seed + b)
        draw = jax.vmap(lambda position: jax.random.gumbel(jax.random.fold_in(key, position), (VOCAB,)))
        return np.asarray(draw(np.arange(33)))

    def choose(b, position, logp_V):
        with np.errstate(divide="ignore"):
            return np.argmax(np.log(reference_law(logp_V, *laws[b])) + noise(b)[position])

    return choose


@pytest.fixture(scope="module")
def greedy(models):
    """Greedy decoding in Python."""
    return by_hand(models, lambda b, position, logp_V: np.argmax(logp_V))


@pytest.fixture(scope="module")
def sampled(models):
    """Sampling by `LAWS` in Python."""
    return by_hand(models, chooser(LAWS))


# Losslessness.


@pytest.mark.parametrize("k", range(WINDOW))
def test_greedy_equals_full_forwards(model, greedy, k):
    out = finish(model, ask(model, k=k))
    np.testing.assert_array_equal(out.tokens, greedy)
    assert out.accepted.shape == (4, k)


@pytest.mark.parametrize("k", range(WINDOW))
def test_coupled_sampling_equals_full_forwards_with_the_same_noise(model, sampled, k):
    out = finish(model, ask(model, k=k, laws=LAWS))
    np.testing.assert_array_equal(out.tokens, sampled)


def test_coupled_sampling_without_filters_equals_full_forwards(model, models):
    """Compiled without the sort."""
    expected = by_hand(models, chooser([(1.1, 0, 1.0)] * 4, seed=3))
    np.testing.assert_array_equal(finish(model, ask(model, k=1, temperature=1.1, seed=3)).tokens, expected)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.5, 4, 1.0), (1.0, 0, 0.8), (2.0, 12, 0.9)])
def test_one_law_for_all_rows_gives_the_same_tokens_at_every_width(model, temperature, top_k, top_p):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    outs = [finish(model, ask(model, k=k, **options)) for k in range(WINDOW)]
    for out in outs[1:]:
        np.testing.assert_array_equal(out.tokens, outs[0].tokens)
    assert len({tuple(row) for row in outs[0].tokens}) == 4
    assert not same(finish(model, ask(model, k=0, **{**options, "seed": 8})).tokens, outs[0].tokens)


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}], ids=["greedy", "coupled"])
def test_the_models_of_these_tests_accept_some_drafts_and_reject_some(model, options):
    out = finish(model, ask(model, **options))
    assert all(0.05 < share < 0.95 for share in out.acceptance[:2])
    assert len({int(n) for n in out.forwards}) > 1, "every row took as many forwards: the batch is not ragged"


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}], ids=["greedy", "coupled"])
def test_whatever_is_drafted_the_output_is_the_same(model, options):
    request, rng = ask(model, **options), np.random.default_rng(0)
    expected = finish(model, request)
    out = drive(model, request, lambda count: rng.integers(0, VOCAB, (4, WINDOW - 1)))
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_sampling_follows_the_targets_law(model, models):
    """First tokens of 4,096 seeds in one batch. Power: against a temperature that is off by 20%."""
    rows, temperature = 4096, 1.4
    prompts = [PROMPTS[0]] * rows
    request = make_request(model, prompts, DecodeConfig(max_new_tokens=1, k=0, temperature=temperature, seed=100))
    counts = np.bincount(np.concatenate(result(request, start(model, request)).tokens), minlength=VOCAB)
    tokens_BT = np.zeros((4, 32), np.int32)
    tokens_BT[0, :3] = PROMPTS[0]
    logp_V = np.asarray(full_log_probs(models.stacked, tiny.shard(tokens_BT)))[0, 2]
    expected, warmer = (reference_law(logp_V, t, 0, 1.0) for t in (temperature, 1.2 * temperature))
    value, power = goodness_of_fit(counts, expected, warmer)
    assert power > POWER
    assert value > FALSE_ALARM


# A row is a function of its prompt, seed and law alone.


@pytest.mark.parametrize("laws", [None, LAWS], ids=["greedy", "coupled"])
def test_a_row_does_not_depend_on_its_neighbours(model, laws):
    request = ask(model, laws=laws)
    expected = finish(model, request)
    for b in range(4):
        prompts = [p if i == b else [29 - b, 17] * (1 + 2 * i) for i, p in enumerate(PROMPTS)]
        out = finish(model, ask(model, prompts, laws=laws))
        np.testing.assert_array_equal(out.tokens[b], expected.tokens[b])
        assert out.forwards[b] == expected.forwards[b]
        np.testing.assert_array_equal(out.accepted[b], expected.accepted[b])

    order = np.array([2, 0, 3, 1])
    names = "prompt_BP", "length_B", "limits", "sampling"
    arrays = [getattr(request, name) for name in names]
    shuffled = jax.jit(lambda arrays: jax.tree.map(lambda a: a.at[order].get(out_sharding=P(BATCH)), arrays))(arrays)
    out = finish(model, dataclasses.replace(request, **dict(zip(names, shuffled, strict=True))))
    np.testing.assert_array_equal(out.tokens, [expected.tokens[b] for b in order])
    np.testing.assert_array_equal(out.accepted, expected.accepted[order])


@pytest.mark.parametrize("laws", [None, LAWS], ids=["greedy", "coupled"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_a_thing(model, laws, chunk):
    request = ask(model, laws=laws)
    expected, out = finish(model, request), finish(model, request, chunk=chunk)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.forwards, expected.forwards)
    np.testing.assert_array_equal(out.accepted, expected.accepted)


def test_stream_yields_what_generate_gives(model, greedy):
    stop = int(np.setdiff1d(greedy[1:3], greedy[0])[0])  # one that comes, but not in row 0
    whole = dict(max_new_tokens=NEW, stop_tokens=[stop])
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        expected = cut(expected, stop)
        steps = list(stream(model, prompt, **whole))
        np.testing.assert_array_equal(np.concatenate([new for new, _ in steps]), expected)
        own = [len(new) - accepted for new, accepted in steps]  # tokens that are the target's own
        assert len(steps[0][0]) == 1 and set(own[:-1]) <= {1} and own[-1] in (0, 1)
        out = generate(model, [prompt], **whole)
        np.testing.assert_array_equal(out.tokens[0], expected)
        assert out.forwards.tolist() == [len(steps) - 1]
        assert out.accepted.sum() == sum(accepted for _, accepted in steps)


# Where rows end.


def cut(row: np.ndarray, stop: int) -> np.ndarray:
    """A row up to and with its first stop token."""
    hits = np.flatnonzero(row == stop)
    return row[: hits[0] + 1] if len(hits) else row


def test_a_stop_token_ends_its_row_wherever_it_stands(model, greedy, sampled):
    """Every token that greedy decoding produces is declared the stop token in turn, at every offset of a block."""
    for laws, rows in ((None, greedy), (LAWS, sampled)):
        for stop in np.unique(rows):
            out = finish(model, ask(model, laws=laws, stop=int(stop)))
            assert same(out.tokens, [cut(row, stop) for row in rows])


@pytest.mark.parametrize("k", [0, WINDOW - 1])
def test_max_new_tokens_is_exact(model, greedy, k):
    for new in range(1, NEW + 1):
        out = finish(model, ask(model, k=k, max_new_tokens=new))
        np.testing.assert_array_equal(out.tokens, [row[:new] for row in greedy])
        assert all(out.forwards <= new - 1) and all(out.forwards >= (new - 1) / (k + 1))


def test_prompt_and_new_tokens_may_fill_the_context(models):
    """The last tokens of a full context are right: no write near the end of the cache moves back over valid keys."""
    with tiny.mesh():
        rows = by_hand(models, lambda b, position, logp_V: np.argmax(logp_V))
        context = dataclasses.replace(models.ready.config, context_length=32)
        model = jax.tree.map(lambda a: a, models.ready)
        model.config = context
        np.testing.assert_array_equal(finish(model, ask(model)).tokens, rows)  # row 3: 16 + 16 = 32


def test_finished_rows_are_frozen(model, greedy):
    request = ask(model, stop=int(greedy[1][2]))
    state, ended = start(model, request), {}
    while not np.all(state.done_B):
        state = proceed(model, request, state, 1)
        for b in np.flatnonzero(state.done_B):
            length = int(state.length_B[b])
            seen = [state.tokens_BS[b, :length], length, state.forwards_B[b], state.accepted_Bk[b]]
            # The key and value of the last committed token are written by the next forward.
            seen += [a[b, :, : length - 1] for layer in state.cache for a in layer]
            jax.tree.map(np.testing.assert_array_equal, *(ended.setdefault(b, jax.device_get(seen)), seen))
    assert len(ended) == 4 and len(set(np.asarray(state.forwards_B).tolist())) > 1


@pytest.mark.parametrize("k", [0, WINDOW - 1])
def test_nothing_behind_the_committed_tokens_is_read(model, greedy, k):
    """Rubbish in the cache and in the token buffer from there on, before every forward, changes nothing."""
    request = ask(model, k=k)
    state = start(model, request)
    while not np.all(state.done_B):
        behind_BS = np.arange(request.plan.slots)[None] >= np.asarray(state.length_B)[:, None]
        tokens_BS = np.where(behind_BS, 31, state.tokens_BS)
        # Position length - 1 is not in the cache yet.
        stale_BKSH = np.roll(behind_BS, -1, axis=1)[:, None, :, None]
        cache = jax.tree.map(lambda a, s=stale_BKSH: jax.device_put(np.where(s, 1e9, a), a.sharding), state.cache)
        tokens_BS = jax.device_put(tokens_BS, state.tokens_BS.sharding)
        state = proceed(model, request, dataclasses.replace(state, tokens_BS=tokens_BS, cache=cache), 1)
    np.testing.assert_array_equal(result(request, state).tokens, greedy)


# Each row has settings of its own.


def test_settings_may_differ_by_row(model, sampled):
    """What a row gets among rows of other settings is what it gets where all have its own."""
    temperature, top_k, top_p = zip(*LAWS, strict=True)
    settings = dict(temperature=temperature, top_k=top_k, top_p=np.array(top_p), stop_tokens=[31])
    both = generate(model, PROMPTS, max_new_tokens=NEW, **settings)
    assert same(both.tokens, [cut(row, 31) for row in sampled])

    settings |= dict(max_new_tokens=[3, 16, 1, 9], seed=[7, 7, 2**32 - 1, 0], k=[0, 3, 2, 1], top_p=[0.9] * 4)
    both = generate(model, PROMPTS, **settings)
    assert both.drafted.shape == (4, 3) and both.drafted[0].sum() == both.drafted[2].sum() == 0
    assert both.drafted[3, 0] > 0 and both.drafted[3, 1:].sum() == 0
    for b in range(4):
        own = {name: values[b] for name, values in settings.items() if name != "stop_tokens"}
        own |= dict(seed=[own["seed"]] * 4, verifier="coupled", stop_tokens=[31])
        alone = generate(model, PROMPTS, **own)
        np.testing.assert_array_equal(both.tokens[b], alone.tokens[b])
        np.testing.assert_allclose(both.logprobs[b], alone.logprobs[b], atol=1e-5)


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_rows_of_the_verifiers_that_compare_probabilities_do_not_depend_on_their_neighbours(model, verifier):
    request = ask(model, laws=LAWS, verifier=verifier)
    expected = finish(model, request)
    assert all(len(row) == NEW for row in expected.tokens) and 0.05 < expected.acceptance[0] < 0.95
    chunked = finish(model, request, chunk=2)
    np.testing.assert_array_equal(chunked.tokens, expected.tokens)
    np.testing.assert_array_equal(chunked.accepted, expected.accepted)
    prompts = [PROMPTS[0], [1] * 16, [9, 9], PROMPTS[3]]
    out = finish(model, ask(model, prompts, laws=LAWS, verifier=verifier))
    for b in (0, 3):
        np.testing.assert_array_equal(out.tokens[b], expected.tokens[b])
    for stop in np.unique(expected.tokens):  # every token in turn, at every offset of a block
        out = finish(model, ask(model, laws=LAWS, verifier=verifier, stop=int(stop)))
        assert same(out.tokens, [cut(row, stop) for row in expected.tokens])


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_a_row_alone_is_what_it_is_in_a_batch(model, verifier):
    options = dict(max_new_tokens=NEW, temperature=0.8, verifier=verifier)
    batch = generate(model, PROMPTS, seed=5, **options)
    np.testing.assert_array_equal(generate(model, PROMPTS[:1], seed=5, **options).tokens[0], batch.tokens[0])


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_verifiers_that_compare_probabilities_are_greedy_at_temperature_0(model, greedy, verifier):
    out = finish(model, ask(model, verifier=verifier))
    np.testing.assert_array_equal(out.tokens, greedy)
    np.testing.assert_array_equal(out.accepted, finish(model, ask(model)).accepted)


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}, {"laws": LAWS, "k": 0}], ids=["greedy", "coupled", "plain"])
def test_logprobs_are_those_of_full_forwards(model, models, options):
    out = finish(model, ask(model, **options))
    rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, out.tokens, strict=True)]
    tokens_BT = tiny.shard(np.array([row + [0] * (32 - len(row)) for row in rows], np.int32))
    logp_BTV = np.asarray(full_log_probs(models.stacked, tokens_BT))
    for prompt, row, logp_TV, got in zip(PROMPTS, rows, logp_BTV, out.logprobs, strict=True):
        positions = np.arange(len(prompt), len(row))
        np.testing.assert_allclose(got, logp_TV[positions - 1, row[len(prompt) :]], atol=1e-4)
    assert out.finite.all()


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}, {"laws": LAWS, "verifier": "block"}, {"k": 0}], ids=str)
def test_a_row_that_is_not_finite_ends_with_a_flag_and_leaves_the_others_alone(model, options):
    """The keys of row 1 are not numbers any more after prefill."""
    request = ask(model, **options)
    expected, state = finish(model, request), start(model, request)
    row_B = np.arange(4)[:, None, None, None] == 1
    cache = jax.tree.map(lambda a: jax.device_put(np.where(row_B, np.nan, a), a.sharding), state.cache)
    out = result(request, proceed(model, request, dataclasses.replace(state, cache=cache)))
    assert out.finite.tolist() == [True, False, True, True] and expected.finite.all()
    assert out.tokens[1][0] == expected.tokens[1][0] and 0 <= out.tokens[1][1] < VOCAB
    assert len(out.tokens[1]) == 2 and np.isnan(out.logprobs[1]).tolist() == [False, True]
    for b in (0, 2, 3):
        np.testing.assert_array_equal(out.tokens[b], expected.tokens[b])
        np.testing.assert_array_equal(out.logprobs[b], expected.logprobs[b])


def test_a_prompt_that_is_not_finite_gives_one_token_and_a_flag(model):
    broken = jax.tree.map(lambda a: a, model)
    values = np.array(model.embed_VD[...])
    values[29] = np.nan
    broken.embed_VD[...] = jax.device_put(values, model.embed_VD[...].sharding)
    out = finish(broken, ask(broken, [PROMPTS[0], [4, 29, 6], *PROMPTS[2:]]))
    assert len(out.tokens[1]) == 1 and not out.finite[1] and np.isnan(out.logprobs[1][0])
    assert all(0 <= token < VOCAB for row in out.tokens for token in row)


class Letters:
    """A tokenizer: id i is one letter, or, for every fourth, two."""

    name, vocab_size, end_of_document = "letters", VOCAB, 0

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) - 64

    def decode_bytes(self, ids):
        return b"".join(bytes([64 + i, 64 + i]) if i % 4 == 0 else bytes([64 + i]) for i in np.asarray(ids).tolist())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2}], ids=["greedy", "coupled"])
def test_text_is_cut_at_the_first_stop_string(model, options):
    texts, options = ["EAI", "DZZZ", "C", "GT" * 8], dict(max_new_tokens=64, **options)
    whole = continue_text(model, Letters(), texts, **options)
    assert all(len(string) >= 64 for string in whole)
    rng = np.random.default_rng(0)
    for _ in range(6):
        begins = [(row, int(rng.integers(0, 60)), int(rng.integers(1, 4))) for row in rng.integers(0, 4, 2)]
        stops = [whole[row][begin : begin + length] for row, begin, length in begins]
        out = continue_text(model, Letters(), texts, stop=stops, **options)
        for string, got in zip(whole, out, strict=True):
            ends = [(string.find(s) + len(s), string.find(s)) for s in stops if s in string]
            assert got == string[: min(ends)[1] if ends else None]
    assert (
        continue_text(model, Letters(), texts, stop=whole[2][5:9], **options)[2]
        == whole[2][: whole[2].find(whole[2][5:9])]
    )


def test_decoding_stops_soon_behind_a_stop_string(model, monkeypatch):
    forwards = []
    monkeypatch.setattr(text, "proceed", lambda *args: forwards.append(args[-1]) or proceed(*args))
    whole = continue_text(model, Letters(), ["EAI"], max_new_tokens=96, k=0)[0]
    forwards.clear()
    continue_text(model, Letters(), ["EAI"], stop=whole[:2], max_new_tokens=96, k=0)
    assert forwards == [text.FORWARDS]
    with pytest.raises(ConfigError, match="stop is ''; an empty string"):
        continue_text(model, Letters(), ["EAI"], stop="", max_new_tokens=4)


def test_the_stop_string_that_is_complete_first_counts():
    assert find_stop(b"xabcd", [b"abcd", b"bc"]) == 2
    assert find_stop(b"xabc", [b"bc", b"abc"]) == 1  # complete at one byte: the longest
    assert find_stop(b"xab", [b"abc"]) is None and held_back(b"xab", [b"abc", b"b!"]) == 2
    assert held_back(b"aab", [b"aac"]) == 0 and held_back(b"a", []) == 0


# What is counted.


def test_counts_are_those_of_a_trace_made_by_hand(model, greedy):
    """Drafts that are right up to a chosen offset, and then wrong; row 3 is right again behind the wrong one."""
    plain = np.array(greedy)

    def drafts(count_B: np.ndarray) -> np.ndarray:
        right_Bk = np.stack([np.append(row, [0] * 3)[c : c + 3] for row, c in zip(plain, count_B, strict=True)])
        agrees_Bk = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]], bool)
        return np.where(agrees_Bk, right_Bk, (right_Bk + 1) % VOCAB)

    out = drive(model, ask(model, max_new_tokens=12), drafts)
    np.testing.assert_array_equal(out.tokens, plain[:, :12])
    # Of 12 tokens prefill gives the first. Row 0: 4 + 4 + 3, the last of two drafts. Row 1: 11 times 1. Rows 2 and 3:
    # 5 times 2, then 1. With n tokens to go a row uses n - 1 drafts at most.
    assert out.forwards.tolist() == [3, 11, 6, 6]
    assert out.accepted.tolist() == [[3, 3, 2], [0, 0, 0], [5, 0, 0], [5, 0, 0]]
    assert out.drafted.tolist() == [[3, 3, 2], [10, 9, 8], [5, 5, 4], [5, 5, 4]]
    assert out.block_efficiency == 4 * 11 / 26
    np.testing.assert_allclose(out.acceptance, [13 / 23, 3 / 22, 2 / 18])


def test_drafts_behind_the_end_of_a_row_are_not_counted(model, greedy):
    """All drafts are right, and the rows end behind the first of a block: by the limit, and by a stop token."""
    plain = np.array(greedy)

    def drafts(count_B: np.ndarray) -> np.ndarray:
        return np.stack([np.append(row, [0] * 3)[c : c + 3] for row, c in zip(plain, count_B, strict=True)])

    out = drive(model, ask(model, max_new_tokens=6), drafts)
    assert out.forwards.tolist() == [2] * 4
    assert out.block_efficiency == 5 / 2
    assert out.accepted.tolist() == [[1, 1, 1]] * 4 and out.drafted.tolist() == [[1, 1, 1]] * 4

    row = next(b for b in range(4) if plain[b, 0] != plain[b, 1])
    out = drive(model, ask(model, stop=int(plain[row, 1])), drafts)
    np.testing.assert_array_equal(out.tokens[row], plain[row, :2])
    assert out.accepted[row].tolist() == [1, 0, 0] and out.forwards[row] == 1


@pytest.mark.parametrize("options", [{}, {"laws": LAWS}], ids=["greedy", "coupled"])
def test_a_perfect_draft_gives_k_plus_1_tokens_per_forward(model, options):
    """With its last norm at 0 the model has one law everywhere, uniform, and all factors of its head are that law."""
    model = jax.tree.map(lambda a: a, model)
    model.norm.scale = jax.tree.map(jax.numpy.zeros_like, model.norm.scale)
    out = finish(model, ask(model, max_new_tokens=1 + 3 * WINDOW, **options))
    assert out.block_efficiency == WINDOW and out.acceptance == [1.0] * (WINDOW - 1)
    assert out.forwards.tolist() == [3] * 4
    assert len(np.unique(out.tokens)) == 1 if not options else len(np.unique(out.tokens)) > 10
    cut_short = finish(model, ask(model, max_new_tokens=2 + 3 * WINDOW, **options))
    assert cut_short.forwards.tolist() == [4] * 4 and cut_short.block_efficiency == (1 + 3 * WINDOW) / 4


def test_a_useless_draft_gives_one_token_per_forward(model, greedy):
    never = np.setdiff1d(np.arange(VOCAB), np.array(greedy))[0]
    out = drive(model, ask(model), lambda count_B: np.full((4, WINDOW - 1), never))
    np.testing.assert_array_equal(out.tokens, greedy)
    assert out.block_efficiency == 1 and out.acceptance == [0.0] * (WINDOW - 1)
    assert out.forwards.tolist() == [NEW - 1] * 4


# Deliberate faults: what the tests above would see.


def faulty_loop():
    """A `finish` whose loop is traced anew, with whatever is patched, and cached for nobody else.

    Prefill comes from the cache: run it before patching.
    """

    def run(plan, model, state, sampling, stops, max_forwards):
        return loop.run.__wrapped__(plan, model, state, sampling, stops, max_forwards)

    compiled = jax.jit(run, static_argnames="plan", donate_argnames="state")

    def decode(model, request: decoding.Request) -> decoding.Generation:
        state = start(model, request)
        state = compiled(request.plan, model, state, request.sampling, request.stops, np.int32(100))
        assert np.all(state.done_B)
        return result(request, state)

    return decode


def costs_acceptance_only(model, temperature: float, put_in_fault) -> bool:
    """Whether the fault leaves every token as it was and takes 3% more forwards, over 32 rows."""
    requests = [ask(model, k=1, temperature=temperature, seed=seed) for seed in range(0, 32, 4)]
    right = [finish(model, request) for request in requests]  # compiled before the fault is there
    put_in_fault()
    decode = faulty_loop()
    wrong = [decode(model, request) for request in requests]
    for a, b in zip(right, wrong, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    return sum(b.forwards.sum() for b in wrong) > 1.03 * sum(a.forwards.sum() for a in right)


def test_fault_accepting_one_draft_too_many_is_seen(model, greedy, monkeypatch):
    verify = Greedy.verify

    def generous(self, logits_BTV, state, sampling):
        tokens_BT, accepted_B = verify(self, logits_BTV, state, sampling)
        return Verdict(tokens_BT, jax.numpy.minimum(accepted_B + 1, state.draft_Bk.shape[1]))

    request = ask(model)
    start(model, request)
    monkeypatch.setattr(Greedy, "verify", generous)
    assert not same(faulty_loop()(model, request).tokens, greedy)


def test_fault_a_length_that_is_not_rolled_back_is_seen(model, greedy):
    """After each forward the length stands behind all drafts, the rejected ones too."""
    request = ask(model)
    state = start(model, request)
    while not np.all(state.done_B):
        ahead_B = np.minimum(np.asarray(state.length_B) + WINDOW, request.limits.length_B)
        state = proceed(model, request, state, 1)
        length_B = np.where(np.asarray(state.length_B) < request.limits.length_B, ahead_B, state.length_B)
        state = dataclasses.replace(state, length_B=tiny.shard(length_B))
    assert not same(result(request, state).tokens, greedy)


def test_fault_a_cache_that_keeps_rejected_drafts_is_seen(model, greedy, monkeypatch):
    """The first position of a forward held a rejected draft; here it is not written over."""

    def keep(cache_BSKH, new_BTKH, start_B):
        return write(cache_BSKH, new_BTKH[:, 1:], start_B + 1)

    request = ask(model)
    start(model, request)
    monkeypatch.setattr(attention, "write", keep)
    assert not same(faulty_loop()(model, request).tokens, greedy)


def test_fault_noise_of_another_position_costs_acceptance_and_not_the_law(model, monkeypatch):
    draft = loop.draft

    def late(plan, model, state, x_BD, token_B, sampling, first_BRV):
        rolled = dataclasses.replace(state, noise_BTV=jax.numpy.roll(state.noise_BTV, 1, axis=1))
        out = draft(plan, model, rolled, x_BD, token_B, sampling, first_BRV)
        return dataclasses.replace(out, noise_BTV=state.noise_BTV)

    assert costs_acceptance_only(model, 3.0, lambda: monkeypatch.setattr(loop, "draft", late))


def test_fault_drafts_that_ignore_the_targets_token_cost_acceptance_and_not_the_law(model, monkeypatch):
    condition = Head.condition

    def forget(self, state, token_B):
        if state.offset == 0:
            return DraftState(state.log_alpha_BR, state.logp_BRV, 1)
        return condition(self, state, token_B)

    assert costs_acceptance_only(model, 1.2, lambda: monkeypatch.setattr(Head, "condition", forget))


# bfloat16: products of different widths round differently, so outputs are compared at one width.


@pytest.fixture(scope="module")
def narrow():
    """The model to decode with in bfloat16. Its parameters are those of `models`, rounded."""
    with tiny.mesh() as mesh:
        return build(mesh, dtype="bfloat16").ready


@pytest.mark.parametrize("k", range(WINDOW))
def test_bfloat16_takes_tokens_that_are_nearly_the_best_in_float32(models, narrow, k):
    with tiny.mesh():
        assert {a.dtype for a in jax.tree.leaves(narrow.blocks[0].feed_forward)} == {jax.numpy.dtype("bfloat16")}
        out = finish(narrow, ask(narrow, k=k))
        assert [len(row) for row in out.tokens] == [NEW] * 4
        assert set(np.ravel(out.tokens)) <= set(range(VOCAB))
        rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, out.tokens, strict=True)]
        tokens_BT = np.array([row + [0] * (32 - len(row)) for row in rows], np.int32)
        logp_BTV = np.asarray(full_log_probs(models.stacked, tiny.shard(tokens_BT)))
    for prompt, row, logp_TV in zip(PROMPTS, rows, logp_BTV, strict=True):
        for position in range(len(prompt), len(row)):
            assert logp_TV[position - 1, row[position]] > logp_TV[position - 1].max() - 0.05


@pytest.mark.parametrize("k", range(1, WINDOW))
def test_whatever_is_drafted_bfloat16_output_is_the_same_at_one_width(narrow, k):
    with tiny.mesh():
        request, rng = ask(narrow, k=k), np.random.default_rng(0)
        expected = finish(narrow, request)

        def right(count_B):
            rows = zip(expected.tokens, count_B, strict=True)
            return np.stack([np.append(row, [0] * k)[count : count + k] for row, count in rows])

        perfect = drive(narrow, request, right)
        garbage = drive(narrow, request, lambda count_B: rng.integers(0, VOCAB, (4, k)))
        useless = drive(narrow, request, lambda count_B: (right(count_B) + 1) % VOCAB)
    for out in perfect, garbage, useless:
        np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert perfect.forwards.tolist() == [-(-(NEW - 1) // (k + 1))] * 4
    assert perfect.forwards.sum() < expected.forwards.sum() < useless.forwards.sum() == 4 * (NEW - 1)


def test_a_bfloat16_loop_that_is_compiled_to_draft_garbage_gives_the_same_output(narrow, monkeypatch):
    def garbage(plan, model, state, x_BD, token_B, sampling, first_BRV):
        draft_Bk = (5 * token_B[:, None] + 7 * jax.numpy.arange(plan.k)[None]) % VOCAB
        return dataclasses.replace(draft(plan, model, state, x_BD, token_B, sampling, first_BRV), draft_Bk=draft_Bk)

    with tiny.mesh():
        request = ask(narrow)
        expected = finish(narrow, request)
        draft = loop.draft
        monkeypatch.setattr(loop, "draft", garbage)
        out = faulty_loop()(narrow, request)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.forwards.sum() > expected.forwards.sum()


# What is compiled.


def test_another_request_in_the_same_buckets_does_not_compile_again(model):
    def decode(prompts, **options):
        return generate(model, prompts, **{"max_new_tokens": NEW, "stop_tokens": [31], **options})

    laws = dict(temperature=0.7, top_k=5, top_p=0.9)
    decode(PROMPTS), decode(PROMPTS, **laws), finish(model, ask(model)), finish(model, ask(model), chunk=1)
    drive(model, ask(model), lambda count_B: np.zeros((4, WINDOW - 1)))
    compiled = [f._cache_size() for f in (loop.run, loop.read, loop.begin)]
    decode([[1, 2], [3], [4, 5, 6], [7]])
    decode([[1] * 16] * 4, max_new_tokens=9, seed=11, stop_tokens=[2])
    decode([[1] * 5] * 4, temperature=1.9, top_k=0, top_p=0.3, seed=5)
    decode([[1] * 5] * 4, temperature=0.3, top_k=3, top_p=1.0)
    assert [f._cache_size() for f in (loop.run, loop.read, loop.begin)] == compiled
    assert {decoding.bucket(n) for n in range(1, 17)} == {16} and decoding.bucket(17) == 32


def test_twenty_calls_of_different_lengths_compile_once(model):
    """One reading of prompts, one first token, one loop."""
    functions, rng = (loop.read, loop.begin, loop.run), np.random.default_rng(0)
    for function in functions:
        function.clear_cache()
    for call in range(20):
        lengths = rng.integers(1, 17, 4)
        prompts = [rng.integers(0, VOCAB, n) for n in lengths]
        out = generate(model, prompts, max_new_tokens=rng.integers(1, 17, 4), temperature=1.0, seed=call, k=3)
        assert min(map(len, out.tokens)) >= 1
    assert [function._cache_size() for function in functions] == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("k", [0, WINDOW - 1])
def test_the_cache_is_donated_and_not_copied(model, narrow, rows, k, dtype):
    """At 1,024 slots the cache is large next to all else: it is aliased, and no copy of any layer's is made."""
    model = model if dtype == "float32" else narrow
    request = make_request(model, PROMPTS[:rows], DecodeConfig(max_new_tokens=112, k=k))
    plan = dataclasses.replace(request.plan, slots=1024)
    request = dataclasses.replace(request, plan=plan)
    state = start(model, request)
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.cache))
    compiled = loop.run.lower(plan, model, state, request.sampling, request.stops, np.int32(1)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    # At heads 4 wide the scores of several tokens are as large as the cache.
    assert k or memory.temp_size_in_bytes <= 0.3 * size
    shape = ",".join(map(str, state.cache[0][0].shape))
    assert not re.findall(rf"= \w+\[{shape}\]\S* (?:copy|transpose|convert)\(", compiled.as_text())


def test_attention_reads_a_window_and_the_output_is_that_of_the_whole_cache(model, monkeypatch):
    """At once and in chunks, through every window that the rows grow out of. Sums of another length round anew."""
    request = ask(model, [[5, 1, 9], [4], [3, 8], [7, 20]], max_new_tokens=64, temperature=1.0)
    assert decoding.window(request.plan, start(model, request)) is None  # small: one loop for all
    expected, plans, run = finish(model, request), [], loop.run
    monkeypatch.setattr(decoding, "SMALLEST_WINDOW", 16)
    monkeypatch.setattr(decoding, "run", lambda plan, *args: plans.append(plan) or run(plan, *args))
    for chunk in (None, 3):
        plans.clear()
        out = finish(model, request, chunk=chunk)
        assert list(dict.fromkeys(plan.window for plan in plans)) == [16, 32, None]
        assert chunk is not None or len(plans) == 3
        for name in ("tokens", "forwards", "accepted"):
            assert same(getattr(out, name), getattr(expected, name)), name
        np.testing.assert_allclose(np.concatenate(out.logprobs), np.concatenate(expected.logprobs), atol=1e-5)


def test_without_drafts_the_loop_is_one_token_wide(model, monkeypatch):
    widths, drafted = [], []
    extend, draft_state = LanguageModel.extend, Head.draft_state

    def record(self, tokens_BT, *args, **options):
        widths.append(tokens_BT.shape[1])
        return extend(self, tokens_BT, *args, **options)

    def record_draft(self, *args, **options):
        drafted.append(True)
        return draft_state(self, *args, **options)

    monkeypatch.setattr(LanguageModel, "extend", record)
    monkeypatch.setattr(Head, "draft_state", record_draft)
    for k, expected in ((0, {1}), (WINDOW - 1, {WINDOW})):
        request = ask(model, k=k)
        state = start(model, request)
        widths.clear()
        drafted.clear()
        jax.make_jaxpr(lambda *args, r=request: loop.step(r.plan, *args, r.sampling, r.stops))(model, state)
        assert set(widths) == expected
        assert bool(drafted) == (k > 0)


def test_only_what_the_verifier_needs_is_kept(model):
    """No law of a draft but where probabilities are compared, no noise at temperature 0, nothing without drafts."""
    for verifier, noise, q in (("greedy", 0, 0), ("coupled", 4, 0), ("token", 4, 3), ("block", 4, 3)):
        for k in (WINDOW - 1, 0):
            state = prefilled(model, ask(model, verifier=verifier, temperature=float(noise > 0), k=k))
            assert (state.noise_BTV is not None) == bool(noise) and (state.logq_BkV is not None) == bool(q and k)
            assert state.noise_BTV is None or state.noise_BTV.shape == (4, k + 1, VOCAB)
            assert state.logq_BkV is None or state.logq_BkV.shape == (4, k, VOCAB)


@pytest.mark.parametrize("verifier", ["greedy", "coupled", "token", "block"])
def test_decoding_traces_on_a_sharded_mesh(verifier):
    """Where a wrong sharding is an error: the vocabulary, which top-k sorts and the noise spans, is split."""
    with tiny.mesh(data=2, tensor=2) as mesh:
        model = build(mesh).ready
        laws = None if verifier == "greedy" else LAWS
        request = ask(model, laws=laws, verifier=verifier, min_confidence=0.1)
        state = prefilled(model, request)
        run = functools.partial(loop.run, request.plan)
        out = jax.eval_shape(run, model, state, request.sampling, request.stops, 1)
        assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, state)


def test_prepare_casts_the_matrices_once():
    with tiny.mesh() as mesh:
        model = build(mesh, dtype="bfloat16").ready
    for path, weight in jax.tree_util.tree_leaves_with_path(model):
        wide = any(name in jax.tree_util.keystr(path) for name in ("scale", "gate_DR"))
        assert weight.dtype == ("float32" if wide else "bfloat16"), jax.tree_util.keystr(path)


# Bad input.


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "Prompt 1 is empty"),
        ([[1] * 120], {}, r"Prompt 0 has 120 tokens and max_new_tokens is 16, 136 together.* context_length is 128"),
        ([[1], [3, 32]], {}, r"Prompt 1 has token ids 3\.\.32; the vocabulary is 0\.\.31"),
        ([[-1, 4]], {}, r"Prompt 0 has token ids -1\.\.4; the vocabulary is 0\.\.31"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[1]], {"temperature": -0.5}, r"temperature is -0\.5; it must be at least 0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, r"top_p is 0\.0; it must lie in \(0, 1\]"),
        ([[1]], {"top_p": 1.5}, r"top_p is 1\.5; it must lie in \(0, 1\]"),
        ([[1]], {"top_k": -2}, "top_k is -2; it must be at least 0"),
        ([[1]], {"k": 4}, r"k is 4 and the head's window is 4; k must lie in 0\.\.3"),
        ([[1]], {"k": -1}, r"k is -1 and the head's window is 4; k must lie in 0\.\.3"),
        ([[1]], {"verifier": "greedy", "temperature": 0.5}, r"verifier is greedy and temperature is 0\.5.*Use coupled"),
        (
            [[1]],
            {"verifier": "cuopled"},
            "verifier is 'cuopled'; did you mean 'coupled'?.*block, coupled, greedy, token",
        ),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_input_is_refused_with_its_numbers(model, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, **{"max_new_tokens": NEW, **options})


def test_a_batch_that_the_mesh_does_not_divide_is_refused(models):
    with tiny.mesh(data=2, fsdp=2), pytest.raises(ConfigError, match="has 3 prompts and the mesh 4 data x fsdp dev"):
        make_request(models.ready, [[1]] * 3, DecodeConfig(max_new_tokens=4))


@pytest.mark.parametrize("name", ["ready", "stacked"])
def test_without_a_mesh_the_user_is_told_what_to_write(models, name):
    for decode in (generate, lambda *args, **options: next(stream(*args, **options))):
        with pytest.raises(ConfigError, match=r"No mesh in scope.*jax\.set_mesh"):
            decode(getattr(models, name), [[1]] if decode is generate else [1], max_new_tokens=4)
