"""Prompts as they are read: at once or in parts, into caches that do not know how much will be decoded."""

import jax
import numpy as np
import pytest

from mtp_jax.decode import loop
from mtp_jax.decode.decoder import Decoder, for_decoding
from mtp_jax.decode.generate import generate
from mtp_jax.decode.slots import Slots
from mtp_jax.state import build_model
from support import tiny
from support.decoding import LAWS, VOCAB, WINDOW, ask, build, finish, same

RNG = np.random.default_rng(0)
# Parts of 16: rows that end in each of them, with the first and the last token of one.
LONG = [RNG.integers(0, VOCAB, n).tolist() for n in (49, 7, 32, 17)]


@pytest.fixture
def parts(monkeypatch):
    """Prompts are read 16 tokens at a time; what was, in the order in which it is traced."""
    widths, extend = [], Decoder.extend

    def record(self, tokens_BT, *args, **options):
        widths.append(tokens_BT.shape[1])
        return extend(self, tokens_BT, *args, **options)

    monkeypatch.setattr(Decoder, "extend", record)
    monkeypatch.setattr(loop, "SCORES", 1)
    loop.read.clear_cache()
    yield widths
    loop.read.clear_cache()


def everything(model, **options):
    """Greedy, sampled and filtered rows with drafts and without."""
    for k in (0, WINDOW - 1):
        yield finish(ask(model, LONG, k=k, **options))
        yield finish(ask(model, LONG, k=k, laws=LAWS, seed=3, **options))


@pytest.fixture(scope="module")
def at_once(models):
    with tiny.mesh():
        return list(everything(models.ready))


def test_prompts_that_are_read_in_parts_give_the_same_tokens_and_law(model, at_once, parts):
    for found, expected in zip(everything(model), at_once, strict=True):
        for name in ("tokens", "forwards", "accepted"):
            assert same(getattr(found, name), getattr(expected, name)), name
        np.testing.assert_allclose(np.concatenate(found.logprobs), np.concatenate(expected.logprobs), atol=1e-5)
    assert set(parts) - {1, WINDOW} == {16}


def test_what_is_read_in_parts_is_what_is_read_at_once(model, request):
    """The last hidden states, and every entry of the caches that is a prompt's."""
    d = ask(model, LONG)
    whole = loop.read(model, d.prompt_BP, d.length_B)
    request.getfixturevalue("parts")
    (x_BTD, tokens_BT, _), (cache, _) = loop.read(model, d.prompt_BP, d.length_B)
    np.testing.assert_allclose(x_BTD, whole[0][0], atol=1e-5)
    np.testing.assert_array_equal(tokens_BT, whole[0][1])
    for found, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(whole[1][0]), strict=True):
        for b, prompt in enumerate(LONG):
            np.testing.assert_allclose(found[b, :, : len(prompt)], expected[b, :, : len(prompt)], atol=1e-5)


def test_no_more_parts_are_read_than_the_longest_prompt_has(model, parts):
    """What lies behind it in the bucket is not even looked at: its place in the cache stays empty."""
    d = ask(model, [row[:33] for row in LONG])
    _, (cache, _) = loop.read(model, d.prompt_BP, d.length_B)
    assert d.prompt_BP.shape[1] == 64
    for array in jax.tree.leaves(cache):
        assert np.asarray(array)[0, :, 32].any() and not np.asarray(array)[:, :, 48:].any()


def test_in_parts_on_many_devices(at_once, parts):
    """Rows, heads and the vocabulary are split; shardings are checked where the loop over parts is traced."""
    with tiny.mesh(data=2, fsdp=2, tensor=2) as mesh:
        found = finish(ask(build(mesh).ready, LONG))
    assert same(found.tokens, at_once[2].tokens)
    assert 16 in parts


def test_slots_read_in_parts_too(model, at_once, parts):
    made = Slots(model, size=2, max_prompt=64, max_new=16, k=WINDOW - 1)
    numbers = [made.submit(prompt) for prompt in LONG]
    found = {number: [] for number in numbers}
    while made.busy:
        for number, progress in made.step(5).items():
            found[number].extend(progress.tokens)
    assert same([np.array(found[number]) for number in numbers], at_once[2].tokens)
    assert 16 in parts


def test_short_prompts_are_read_at_once(model):
    assert loop._part(model, 4, 1024) == 1024
    assert loop._part(model, 16, 4096) == 256
    assert loop._part(model, 1024, 4096) == loop.LEAST


@pytest.mark.slow
def test_how_much_is_decoded_does_not_compile_the_reading_anew(model):
    """Nor does k, or what is sampled: a reading is compiled for a batch and a bucket of prompts alone."""
    loop.read.clear_cache()
    for new in (3, 40, 100):
        generate(model, [[1, 2, 3], [4]], max_new_tokens=new, k=0)
    generate(model, [[1, 2, 3], [4]], max_new_tokens=3, k=2, temperature=0.5, top_k=3)
    assert loop.read._cache_size() == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_prompt_takes_little_memory(mesh, dtype):
    """8,192 tokens through a layer as wide as one of Llama 3 8B, whose scores would take 8 GiB."""
    shape = dict(d_model=4096, d_ff=14336, num_layers=1, num_heads=32, num_kv_heads=8)
    config = tiny.train_config(tiny.model_config(**shape, dtype=dtype), tiny.head_config(factors="lowrank"))
    decoder = jax.eval_shape(lambda: for_decoding(build_model(config, jax.random.key(0))))
    prompt_BP, length_B = tiny.shard(np.zeros((1, 8192), np.int32)), tiny.shard(np.ones(1, np.int32))
    memory = loop.read.lower(decoder, prompt_BP, length_B).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * 2**30
