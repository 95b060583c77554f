"""The protocol of heads, over every head and one with a cache: what is trained is what drafts in the production loop.

That drafts change no token says nothing of a head, for the verifiers are exact whatever is drafted. So the law that
each draft was drawn from is compared with the head's likelihood of the committed text, at every iteration.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import Slots
from mtp_jax.decode import loop
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import Decoding
from mtp_jax.heads.base import Head
from mtp_jax.heads.encoded import EncodedHead
from mtp_jax.validate import ConfigError
from support import tiny
from support.heads import wake
from support.tally import TallyHead, laws, register

W, K, NEW, SIZE = tiny.WINDOW, tiny.WINDOW - 1, 14, 12
PROMPTS = [[5, 1, 9], [4, 3, 6, 7, 8, 2, 10, 11], [3], [7, 11] * 7]
LONG = [[(5 * i + i * i // 7) % SIZE for i in range(n)] for n in (33, 16, 25, 47, 18, 9)]
HEADS = {
    "cpd": dict(rank=3, factors="full"),
    "independent": dict(circuit="independent", rank=1, factors="lora"),
    "next-token target": dict(rank=2, factors="lowrank", target="ntp"),
    "token": dict(rank=2, factors="shared", target="ntp", encoder="token"),
    "token, shortlist": dict(rank=2, factors="lowrank", target="ntp", encoder="token", shortlist=7),
    "hmm": dict(circuit="hmm", rank=3, factors="full"),
    "token, btree": dict(circuit="btree", rank=2, factors="lowrank", target="ntp", encoder="token", circuit_width=4),
    "sequential": dict(kind="sequential", target="ntp", shortlist=7),
    "sequential, per offset": dict(kind="sequential", target="ntp", per_offset=True),
    "attention": dict(kind="sequential", target="ntp", attention=True),
    "attention, per offset": dict(kind="sequential", target="ntp", attention=True, per_offset=True, shortlist=9),
    "hidden": dict(circuit="independent", rank=1, factors="residual", target="ntp", encoder="hidden", shortlist=7),
    "block": dict(rank=2, factors="shared", target="ntp", encoder="block", taps=(2,), shortlist=9),
    "block, two layers": dict(
        circuit="hmm", rank=2, factors="lowrank", target="ntp", encoder="block", encoder_layers=2
    ),
    "tally": dict(kind="tally", target="ntp"),
}
QUICK = {"cpd", "block", "token, shortlist", "token, btree", "attention, per offset"}
every_head = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in HEADS]
)
TOLERANCE = 2e-5  # sums of another order


def make(head):
    """A model whose head drafts now and then what the model says, and the same to decode with."""
    config = tiny.train_config(tiny.model_config(vocab_size=SIZE), tiny.head_config(**head))
    model = tiny.make_model(config, seed=3)
    model = wake(model)
    return model, for_decoding(model)


def check_laws(model, state, live_B):
    """Every draft of a live row against the likelihood of the text; returns how many rows were compared."""
    tokens_BS, length_B, draft_Bk = (np.asarray(a) for a in (state.tokens_BS, state.length_B, state.draft_Bk))
    text_BT = np.array(tokens_BS)
    for row, length, drafts in zip(text_BT, length_B, draft_Bk, strict=True):
        row[length:] = 0
        row[length : length + len(drafts)] = drafts[: len(row) - length]
    for i in range(draft_Bk.shape[1]):
        # The window behind the position before the last committed token: that token is its first.
        want_BV = laws(model, text_BT, length_B - 2, i + 1)
        np.testing.assert_allclose(np.asarray(state.logq_BkV)[live_B, i], want_BV[live_B], atol=TOLERANCE)
    return int(live_B.sum())


def check_loop(model, decoder, prompts=PROMPTS):
    """Through the loop, a forward at a time: ragged rows, drafts accepted and rolled back."""
    config = DecodeConfig(NEW, temperature=1.0, verifier="token", k=K, seed=5)
    decoding, compared = Decoding(decoder, prompts, config), 0
    while not decoding.done:
        compared += check_laws(model, decoding.state, ~np.asarray(decoding.state.done_B))
        decoding.advance(1)
    out = decoding.result()
    assert compared > 20 and len(set(out.forwards.tolist())) > 1
    return out


@every_head
def test_every_draft_is_drawn_from_the_heads_likelihood_of_the_text(name, monkeypatch):
    register(monkeypatch)
    with tiny.mesh():
        out = check_loop(*make(HEADS[name]))
    accepted = out.accepted.sum()
    assert 0 < accepted < out.drafted.sum(), "some drafts are accepted and some rolled back"


@pytest.fixture
def parts(monkeypatch):
    """Prompts are read 16 tokens at a time."""
    monkeypatch.setattr(loop, "SCORES", 1)
    loop.read.clear_cache()
    yield
    loop.read.clear_cache()


@pytest.mark.parametrize("name", [pytest.param("cpd", marks=pytest.mark.slow), "tally"])
def test_behind_prompts_that_are_read_in_parts_too(name, monkeypatch, parts):
    """Rows end just behind a part, at its end and in its middle; a part's last entry knows the token of the next."""
    register(monkeypatch)
    with tiny.mesh():
        check_loop(*make(HEADS[name]), [*LONG, [3]])
        if name == "tally":
            check_slots(*make(HEADS[name]), [*LONG, [3]])


def test_through_slots_too(monkeypatch):
    """Requests come and go; a slot that is filled again has the cache of its own request."""
    register(monkeypatch)
    with tiny.mesh():
        check_slots(*make(HEADS["tally"]))


def check_slots(model, decoder, prompts=PROMPTS):
    made = Slots(decoder, size=2, max_prompt=max(map(len, prompts)), max_new=16, temperature=1.0, verifier="token", k=K)
    for prompt, new in zip(prompts * 2, itertools.cycle((9, 3, 14, 5, 6, 12, 4, 8)), strict=False):
        made.submit(prompt, max_new_tokens=new)
    compared = 0
    while made.busy:
        made.step(1)
        state = made._batch.state
        compared += check_laws(model, state, ~np.asarray(state.done_B))
    assert compared > 12


class Late(TallyHead):
    """Entries are written one position behind their own."""

    shift = 1


class Early(TallyHead):
    """The last entry is not read."""

    def begin(self, seen, token_B, *, position_B=None, **rest):
        return super().begin(seen, token_B, position_B=position_B - 1, **rest)


class Unheard(TallyHead):
    """The cache is that of the prompt: what is decoded is never written."""

    def extend(self, cache, seen, next_BT, start_B, memo):
        return super().extend(cache, seen, next_BT, start_B, memo) if next_BT.shape[1] > W else (cache, memo)


class Stale(TallyHead):
    """Entries of drafts that were rolled back stay: the first position of a forward is not written again."""

    def extend(self, cache, seen, next_BT, start_B, memo):
        if 1 < next_BT.shape[1] <= W:
            kept_B1V = jnp.take_along_axis(cache, start_B[:, None, None], axis=1)
            cache, memo = super().extend(cache, seen, next_BT, start_B, memo)
            put = jax.vmap(lambda row, old, at: jax.lax.dynamic_update_slice(row, old, (at, 0)))
            return put(cache, kept_B1V, start_B), memo
        return super().extend(cache, seen, next_BT, start_B, memo)


@pytest.mark.parametrize("fault", [Late, Early, Unheard, Stale])
def test_a_cache_that_is_off_is_caught(fault, monkeypatch):
    """No token changes by it in greedy decoding, and the law of the drafts does."""
    register(monkeypatch)
    with tiny.mesh():
        right = make(HEADS["tally"])[1]
        config = DecodeConfig(NEW, k=K)
        decoding = Decoding(right, PROMPTS, config)
        decoding.advance()
    register(monkeypatch, fault)
    with tiny.mesh():
        model, wrong = make(HEADS["tally"])
        other = Decoding(wrong, PROMPTS, config)
        other.advance()
        for a, b in zip(decoding.result().tokens, other.result().tokens, strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_loop(model, wrong)


class Forgetful(TallyHead):
    """The last entry of what is read of a prompt does not know the token behind it."""

    def extend(self, cache, seen, next_BT, start_B, memo):
        return super().extend(cache, seen, next_BT.at[:, -1].set(0) if next_BT.shape[1] > W else next_BT, start_B, memo)


@pytest.mark.parametrize("fault", [Late, Forgetful])
def test_it_is_caught_behind_parts_of_a_prompt_too(fault, monkeypatch, parts):
    register(monkeypatch, fault)
    with tiny.mesh(), pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_loop(*make(HEADS["tally"]), [*LONG, [3]])


@pytest.mark.parametrize("fault", [Late, Stale])
def test_it_is_caught_through_slots_too(fault, monkeypatch):
    register(monkeypatch, fault)
    with tiny.mesh(), pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_slots(*make(HEADS["tally"]))


class Behind(EncodedHead):
    """Drafting reads the token before the one that was chosen."""

    def begin(self, seen, token_B, **rest):
        return super().begin(seen, seen.tokens_BT[:, 0], **rest)


def test_another_token_than_the_chosen_one_is_caught(monkeypatch):
    monkeypatch.setattr("mtp_jax.heads.registry.EncodedHead", Behind)
    with tiny.mesh(), pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_loop(*make(HEADS["token"]))


class Held(EncodedHead):
    """Drafting reads what the encoder said of the position before the last committed one."""

    def extend(self, cache, seen, next_BT, start_B, memo):
        cache, memo = super().extend(cache, seen, next_BT, start_B, memo)
        return cache, jnp.roll(memo, 1, axis=1)


class Unwritten(EncodedHead):
    """The encoder's cache is that of the prompt."""

    def extend(self, cache, seen, next_BT, start_B, memo):
        written, memo = super().extend(cache, seen, next_BT, start_B, memo)
        return (written if next_BT.shape[1] > W else cache), memo


@pytest.mark.parametrize("fault", [Held, Unwritten])
def test_an_encoder_that_is_a_position_off_is_caught(fault, monkeypatch):
    monkeypatch.setattr("mtp_jax.heads.registry.EncodedHead", fault)
    with tiny.mesh(), pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_loop(*make(HEADS["block"]))


class Deep(TallyHead):
    """It taps a layer that is not there."""

    @property
    def taps(self):
        return (1, 3)


def test_a_layer_that_is_not_there_is_refused(monkeypatch):
    register(monkeypatch, Deep)
    with tiny.mesh(), pytest.raises(ConfigError, match=r"taps the layers \[3\] and the model has 1\.\.2"):
        make(HEADS["tally"])


@pytest.mark.slow
def test_a_prompt_that_is_read_in_parts_fills_the_cache_as_at_once(monkeypatch):
    """The trunk's cache and the head's, each behind what was read before."""
    register(monkeypatch)
    with tiny.mesh():
        _, decoder = make(HEADS["tally"])
        tokens_BT = tiny.shard(np.random.default_rng(0).integers(0, SIZE, (2, 13)).astype(np.int32))

        def read(*sizes):
            cache, head_cache = loop.init_cache(decoder.config, 2, 32), decoder.head.init_cache(2, 32)
            at = 0
            for size in sizes:
                start_B = tiny.shard(np.full(2, at, np.int32))
                seen, cache = decoder.extend(tokens_BT[:, at : at + size], cache, start_B)
                next_BT = tokens_BT[:, at + 1 : at + size + 1]
                head_cache, _ = decoder.head.extend(head_cache, seen, next_BT, start_B, None)
                at += size
            return np.asarray(head_cache)[:, :at]

        np.testing.assert_allclose(read(5, 4, 3), read(12), atol=1e-5)


@pytest.mark.parametrize("name", ["next-token target", "tally"])
def test_without_drafts_nothing_of_the_head_runs(name, monkeypatch):
    register(monkeypatch)
    with tiny.mesh():
        _, decoder = make(HEADS[name])
        family = type(decoder.head)
        for method in ("init_cache", "extend", "begin", "next_log_probs", "condition", "marginal", "log_likelihood"):
            for owner in {family, Head}:
                monkeypatch.setattr(owner, method, lambda *args, m=method, **rest: pytest.fail(f"{m} runs"))
        decoding = Decoding(decoder, PROMPTS, DecodeConfig(NEW, k=0))
        decoding.advance()
        assert [len(row) for row in decoding.result().tokens] == [NEW] * 4
        assert decoding.state.head_cache == ()


@every_head
def test_the_loss_is_the_weighted_negative_of_the_likelihood(name, monkeypatch):
    """Offset by offset, and the laws of all offsets sum to 1."""
    register(monkeypatch)
    with tiny.mesh():
        model, _ = make({**HEADS[name], "balance": "none"})
        rng = np.random.default_rng(0)
        known = model.head.config.shortlist or SIZE
        tokens_BT, targets_BTW = rng.integers(0, SIZE, (2, 6)), rng.integers(0, known, (2, 6, W))
        weights_BTW = rng.random((2, 6, W)).astype(np.float32)

        def both(model, tokens_BT, targets_BTW, weights_BTW):
            seen = model.see(tokens_BT)
            return model.head.loss(seen, targets_BTW, weights_BTW)[1], model.head.log_likelihood(seen, targets_BTW)

        arrays = [tiny.shard(a) for a in (tokens_BT, targets_BTW, weights_BTW)]
        aux, found_BTW = jax.jit(both)(model, *arrays)
        want_W = -(weights_BTW * np.asarray(found_BTW)).sum((0, 1))
        left = W - len(aux["loss_offset"])  # the first offset may be the model's own
        np.testing.assert_allclose(aux["loss_offset"], want_W[left:], rtol=1e-5)
        assert left == (model.head.config.encoder != "none" or model.head.config.kind == "sequential")
        text_BT = rng.integers(0, known, (3, 9)).astype(np.int32)
        for offset in range(W):
            law_BV = laws(model, text_BT, np.array([2, 4, 3]), offset)
            np.testing.assert_allclose(np.exp(law_BV).sum(-1), 1, atol=1e-5)
