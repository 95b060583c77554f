"""Gates of a head: one that is right passes them all, and each fails on the fault that it is there for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from mtp_jax import cli
from mtp_jax.data.prompts import some_prompts
from mtp_jax.data.store import Store
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.expectation import Blocks
from mtp_jax.decode.generate import generate
from mtp_jax.distill.hidden import cache_hidden
from mtp_jax.heads import factors
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.runs.base import open_base
from mtp_jax.train import gates
from mtp_jax.train.evaluate import store_of
from support import tiny
from support.compilation import quick
from support.decoding import PROMPTS, build

K, NEW = 3, 16


@pytest.fixture(scope="module")
def run(head_run):
    with quick():
        yield mtp_jax.load(head_run)


@pytest.fixture(scope="module")
def cache(base, run, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cache"
    cache_hidden(mtp_jax.load(base[0]), open_base(base[0]), store_of(run), path, seq_len=base[1].seq_len)
    return Store.open(path)


@pytest.fixture(scope="module")
def texts(run):
    with jax.set_mesh(run.mesh):
        prompts = some_prompts(store_of(run), 6, 8)
        return gates._decode(run, run.decoder, prompts, 0.7, K, NEW)


def test_a_head_that_is_right_passes(run, cache):
    found = list(gates.gates(run, cache, some_prompts(cache, 6, 8), (0.0, 0.7), K, NEW))
    assert [gate.name for gate in found] == [
        "start", "shuffled", "cache", "decoding at 0", "decoding at 0.7", "greedy",
    ]  # fmt: skip
    assert all(gate.passed for gate in found), found
    assert "6 of 6 texts are the same" in found[-1].found


def test_a_head_that_begins_at_random_fails(run, texts, monkeypatch):
    fresh = factors.init_weight
    monkeypatch.setattr(factors, "_identity", lambda rngs, name, shape, noise=0.0: fresh(rngs, name, shape))
    with jax.set_mesh(run.mesh):
        assert gates.start(run, texts, K).passed is False


def test_a_head_that_peeks_fails(run, texts, monkeypatch):
    """Its law of a draft is sure of the token that stands there."""

    def peek(self, t, k):
        for logq_BV, token_B in drafts(self, t, k):
            yield jnp.log(jax.nn.one_hot(token_B, logq_BV.shape[-1]) + 1e-6), token_B

    drafts, hits = Blocks.drafts, gates._hits.__wrapped__
    monkeypatch.setattr(Blocks, "drafts", peek)
    monkeypatch.setattr(gates, "_hits", jax.jit(lambda *args, k: hits(*args, k=k), static_argnames="k"))
    with jax.set_mesh(run.mesh):
        found = gates.shuffled(run, texts, K)
    assert found.passed is False and "hit 1.000 1.000 1.000" in found.found


def test_states_of_another_row_fail(run, cache):
    with jax.set_mesh(run.mesh):
        assert gates.cached(run, cache).passed
        wrong = Store.open(cache.path)
        states_NTD = np.array(wrong.train.hidden)
        object.__setattr__(wrong.train, "hidden", np.roll(states_NTD, 1, axis=0))
        assert gates.cached(run, wrong).passed is False


def test_a_normaliser_of_another_law_fails(run, cache):
    with jax.set_mesh(run.mesh):
        wrong = Store.open(cache.path)
        object.__setattr__(wrong.train, "normaliser", np.array(wrong.train.normaliser) + 0.1)
        assert gates.cached(run, wrong).passed is False


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_decoding_with_another_head_fails(temperature, mesh, monkeypatch):
    """Drafts behind a token that was not chosen cost acceptance, and no token."""
    model = build(mesh)
    verifier = "token" if temperature else "greedy"
    config = DecodeConfig(NEW, temperature, k=K, verifier=verifier)
    prompts = PROMPTS * 16

    def found():
        made = generate(model.ready, prompts, **vars(config))
        return gates.decoding(model.stacked, [gates.Decoded(config, prompts, made, len(prompts))], temperature)

    assert found().passed
    begin = MixtureHead.begin

    def deaf(self, seen, token_B, **options):
        return begin(self, seen, (token_B + 1) % tiny.VOCAB, **options)

    made = generate(model.ready, prompts, **vars(config))
    monkeypatch.setattr(MixtureHead, "begin", deaf)
    jax.clear_caches()
    wrong = generate(model.ready, prompts, **vars(config))
    monkeypatch.undo()
    jax.clear_caches()
    if not temperature:
        assert all(map(np.array_equal, made.tokens, wrong.tokens))
    decoded = [gates.Decoded(config, prompts, wrong, len(prompts))]
    assert gates.decoding(model.stacked, decoded, temperature).passed is False


def test_a_token_that_drafts_changed_fails(texts):
    assert gates.greedy(texts, texts).passed
    changed = [row.copy() for row in texts[0].made.tokens]
    changed[1][3] += 1
    made = dataclasses.replace(texts[0].made, tokens=changed)
    found = gates.greedy(texts, [dataclasses.replace(texts[0], made=made)])
    assert found.passed is False and "5 of 6" in found.found


def test_a_run_without_a_base_has_no_start_and_no_cache(trained, capsys):
    cli.main(["eval", str(trained), "--batches", "1", "--temperatures", "--prompts", "4", "--gates"])
    out = capsys.readouterr().out
    found = {gate["name"]: gate["passed"] for gate in json.loads(out.splitlines()[-1])["gates"]}
    assert found == {"start": None, "shuffled": True, "cache": None, "decoding at 0": True, "greedy": True}
    assert "gate start: no need: the run has no base" in out


def test_a_gate_that_fails_is_the_exit_status(trained, monkeypatch, capsys):
    monkeypatch.setattr(gates, "SHUFFLED", -1.0)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["eval", str(trained), "--batches", "1", "--temperatures", "--prompts", "4", "--gates"])
    assert "gate shuffled: FAILED" in capsys.readouterr().out
