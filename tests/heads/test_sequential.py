"""Sequential heads with attention: what a position sees, how they begin, and their loss on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.heads import sequential
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.registry import check_head
from mtp_jax.state import split
from mtp_jax.validate import ConfigError
from support import tiny
from support.heads import WINDOWS_NW, D, V, W, hidden, make, make_targets, run, seen

pytestmark = pytest.mark.usefixtures("mesh")
CASES = {
    "one": dict(attention=True),
    "per offset": dict(attention=True, per_offset=True),
    "shortlist": dict(attention=True, shortlist=3),
}
every_case = pytest.mark.parametrize("case", CASES)
TIME = 5


def attending(case, **changes):
    return make(kind="sequential", target="ntp", **{**CASES[case], **changes})


@every_case
def test_all_windows_behind_a_text_sum_to_one(case):
    """The same hidden states and tokens before in all rows, and every window behind the last position."""
    count = len(WINDOWS_NW)
    x_BTD = np.repeat(hidden(0, 1, TIME, D), count, axis=0)
    targets_BTW = np.repeat(np.random.default_rng(1).integers(0, 3, (1, TIME, W)), count, axis=0).astype(np.int32)
    targets_BTW[:, -1] = WINDOWS_NW
    likelihood = lambda model, x, t: model.head.log_likelihood(seen(model, x), t)[:, -1]  # noqa: E731
    found_BW = run(likelihood, attending(case), x_BTD, targets_BTW)
    np.testing.assert_allclose(np.exp(found_BW.sum(-1, dtype=np.float64)).sum(), 1, atol=1e-5)
    assert np.isfinite(found_BW).all() == (case != "shortlist")


def changed(case, where, offset):
    """How the log-likelihood by position and offset moves with the token at `offset` of position `where`."""
    model, x_BTD = attending(case), hidden(0, 1, TIME, D)
    targets_BTW = np.random.default_rng(1).integers(0, 3, (1, TIME, W)).astype(np.int32)
    other = targets_BTW.copy()
    other[0, where, offset] = (other[0, where, offset] + 1) % 3
    likelihood = lambda model, x, t: model.head.log_likelihood(seen(model, x), t)[0]  # noqa: E731
    before, after = (run(likelihood, model, x_BTD, targets) for targets in (targets_BTW, other))
    return np.abs(after - before) > 1e-6


@every_case
def test_a_position_sees_the_committed_tokens_before_it_and_its_own_drafts(case):
    """The token behind a position is in the entry of offset 2, which later positions see; what is drafted beyond is the
    position's own."""
    moved_TW = changed(case, where=1, offset=0)
    assert moved_TW[1, 1:].all() and moved_TW[2:, 1].all() and not moved_TW[0].any() and not moved_TW[2:, 0].any()
    moved_TW = changed(case, where=1, offset=1)
    assert moved_TW[1, 1:].all() and not np.delete(moved_TW, 1, axis=0).any()


def test_documents_do_not_see_each_other():
    model, x_BTD = attending("one"), hidden(0, 1, TIME, D)
    targets_BTW = np.random.default_rng(1).integers(0, V, (1, TIME, W)).astype(np.int32)
    segments_BT = np.array([[0, 0, 1, 1, 1]])

    def likelihood(model, x, t, segments):
        given = model.seen(x, jnp.zeros_like(segments), segments_BT=segments)
        return model.head.log_likelihood(given, t)

    whole = run(likelihood, model, x_BTD, targets_BTW, segments_BT)
    alone = run(likelihood, model, x_BTD[:, 2:], targets_BTW[:, 2:], segments_BT[:, 2:] * 0)
    np.testing.assert_allclose(whole[:, 2:], alone, rtol=1e-5, atol=1e-5)
    assert np.abs(run(likelihood, model, x_BTD, targets_BTW, segments_BT * 0)[:, 2:] - alone).max() > 1e-3


def naive(model, gamma, x_BTD, targets_BTW, weights_BTW):
    """The loss from all logits at once, for plain autodiff."""
    given, total = seen(model, x_BTD), 0.0
    for s, g_BTD in enumerate(model.head._stream(given, targets_BTW), 1):
        (table_VD,) = model.head._table(given.unembed_VD).values()
        logp_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", g_BTD, table_VD), axis=-1)
        hit_BTV = jax.nn.one_hot(targets_BTW[..., s], logp_BTV.shape[-1])
        total = total - gamma**s * jnp.sum(weights_BTW[..., s] * jnp.sum(hit_BTV * logp_BTV, axis=-1))
    return total


def gradients(model, loss, *arrays):
    """The loss, and its gradient in the head and the hidden states, as numpy arrays."""
    graph, params = split(model)
    own, rest = {"head": params["head"]}, {name: tree for name, tree in params.items() if name != "head"}

    def of(own, rest, x_BTD, *arrays):
        return loss(sequential.nnx.merge(graph, {**rest, **own}), x_BTD, *arrays)

    compiled = jax.jit(jax.value_and_grad(of, argnums=(0, 2), allow_int=True))
    value, found = compiled(own, rest, *map(tiny.shard, arrays))
    keep = lambda a: np.asarray(a) if a.dtype == np.float32 else 0  # noqa: E731
    return np.asarray(value), jax.tree.map(keep, found)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-3, np.abs(b).max())), got, want)


@pytest.mark.parametrize(
    "case",
    ["one", pytest.param("per offset", marks=pytest.mark.slow), pytest.param("shortlist", marks=pytest.mark.slow)],
)
def test_the_loss_and_its_gradient_are_those_of_plain_autodiff(case):
    model = attending(case, gamma=0.7)
    x_BTD, (targets_BTW, weights_BTW) = hidden(1, 2, TIME, D), make_targets(1, 2, TIME)
    targets_BTW = targets_BTW % 3
    ours = gradients(model, lambda m, x, *rest: m.head.loss(seen(m, x), *rest)[0], x_BTD, targets_BTW, weights_BTW)
    want = gradients(model, lambda m, *rest: naive(m, 0.7, *rest), x_BTD, targets_BTW, weights_BTW)
    close(ours, want)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want) if np.size(leaf) > 1)


@pytest.mark.slow
def test_eight_devices_have_the_loss_and_the_gradient_of_one():
    head = tiny.head_config(kind="sequential", target="ntp", attention=True, per_offset=True, shortlist=16)
    config = tiny.train_config(head=head)
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with tiny.mesh(*shape):
            model = tiny.make_model(config)
            batch = tiny.make_batch(config)
            weights_BTW = batch["valid_BTW"].astype(jnp.float32) / 64

            def loss(model, batch, weights_BTW):
                return model.loss(batch, weights_BTW)[0]

            value, grads = jax.jit(jax.value_and_grad(loss, allow_int=True))(model, batch, weights_BTW)
            found.append(
                jax.tree.map(lambda a: np.asarray(a) if a.dtype == np.float32 else 0, (value, split(grads)[1]))
            )
    close(*found[::-1])


@every_case
def test_drafts_begin_as_the_models_own_law(case):
    head = tiny.head_config(**{"kind": "sequential", "target": "ntp", **CASES[case]})
    model = tiny.make_model(tiny.train_config(head=head))
    x_BTD, targets_BTW = hidden(3, 2, TIME, 16), np.zeros((2, TIME, W), np.int32)

    def laws(model, x_BTD, targets_BTW):
        given = model.seen(x_BTD, jnp.zeros_like(targets_BTW[..., 0]))
        return [*model.head._stream(given, targets_BTW)]

    for g_BTD in run(laws, model, x_BTD, targets_BTW):
        np.testing.assert_allclose(g_BTD, x_BTD, atol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"window": 1}, "window is 1 and kind is sequential"),
        ({"loss_fraction": 0.5}, "loss_fraction is 0.5 and kind is sequential"),
        ({"target": "marginal"}, "target is marginal and kind is sequential"),
        ({"encoder": "token"}, "encoder is token and kind is sequential; encoders are of mixtures"),
        ({"kind": "mixture", "attention": True}, "attention is True, per_offset is False and kind is mixture"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, words):
    config = HeadConfig(**{"kind": "sequential", "target": "ntp", **changes})
    with pytest.raises(ConfigError, match=words):
        check_head(config).check(config)


def test_a_chain_without_its_own_entries_is_another_law(monkeypatch):
    """A fault that the tests above see: drafts that do not see those before them."""
    attend = sequential.attend_chain
    blind = functools.partial(lambda q, past, mask, chain: attend(q, past, mask, chain[-1:]))
    model, x_BTD = attending("one"), hidden(0, 1, TIME, D)
    targets_BTW = np.random.default_rng(1).integers(0, 3, (1, TIME, W)).astype(np.int32)
    likelihood = lambda model, x, t: model.head.log_likelihood(seen(model, x), t)  # noqa: E731
    right = run(likelihood, model, x_BTD, targets_BTW)
    monkeypatch.setattr(sequential, "attend_chain", blind)
    wrong = run(likelihood, model, x_BTD, targets_BTW)
    np.testing.assert_allclose(wrong[..., :3], right[..., :3], atol=1e-6)
    assert np.abs(wrong - right)[..., 3].max() > 1e-4
