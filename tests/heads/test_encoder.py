"""Heads whose first offset is the model's own, mixtures behind an encoder and sequential ones: what they know of the
token that was chosen, how they begin, and their loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.registry import check_head
from mtp_jax.losses import tiles
from mtp_jax.validate import ConfigError
from support import tiny
from support.heads import WINDOWS_NW, D, V, W, hidden, make, make_targets, run, seen

pytestmark = pytest.mark.usefixtures("mesh")

CASES = {
    "shared": dict(factors="shared"),
    "residual": dict(factors="residual"),
    "lowrank": dict(factors="lowrank"),
    "full, one component": dict(factors="full", circuit="independent", rank=1),
    "lora": dict(factors="lora"),
    "shortlist": dict(factors="shared", shortlist=3),
    "hmm": dict(factors="full", circuit="hmm"),
    "btree": dict(factors="lowrank", circuit="btree"),
    "sequential": dict(kind="sequential", encoder="none"),
    "sequential, per offset, shortlist": dict(kind="sequential", encoder="none", per_offset=True, shortlist=3),
}
every_case = pytest.mark.parametrize("case", CASES)


def encoded(case, **changes):
    return make(**{"encoder": "token", "target": "ntp", **CASES[case], **changes})


def folded(head, given, token_B, targets_BW):
    """What drafting says of every token behind each first one, `[B, W - 1, V]`."""
    draft, laws = head.begin(given, token_B, window=W), []
    for s in range(1, W):
        laws.append(head.next_log_probs(draft))
        if s + 1 < W:
            draft = head.condition(draft, targets_BW[:, s])
    return jnp.stack(laws, axis=1)


@every_case
def test_the_likelihood_is_what_drafting_folds_and_all_windows_sum_to_one(case):
    model = encoded(case)
    count = len(WINDOWS_NW)
    x_B1D = np.repeat(hidden(0, 1, 1, D), count, axis=0)

    def both(model, x_B1D, targets_B1W):
        given, token_B = seen(model, x_B1D), targets_B1W[:, 0, 0]
        own_BV = model.next_token(x_B1D)[:, 0]
        return (
            model.head.log_likelihood(given, targets_B1W)[:, 0],
            own_BV,
            folded(model.head, given, token_B, targets_B1W[:, 0]),
        )

    likelihood_BW, own_BV, laws_BWV = map(np.asarray, run(both, model, x_B1D, WINDOWS_NW[:, None]))
    picked = [own_BV, *laws_BWV.swapaxes(0, 1)]
    want_BW = np.stack([law[np.arange(count), WINDOWS_NW[:, s]] for s, law in enumerate(picked)], axis=1)
    listed = np.isfinite(likelihood_BW)
    np.testing.assert_allclose(likelihood_BW[listed], want_BW[listed], atol=2e-5)
    assert listed.all() == ("shortlist" not in case) and (listed | (likelihood_BW == -np.inf)).all()
    np.testing.assert_allclose(np.exp(likelihood_BW.sum(-1, dtype=np.float64)).sum(), 1, atol=1e-5)
    second = np.exp(laws_BWV[:, 0].astype(np.float64))
    firsts = [second[WINDOWS_NW[:, 0] == token][0] for token in range(V)]
    assert np.abs(np.diff(firsts, axis=0)).max() > 1e-3, "the law of the second token depends on the first"


@every_case
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_loss_is_the_weighted_likelihood_behind_the_first_offset(case, gamma, monkeypatch):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", (200, 200))  # a position in each tile
    model = encoded(case, gamma=gamma, balance="none")
    x_BTD, (targets_BTW, weights_BTW) = hidden(1, 2, 5, D), make_targets(1, 2, 5)
    if "shortlist" in case:
        targets_BTW = targets_BTW % 3

    def losses(model, x_BTD, targets_BTW, weights_BTW):
        def naive(x_BTD):
            likelihood_BTW = model.head.log_likelihood(seen(model, x_BTD), targets_BTW)
            of_W = -jnp.sum(weights_BTW * likelihood_BTW, axis=(0, 1))
            return jnp.sum(of_W[1:] * gamma ** jnp.arange(1, W)), of_W

        loss, aux = model.head.loss(seen(model, x_BTD), targets_BTW, weights_BTW)
        return loss, aux["loss_offset"], *naive(x_BTD)

    loss, of_offsets, want, want_W = run(losses, model, x_BTD, targets_BTW, weights_BTW)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(of_offsets, want_W[1:], rtol=1e-5)


@every_case
def test_only_the_offsets_are_weighed_by_gamma(case):
    """What the losses by offset do not explain does not depend on it: z, and the balance of components."""
    x_BTD, (targets_BTW, weights_BTW) = hidden(1, 2, 5, D), make_targets(1, 2, 5)

    def rest(gamma):
        model = encoded(case, gamma=gamma, balance="squared", z_weight=0.3)
        both = lambda model, *arrays: model.head.loss(seen(model, arrays[0]), *arrays[1:])  # noqa: E731
        loss, aux = run(both, model, x_BTD, targets_BTW, weights_BTW)
        return loss - np.sum(np.asarray(aux["loss_offset"]) * gamma ** np.arange(1, W))

    assert rest(1.0) > 0.1
    np.testing.assert_allclose(rest(0.5), rest(1.0), rtol=1e-4)


@pytest.mark.parametrize(
    "case, rank",
    [
        ("shared", 1),
        ("shared", 3),
        ("residual", 1),
        ("residual", 3),
        ("lowrank", 1),
        ("lowrank", 3),
        ("shortlist", 1),
        ("shortlist", 3),
    ],
)
def test_drafts_begin_as_the_models_own_law(case, rank):
    """Before the first step the token behind h is drafted as the model itself would have it there: exactly, but for
    `shared` factors of several components, whose noise is that of the default here."""
    changes = dict(encoder="token", target="ntp", window=3, rank=rank, init_noise=HeadConfig.init_noise)
    head = tiny.head_config(**{**CASES[case], **changes})
    model = tiny.make_model(tiny.train_config(head=head))
    x_B1D = tiny.shard(hidden(3, 4, 1, 16))

    def laws(model, x_B1D, token_B):
        return model.next_token(x_B1D)[:, 0], model.head.next_log_probs(
            model.head.begin(seen(model, x_B1D), token_B, window=3)
        )

    own_BV, draft_BV = map(np.asarray, jax.jit(laws)(model, x_B1D, tiny.shard(np.arange(4, dtype=np.int32))))
    if case == "shortlist":  # of the ids that it has
        own_BV = own_BV[:, :3] - np.log(np.exp(own_BV[:, :3]).sum(-1, keepdims=True))
        assert (draft_BV[:, 3:] == -np.inf).all()
        draft_BV = draft_BV[:, :3]
    exact = rank == 1 or head.factors == "lowrank"
    np.testing.assert_allclose(draft_BV, own_BV, atol=1e-5 if exact else 0.1)
    assert np.sum(np.exp(own_BV) * (own_BV - draft_BV), axis=-1).max() < 1e-2
    assert exact or np.abs(draft_BV - own_BV).max() > 1e-4


@pytest.mark.parametrize("factors", ["shared", "residual", "lowrank"])
def test_components_differ_after_a_step(factors):
    head = tiny.head_config(factors=factors, rank=3, encoder="token", target="ntp", window=3)
    config = tiny.train_config(head=head)
    model = tiny.make_model(config)
    batch = tiny.make_batch(config)

    def step(model, batch):
        weights_BTW = jnp.ones_like(batch["targets_BTW"], jnp.float32)
        grads = jax.grad(lambda model: model.loss(batch, weights_BTW)[0], allow_int=True)(model)
        moved = jax.tree.map(lambda w, d: w - 0.01 * jnp.sign(d) if d.dtype == w.dtype else w, model, grads)  # as Adam
        given = moved.see(batch["tokens_BT"], batch["segments_BT"])
        encoded = moved.head._encoded(given, batch["targets_BTW"][..., 0])
        return jax.nn.log_softmax(moved.head.mixture.logits(encoded)[0], axis=-1)

    logp_BTRV = np.asarray(jax.jit(step)(model, batch))
    for r, s in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(logp_BTRV[:, :, r] - logp_BTRV[:, :, s]).max() > 1e-3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"target": "marginal"}, "encoder is token and target is marginal; the first offset is then the model's own"),
        ({"window": 1}, "encoder is token and window is 1; it serves the offsets after the first"),
        ({"encoder": "tokens"}, "HeadConfig.encoder is 'tokens'"),
        ({"kind": "none", "window": 1}, "encoder is token and kind is none"),
        ({"factors": "full", "shortlist": 3}, "shortlist is 3 and factors is full"),
    ],
)
def test_what_an_encoder_does_not_go_with_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        check_head(tiny.head_config(**{"encoder": "token", "target": "ntp", "factors": "shared", **changes}))


def test_the_gate_is_that_of_drafting():
    model = encoded("shared")
    x_BTD, next_BT = hidden(3, 4, 1, D), np.arange(4, dtype=np.int32)[:, None]

    def both(model, x_BTD, next_BT):
        given = seen(model, x_BTD)
        return model.head.gate(given, next_BT)[:, 0], model.head.begin(given, next_BT[:, 0], window=W).log_alpha_BR

    gate_BR, drafting_BR = run(both, model, x_BTD, next_BT)
    np.testing.assert_allclose(gate_BR, drafting_BR, atol=1e-6)
    assert np.abs(np.diff(gate_BR, axis=0)).max() > 1e-3
