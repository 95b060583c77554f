"""A shortlist: the law by brute force, the loss against autodiff on any mesh, and decoding that loses nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mtp_jax
from mtp_jax.data.config import DataConfig
from mtp_jax.data.store import Documents
from mtp_jax.decode import loop
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.generate import generate
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.heads.shortlist import most_frequent, put_listed
from mtp_jax.state import split
from mtp_jax.train.evaluate import named
from mtp_jax.train.loop import train
from mtp_jax.validate import from_dict, to_dict
from support import tiny

V, W, R = tiny.VOCAB, tiny.WINDOW, tiny.RANK
IDS = (1, 2, 5, 6, 11, 17, 30, 31)
TERMS = {"gamma": 0.8, "z_weight": 0.1}
both_factors = pytest.mark.parametrize("factors", ["shared", "lowrank"])


def make(factors="shared", **changes):
    """A model with a gate that matters, under the mesh in scope."""
    config = tiny.train_config(
        tiny.model_config(num_kv_heads=4),
        tiny.head_config(factors=factors, shortlist=len(IDS), balance="none", **changes),
    )
    graph, params = split(tiny.make_model(config, seed=1))
    model = nnx.merge(graph, put_listed(params, np.array(IDS)))
    gate = model.head.circuit.gate_DR
    gate_DR = np.random.default_rng(0).standard_normal(gate[...].shape).astype(np.float32)
    gate[...] = jax.device_put(gate_DR, gate[...].sharding)
    return config, model


def seen_of(model, x_BTD):
    """Hidden states as what the trunk saw; a mixture reads no tokens."""
    return model.seen(x_BTD, jnp.zeros(x_BTD.shape[:2], jnp.int32))


def hidden(config, seed=0):
    shape = config.data.batch_size, config.data.seq_len, config.model.d_model
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays(config, seed=0):
    """Hidden states, targets of which many windows are listed from the second on, and weights."""
    rng = np.random.default_rng(seed)
    targets_BTW = rng.integers(0, V, (*hidden(config).shape[:2], W)).astype(np.int32)
    targets_BTW[::2, :, 1:] = rng.choice(IDS, targets_BTW[::2, :, 1:].shape)
    valid_BTW = np.arange(W) < rng.integers(0, W + 1, (*targets_BTW.shape[:2], 1))
    return hidden(config, seed), targets_BTW, (valid_BTW / valid_BTW.sum((0, 1))).astype(np.float32)


def brute_logp(model, x_BTD):
    """log p_rs over the whole vocabulary, `[B, T, R, W, V]`: -inf where a later offset does not know a token."""
    p = {n: np.asarray(w, np.float64) for n, w in model.head.params(model.unembed_VD[...]).items()}
    wide = np.asarray(x_BTD, np.float64)
    if "map_DRWD" in p:
        logits = np.einsum("btd,drwe,ve->btrwv", wide, p["map_DRWD"], p["unembed_VD"], optimize=True)
    else:
        logits = np.einsum("btd,dwe,ve->btwv", wide, p["map_DWD"], p["unembed_VD"], optimize=True)[:, :, None]
        own = wide, p["down_DRWE"], p["up_ED"], p["unembed_VD"]
        logits = logits + np.einsum("btd,drwe,ec,vc->btrwv", *own, optimize=True)
    unlisted = np.setdiff1d(np.arange(V), IDS)
    logits[:, :, :, 1:, unlisted] = -np.inf
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@both_factors
def test_the_law_is_that_of_factors_that_know_listed_tokens_alone(factors):
    with tiny.mesh():
        config, model = make(factors)
        x_B1D, chain = hidden(config)[:, :1], np.array([[3, 5, 30, 1]] * config.data.batch_size)

        def laws(model, x_B1D, chain_BW):
            head, seen = model.head, seen_of(model, x_B1D)
            law_B1V, memo = model.target(seen)
            found, draft = [law_B1V[:, 0]], head.begin(seen, chain_BW[:, 0], window=W, memo=memo[:, 0])
            for s in range(1, W):
                found.append(head.next_log_probs(draft))
                draft = head.condition(draft, chain_BW[:, s])
            return jnp.stack(found, axis=1)

        got, ready = (
            np.asarray(jax.jit(laws)(m, tiny.shard(x_B1D), tiny.shard(chain))) for m in (model, for_decoding(model))
        )
        joint = np.asarray(model.head.log_weights(tiny.shard(x_B1D)), np.float64)[:, 0]
        logp = brute_logp(model, x_B1D)[:, 0]
    for s in range(W):
        weights = np.exp(joint) / np.exp(joint).sum(-1, keepdims=True)
        want = np.einsum("br,brv->bv", weights, np.exp(logp[:, :, s]))
        np.testing.assert_allclose(np.exp(got[:, s]), want, atol=1e-6)
        np.testing.assert_allclose(np.exp(ready[:, s]), want, atol=1e-6)
        assert (np.isneginf(got[:, s]).sum(-1) == (V - len(IDS) if s else 0)).all()
        joint = joint + logp[np.arange(len(joint)), :, s, chain[:, s]]


def reference(model, x_BTD, targets_BTW, weights_BTW):
    """The loss, its offsets and what is listed, in float64 from the brute law."""
    listed = np.cumprod(np.isin(targets_BTW, IDS) | (np.arange(W) == 0), axis=-1).astype(bool)
    logp = np.take_along_axis(brute_logp(model, x_BTD), targets_BTW[:, :, None, :, None], axis=-1)[..., 0]
    joint = np.asarray(model.head.log_weights(tiny.shard(x_BTD)), np.float64)[..., None] + np.cumsum(logp, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        after = np.log(np.exp(joint).sum(2))
        each = np.where(listed, after - np.concatenate([np.zeros_like(after[..., :1]), after[..., :-1]], -1), -np.inf)
    return np.where(listed, -each, 0), each, listed


@both_factors
def test_the_loss_is_that_of_the_listed_targets_and_means_are_over_them(factors):
    with tiny.mesh():
        config, model = make(factors)
        x_BTD, targets_BTW, weights_BTW = arrays(config)
        on_mesh = [tiny.shard(a) for a in (x_BTD, targets_BTW, weights_BTW)]
        loss, aux = jax.jit(lambda model, x, *a: model.head.loss(seen_of(model, x), *a))(model, *on_mesh)
        each = jax.jit(lambda model, x, y: model.head.log_likelihood(seen_of(model, x), y))(model, *on_mesh[:2])
        nll, want, listed = reference(model, x_BTD, targets_BTW, weights_BTW)
    np.testing.assert_allclose(each, want, atol=2e-5)
    np.testing.assert_allclose(aux["loss_offset"], (weights_BTW * nll).sum((0, 1)), atol=1e-5)
    np.testing.assert_allclose(loss, (weights_BTW * nll).sum(), atol=1e-5)
    np.testing.assert_allclose(aux["listed"], (weights_BTW * listed).sum((0, 1)), atol=1e-6)
    assert 0.3 < aux["listed"][1] < 0.9
    means = named(jax.device_get(aux))
    of_listed = (weights_BTW * nll).sum((0, 1)) / (weights_BTW * listed).sum((0, 1))
    np.testing.assert_allclose([means[f"loss_offset_{s + 1}"] for s in range(W)], of_listed, rtol=1e-5)


@pytest.mark.parametrize(
    "factors, shape", [("shared", (1, 1, 1)), ("shared", (2, 1, 4)), ("lowrank", (1, 1, 1)), ("lowrank", (2, 2, 2))]
)
def test_gradients_are_those_of_autodiff_of_all_logits(factors, shape):
    """In float64, of every parameter; the table's has parts from the first offset and from the later ones."""

    def naive(model, x_BTD, targets_BTW, weights_BTW):
        head = model.head
        columns_BTW, listed_BTW = head.shortlist.targets(targets_BTW)
        logits = head.logits(seen_of(model, x_BTD))
        logp = [
            jnp.sum(jax.nn.log_softmax(one) * jax.nn.one_hot(columns_BTW[:, :, None, s], one.shape[-1]), axis=-1)
            for s, one in enumerate(logits)
        ]
        joint = jax.nn.logsumexp(head.log_weights(x_BTD)[..., None] + jnp.cumsum(jnp.stack(logp, -1), -1), axis=2)
        each = joint - jnp.pad(joint[..., :-1], ((0, 0), (0, 0), (1, 0)))
        square = jnp.stack([jnp.mean(jax.nn.logsumexp(one, axis=-1) ** 2, axis=2) for one in logits], axis=-1)
        return jnp.sum(
            weights_BTW * listed_BTW * (TERMS["z_weight"] * square - each * TERMS["gamma"] ** np.arange(W)[None, None])
        )

    def double(tree):
        return jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, tree)

    def gradients(loss, mesh_shape):
        with tiny.mesh(*mesh_shape):
            config, model = make(factors, **TERMS)
            values = [tiny.shard(a) for a in double(arrays(config))]
            found = split(jax.jit(jax.grad(loss, allow_int=True))(double(model), *values))[1]
            assert found["head"].pop("shortlist")["listed_n"].dtype == jax.dtypes.float0, "ids have no gradient"
            return jax.device_get(found)

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        got = gradients(lambda model, x, *a: model.head.loss(seen_of(model, x), *a)[0], shape)
        want = gradients(naive, (1, 1, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max()), got, want)


@both_factors
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_decoding_is_lossless(factors, options):
    """Tokens that are not listed are decoded as ever, and drafts are accepted all the same."""
    with tiny.mesh():
        model = for_decoding(make(factors)[1])
        prompts = [[5, 1, 9], [4, 30, 6, 7], [3]]
        plain, drafted = (generate(model, prompts, max_new_tokens=40, k=k, **options) for k in (0, W - 1))
    for a, b in zip(plain.tokens, drafted.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.setdiff1d(np.concatenate(plain.tokens), IDS).size and drafted.accepted.sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.2, "top_k": 5, "verifier": "token"}],
    ids=["greedy", "coupled", "token"],
)
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)])
def test_drafts_are_chosen_among_listed_tokens_as_among_all(options, shape, monkeypatch):
    """With the same noise, filters and probabilities."""
    found, prompts, listed = [], [[5, 1, 9], [4, 30, 6, 7], [3], [2, 2]], MixtureHead.next_listed

    def spread(self, draft):
        logq_Bn, shortlist = listed(self, draft)
        return shortlist.spread(logq_Bn) if shortlist else logq_Bn, None

    with tiny.mesh(*shape):
        model = for_decoding(make()[1])
        for method in (spread, listed):
            monkeypatch.setattr(MixtureHead, "next_listed", method)
            for function in (loop.begin, loop.run):
                function.clear_cache()
            found.append(generate(model, prompts, max_new_tokens=24, k=W - 1, seed=3, **options))
    all_of_them, among = found
    assert among.accepted.sum() and (among.accepted == all_of_them.accepted).all()
    for a, b in zip(among.tokens, all_of_them.tokens, strict=True):
        np.testing.assert_array_equal(a, b)


def test_work_falls_with_the_list():
    head, model = HeadConfig(factors="shared", window=4, rank=2, shortlist=100), tiny.model_config(vocab_size=1000)
    d = model.d_model
    gate = 2 * d * 2
    assert MixtureHead.flops(head, model, frozen=False)[0] == gate + 2 * 2 * d * (1000 + 3 * 100 + 4 * d)
    lowrank = dataclasses.replace(head, factors="lowrank", factor_width=8)
    assert MixtureHead.flops(lowrank, model, frozen=False)[0] == gate + 2 * (d + 2 * 8) * (1000 + 3 * 100 + 4 * d)


def test_the_most_frequent_tokens():
    tokens = np.array([7, 7, 7, 2, 2, 4, 4, 9, 0])
    ids, share = most_frequent(Documents("train", tokens, np.array([0, 9]), ["one"]).frequencies(12), 3)
    assert ids.tolist() == [2, 4, 7] and share == pytest.approx(7 / 9)
    ids, share = most_frequent(np.zeros(12), 2)
    assert ids.tolist() == [0, 1] and share == 0


@pytest.mark.slow
def test_a_run_finds_its_list_keeps_it_and_goes_on(tmp_path, capsys):
    text = "abcabcabcabd" * 40
    (tmp_path / "corpus").mkdir()
    for i in range(30):
        (tmp_path / "corpus" / f"{i}.txt").write_text(text + str(i))
    data = DataConfig("text", str(tmp_path / "corpus" / "*"), seq_len=16, batch_size=8, cache_dir=str(tmp_path / "c"))
    head = tiny.head_config(factors="shared", shortlist=4)
    config = dataclasses.replace(tiny.train_config(tiny.model_config(vocab_size=264), head), data=data, steps=2)
    metrics = train(config, tmp_path / "run")
    assert "shortlist: the 4 most frequent of 264 tokens are 99." in capsys.readouterr().out
    assert 0.8 < metrics["listed_2"] <= 1 and metrics["listed_1"] == pytest.approx(1)
    run = mtp_jax.load(tmp_path / "run")
    assert run.config.head.shortlist == 4
    assert run.model.head.shortlist.listed_n[...].tolist() == sorted(b"abcd")
    assert from_dict(type(config), to_dict(run.config)) == run.config
    out = run.generate_tokens([run.tokenizer.encode("abc")], max_new_tokens=8)
    assert len(out.tokens[0]) == 8
    train(dataclasses.replace(config, steps=3), tmp_path / "run", resume=True)
    resumed = mtp_jax.load(tmp_path / "run")
    assert resumed.step == 3 and resumed.model.head.shortlist.listed_n[...].tolist() == sorted(b"abcd")
