"""What is compiled for decoding: how often, how wide, and what is read, kept and copied in it."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from mtp_jax.decode import decoding as module
from mtp_jax.decode import loop
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, Packed, unpacked
from mtp_jax.decode.decoding import ENDLESS, Decoding, bucket
from mtp_jax.decode.generate import generate
from mtp_jax.heads.mixture import MixtureHead
from support import tiny
from support.decoding import LAWS, NEW, PROMPTS, VOCAB, WINDOW, ask, build, drive, finish, prefilled, same


def test_another_request_in_the_same_buckets_does_not_compile_again(model):
    def decode(prompts, **options):
        return generate(model, prompts, **{"max_new_tokens": NEW, "stop_tokens": [31], **options})

    laws = dict(temperature=0.7, top_k=5, top_p=0.9)
    decode(PROMPTS), decode(PROMPTS, **laws), finish(ask(model)), finish(ask(model), chunk=1)
    drive(ask(model), lambda count_B: np.zeros((4, WINDOW - 1)))
    compiled = [f._cache_size() for f in (loop.run, loop.read, loop.begin)]
    decode([[1, 2], [3], [4, 5, 6], [7]])
    decode([[1] * 16] * 4, max_new_tokens=9, seed=11, stop_tokens=[2])
    decode([[1] * 5] * 4, temperature=1.9, top_k=0, top_p=0.3, seed=5)
    decode([[1] * 5] * 4, temperature=0.3, top_k=3, top_p=1.0)
    assert [f._cache_size() for f in (loop.run, loop.read, loop.begin)] == compiled
    assert {bucket(n) for n in range(1, 17)} == {16} and bucket(17) == 32


def test_a_decoder_is_packed_once_and_its_structure_compared_by_identity(model, narrow):
    """What is compiled for one decoder is found again for another of the same shapes, without looking into either."""
    first, second = Decoding(model, PROMPTS, DecodeConfig(NEW)), Decoding(model, PROMPTS, DecodeConfig(NEW))
    again = jax.tree.map(lambda a: a + 0, model)
    structures = [Packed.of(decoder).structure for decoder in (model, model, again, narrow)]
    assert structures[0] is structures[1] is structures[2] is not structures[3]
    jax.tree.map(np.testing.assert_array_equal, unpacked(Packed.of(again)), model)
    finish(first)
    compiled = loop.run._cache_size()
    finish(second), finish(Decoding(again, PROMPTS, DecodeConfig(NEW)))
    assert loop.run._cache_size() == compiled


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
    decoding = Decoding(model, PROMPTS[:rows], DecodeConfig(max_new_tokens=112, k=k))
    decoding.plan = plan = dataclasses.replace(decoding.plan, slots=1024)
    state = decoding.state
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.cache))
    compiled = loop.run.lower(plan, model, state, decoding.sampling, decoding.stops_n, np.int32(1)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    # One layer's scores, before and after they are transposed, and of bfloat16 its keys and values as numbers.
    scores = 2 * rows * (k + 1) * model.config.num_heads * plan.slots * 4
    numbers = size // model.config.num_layers if dtype == "bfloat16" else 0
    assert k or memory.temp_size_in_bytes <= 1.1 * (scores + numbers)
    shape = ",".join(map(str, state.cache[0][0].shape))
    assert not re.findall(rf"= \w+\[{shape}\]\S* (?:copy|transpose|convert)\(", compiled.as_text())


def test_attention_reads_a_part_and_the_output_is_that_of_the_whole_cache(model, monkeypatch):
    """At once and in chunks, through every part that the rows grow out of. Sums of another length round anew."""
    decoding = ask(model, [[5, 1, 9], [4], [3, 8], [7, 20]], max_new_tokens=64, temperature=1.0)
    assert decoding.attended is None  # small: one loop for all
    expected, plans, run = finish(decoding), [], loop.run
    monkeypatch.setattr(module, "SMALLEST_ATTENDED", 16)
    monkeypatch.setattr(module, "run", lambda plan, *args: plans.append(plan) or run(plan, *args))
    for chunk in (ENDLESS, 3):
        plans.clear()
        out = finish(decoding, chunk=chunk)
        assert list(dict.fromkeys(plan.attended for plan in plans)) == [16, 32, None]
        assert chunk == 3 or len(plans) == 3
        for name in ("tokens", "forwards", "accepted"):
            assert same(getattr(out, name), getattr(expected, name)), name
        np.testing.assert_allclose(np.concatenate(out.logprobs), np.concatenate(expected.logprobs), atol=1e-5)


def test_without_drafts_the_loop_is_one_token_wide(model, monkeypatch):
    widths, drafted = [], []
    extend, begin = Decoder.extend, MixtureHead.begin

    def record(self, tokens_BT, *args, **options):
        widths.append(tokens_BT.shape[1])
        return extend(self, tokens_BT, *args, **options)

    def record_draft(self, *args, **options):
        drafted.append(True)
        return begin(self, *args, **options)

    monkeypatch.setattr(Decoder, "extend", record)
    monkeypatch.setattr(MixtureHead, "begin", record_draft)
    for k, expected in ((0, {1}), (WINDOW - 1, {WINDOW})):
        decoding = ask(model, k=k)
        state = decoding.state
        widths.clear()
        drafted.clear()
        jax.make_jaxpr(lambda *args, d=decoding: loop.step(d.plan, *args, d.sampling, d.stops_n))(model, state)
        assert set(widths) == expected
        assert bool(drafted) == (k > 0)


def test_only_what_the_verifier_needs_is_kept(model):
    """No law of a draft but where probabilities are compared, no noise at temperature 0, nothing without drafts."""
    for verifier, noise, q in (("greedy", 0, 0), ("coupled", 4, 0), ("token", 4, 3), ("block", 4, 3)):
        for k in (WINDOW - 1, 0):
            state = prefilled(ask(model, verifier=verifier, temperature=float(noise > 0), k=k))
            assert (state.noise_BTV is not None) == bool(noise) and (state.logq_BkV is not None) == bool(q and k)
            assert state.noise_BTV is None or state.noise_BTV.shape == (4, k + 1, VOCAB)
            assert state.logq_BkV is None or state.logq_BkV.shape == (4, k, VOCAB)


@pytest.mark.parametrize("verifier", ["greedy", "coupled", "token", "block"])
def test_decoding_traces_on_a_sharded_mesh(verifier):
    """Where a wrong sharding is an error: the vocabulary, which top-k searches and the noise spans, is split."""
    with tiny.mesh(data=2, tensor=2) as mesh:
        model = build(mesh).ready
        laws = None if verifier == "greedy" else LAWS
        decoding = ask(model, laws=laws, verifier=verifier)
        state = prefilled(decoding)
        run = functools.partial(loop.run, decoding.plan)
        out = jax.eval_shape(run, model, state, decoding.sampling, decoding.stops_n, 1)
        assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, state)


def test_prepare_casts_the_matrices_once():
    with tiny.mesh() as mesh:
        model = build(mesh, dtype="bfloat16").ready
    for path, weight in jax.tree_util.tree_leaves_with_path(model):
        wide = any(name in jax.tree_util.keystr(path) for name in ("scale", "gate_DR"))
        assert weight.dtype == ("float32" if wide else "bfloat16"), jax.tree_util.keystr(path)
