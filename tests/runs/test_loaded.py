"""A loaded run in a notebook: nothing stale is used whatever is edited, and wrong values are refused by name."""

import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mtp_jax
from mtp_jax.arrays import random_key
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.data.tokenizers.conventions import Conventions
from mtp_jax.decode import decoder as module
from mtp_jax.decode.law import gumbel
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import build_model
from mtp_jax.validate import ConfigError
from support import tiny

TEXT = "The 3rd of 3 small texts."


def make_run(seed=0):
    config = tiny.train_config(tiny.model_config(vocab_size=258), tiny.head_config(window=3, rank=2))
    with tiny.mesh() as mesh:
        return LoadedRun(jax.jit(lambda: build_model(config, random_key(seed)))(), ByteTokenizer(), config, mesh, 0, {})


@pytest.fixture(scope="module")
def other():
    return make_run(seed=1)


@pytest.fixture(scope="module")
def first():
    return make_run()


@pytest.fixture
def run(first):
    """One that a test may edit."""
    return dataclasses.replace(first, model=nnx.clone(first.model))


# Edited weights


def test_what_is_generated_follows_the_weights(run, other):
    """Be it a parameter, all of them, or a part that is swapped."""
    first, theirs = run.generate_tokens([[1, 2]], max_new_tokens=24), other.generate_tokens([[1, 2]], max_new_tokens=24)
    kept = run.decoder
    assert run.decoder is kept and not np.array_equal(first.logprobs, theirs.logprobs)
    nnx.update(run.model, nnx.state(other.model))
    same(run.generate_tokens([[1, 2]], max_new_tokens=24), theirs)
    scale = run.model.trunk.norm.scale
    run.model.trunk.norm.scale = nnx.Param(scale[...] * 0.5)
    halved = run.generate_tokens([[1, 2]], max_new_tokens=24)
    assert not np.array_equal(halved.logprobs, theirs.logprobs)
    run.model.trunk.norm.scale = scale
    same(run.generate_tokens([[1, 2]], max_new_tokens=24), theirs)


def test_an_edited_dtype_is_what_decoding_computes_in(run):
    assert run.decoder.config.dtype == "float32"
    run.model.config = dataclasses.replace(run.model.config, dtype="bfloat16")
    assert (
        run.decoder.config.dtype == "bfloat16" and run.decoder.trunk.blocks[0].attention.wo_NHD.w_NK.dtype == "bfloat16"
    )


def test_threads_get_the_text_of_one(run):
    want, found = run.generate(TEXT, max_new_tokens=9), []
    again = dataclasses.replace(run)
    threads = [threading.Thread(target=lambda: found.append(again.generate(TEXT, max_new_tokens=9))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [want] * 4


def test_a_model_as_training_has_it_is_laid_out_by_what_is_compiled_once(run, other):
    lay_out: Any = module._laid_out
    lay_out.clear_cache()
    with jax.set_mesh(run.mesh):
        outs = [mtp_jax.generate(model, [[1, 2]], max_new_tokens=4) for model in (run.model, other.model, run.model)]
    same(outs[0], outs[2])
    assert lay_out._cache_size() == 1


def same(a, b):
    for x, y in zip((*a.tokens, *a.logprobs), (*b.tokens, *b.logprobs), strict=True):
        np.testing.assert_array_equal(x, y)


# As it comes


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3}], ids=["greedy", "sampled"])
def test_a_stream_is_the_text_in_pieces_of_each_kind(other, options):
    spans, kinds, text = other.stream(TEXT, max_new_tokens=40, **options), [], ""
    for span in spans:
        assert jax.sharding.get_mesh().empty, "the caller's code does not run under the model's mesh"
        kinds.append(span.kind)
        text += "" if span.kind == "prompt" else span.text
    assert text == other.generate(TEXT, max_new_tokens=40, **options)
    out = other.generate_tokens([other.encode(TEXT)], max_new_tokens=40, **options)
    assert kinds[0] == "prompt" and (spans.drafts, spans.emitted) == (out.accepted.sum(), len(out.tokens[0]))
    stop = text[5:8]
    ended = "".join(span.text for span in other.stream(TEXT, max_new_tokens=40, stop=stop, **options))
    assert ended == TEXT + other.generate(TEXT, max_new_tokens=40, stop=stop, **options)


@pytest.mark.parametrize("prompt", [None, 3, b"x", ["text"], [{"content": "no role"}], "\ud83d"], ids=repr)
def test_what_cannot_be_streamed_is_refused_at_once(other, prompt):
    with pytest.raises(ConfigError):
        other.stream(prompt, max_new_tokens=3)


def test_a_stream_that_cannot_be_is_refused_at_once(other):
    with pytest.raises(ConfigError, match="context_length"):
        other.stream(TEXT, max_new_tokens=10**6)


# Values

IDS = [[1, 2], [3, 4]]
PROMPTS = [
    IDS,
    tuple(map(tuple, IDS)),
    np.array(IDS),
    np.array(IDS, np.uint8),
    jnp.array(IDS),
    map(tuple, IDS),
    (iter(row) for row in IDS),
    np.array(IDS, np.float32),
    [np.array([1, 2]), [np.int16(3), jnp.int32(4)]],
    [range(1, 3), range(3, 5)],
]


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: type(prompts).__name__)
def test_prompts_of_any_kind_are_what_they_say(other, prompts):
    same(other.generate_tokens(prompts, max_new_tokens=3), other.generate_tokens(IDS, max_new_tokens=3))


WRONG = [
    None,
    3,
    2.5,
    "text",
    b"bytes",
    [1, 2],
    [[1.5]],
    [["1"]],
    [None],
    {0: [1]},
    [{1: 2}],
    [[[1]]],
    [[2**40]],
    [[-1]],
]


@pytest.mark.parametrize("prompts", [*WRONG, [[258]], np.zeros((1, 1), bool)], ids=repr)
def test_prompts_that_are_none_are_refused(other, prompts):
    with pytest.raises(ConfigError, match=r"(?i)prompt"):
        other.generate_tokens(prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    "prompts", [None, 3, b"bytes", [b"x"], [TEXT, None], {"a": "b"}, ["\udc3d\ud83d"], [[1, 2]]], ids=repr
)
def test_texts_that_are_none_are_refused(other, prompts):
    with pytest.raises(ConfigError, match=r"(?i)prompt"):
        other.generate(prompts, max_new_tokens=3)


def test_texts_may_come_from_anything(other):
    want = other.generate([TEXT, "a"], max_new_tokens=3)
    assert other.generate((text for text in (TEXT, "a")), max_new_tokens=3) == want
    assert other.generate(np.array([TEXT, "a"]), max_new_tokens=3) == want


@pytest.mark.parametrize("top_k", [258, 10**10, 10**30, [259, 2**31]], ids=repr)
def test_more_than_there_are_keeps_all(other, top_k):
    options = dict(max_new_tokens=6, temperature=1.0, seed=3)
    same(other.generate_tokens(IDS, top_k=top_k, **options), other.generate_tokens(IDS, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 10**30},
        {"max_new_tokens": float("nan")},
        {"max_new_tokens": float("inf")},
        {"max_new_tokens": True},
        {"temperature": float("nan")},
        {"temperature": [0.5, "hot"]},
        {"top_p": float("nan")},
        {"top_p": "0.9"},
        {"seed": 2**32},
        {"seed": -1},
        {"k": 10**30},
        {"k": [0, 1.5]},
        {"stop_tokens": 5},
        {"stop_tokens": [10**30]},
        {"stop_tokens": "."},
        {"verifier": 7},
        {"top_k": [1, 2, 3]},
        {"beams": 4},
    ],
    ids=repr,
)
def test_options_that_cannot_be_are_refused_by_name(other, options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        other.generate_tokens(IDS, **{"max_new_tokens": 3, **options})


# The beginning of a text


def test_a_prompt_begins_once_with_what_the_model_wants(other):
    tokenizer = ByteTokenizer()
    tokenizer.conventions = Conventions(bos=7, stops=(9, 11))
    run = dataclasses.replace(other, tokenizer=tokenizer)
    assert run.stop_tokens == (9, 11) and run.encode("ab").tolist() == [7, 97, 98] == run.encode("\x07ab").tolist()
    out = run.generate_tokens([[7, 97, 98]], max_new_tokens=12, stop_tokens=())
    first = int(out.tokens[0][4])
    tokenizer.conventions = Conventions(bos=7, stops=(first,))
    ends = out.tokens[0].tolist().index(first)
    assert run.generate("ab", max_new_tokens=12) == tokenizer.decode(out.tokens[0][: ends + 1])


# JAX as people set it


SETTINGS = [
    ("jax_default_prng_impl", "unsafe_rbg"),
    ("jax_enable_x64", True),
    ("jax_numpy_dtype_promotion", "strict"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_text_does_not_depend_on_how_jax_is_set(other, setting):
    name, value = setting
    want, noise = other.generate(TEXT, max_new_tokens=9, temperature=1.0), gumbel_of(3)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        made = make_run(seed=1)
        assert made.generate(TEXT, max_new_tokens=9, temperature=1.0) == want
        assert {leaf.dtype for leaf in jax.tree.leaves(made.model)} == {
            leaf.dtype for leaf in jax.tree.leaves(other.model)
        }
        np.testing.assert_array_equal(gumbel_of(3), noise)
    finally:
        jax.config.update(name, before)


def gumbel_of(seed):
    with tiny.mesh():
        key_B = jax.vmap(random_key)(jnp.full((2,), seed, jnp.uint32))
        return np.asarray(gumbel(key_B, jnp.arange(6, dtype=jnp.int32).reshape(2, 3), 5))
