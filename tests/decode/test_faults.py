"""Deliberate faults of decoding: what its tests would see."""

import dataclasses

import jax
import numpy as np

from mtp_jax.decode import loop
from mtp_jax.decode.verify import Verdict
from mtp_jax.decode.verify.greedy import Greedy
from mtp_jax.heads.mixture import MixtureHead
from mtp_jax.model import attention
from mtp_jax.model.cache import write
from support import tiny
from support.decoding import WINDOW, ask, faulty_loop, finish, same


def costs_acceptance_only(model, temperature: float, put_in_fault) -> bool:
    """Whether the fault leaves every token as it was and takes 3% more forwards, over 32 rows."""
    requests = [ask(model, k=1, temperature=temperature, seed=seed) for seed in range(0, 32, 4)]
    right = [finish(decoding) for decoding in requests]  # compiled before the fault is there
    put_in_fault()
    decode = faulty_loop()
    wrong = [decode(decoding) for decoding in requests]
    for a, b in zip(right, wrong, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    return sum(b.forwards.sum() for b in wrong) > 1.03 * sum(a.forwards.sum() for a in right)


def test_fault_accepting_one_draft_too_many_is_seen(model, greedy, monkeypatch):
    verify = Greedy.verify

    def generous(self, logits_BTV, state, sampling):
        tokens_BT, accepted_B = verify(self, logits_BTV, state, sampling)
        return Verdict(tokens_BT, jax.numpy.minimum(accepted_B + 1, state.draft_Bk.shape[1]))

    decoding = ask(model)
    decoding.prefill()
    monkeypatch.setattr(Greedy, "verify", generous)
    assert not same(faulty_loop()(decoding).tokens, greedy)


def test_fault_a_length_that_is_not_rolled_back_is_seen(model, greedy):
    """After each forward the length stands behind all drafts, the rejected ones too."""
    decoding = ask(model)
    limit_B = decoding.limits.length_B
    while not decoding.done:
        ahead_B = np.minimum(np.asarray(decoding.state.length_B) + WINDOW, limit_B)
        decoding.advance(1)
        length_B = np.asarray(decoding.state.length_B)
        length_B = tiny.shard(np.where(length_B < limit_B, ahead_B, length_B))
        decoding.state = dataclasses.replace(decoding.state, length_B=length_B)
    assert not same(decoding.result().tokens, greedy)


def test_fault_a_cache_that_keeps_rejected_drafts_is_seen(model, greedy, monkeypatch):
    """The first position of a forward held a rejected draft; here it is not written over."""

    def keep(cache_BSKH, new_BTKH, start_B):
        return write(cache_BSKH, new_BTKH[:, 1:], start_B + 1)

    decoding = ask(model)
    decoding.prefill()
    monkeypatch.setattr(attention, "write", keep)
    assert not same(faulty_loop()(decoding).tokens, greedy)


def test_fault_noise_of_another_position_costs_acceptance_and_not_the_law(model, monkeypatch):
    draft = loop.draft

    def late(plan, head, state, drafting, sampling):
        rolled = dataclasses.replace(state, noise_BTV=jax.numpy.roll(state.noise_BTV, 1, axis=1))
        out = draft(plan, head, rolled, drafting, sampling)
        return dataclasses.replace(out, noise_BTV=state.noise_BTV)

    assert costs_acceptance_only(model, 3.0, lambda: monkeypatch.setattr(loop, "draft", late))


def test_fault_drafts_that_ignore_the_targets_token_cost_acceptance_and_not_the_law(model, monkeypatch):
    condition = MixtureHead.condition

    def forget(self, joint, token_B):
        return dataclasses.replace(joint, offset=1) if joint.offset == 0 else condition(self, joint, token_B)

    assert costs_acceptance_only(model, 1.2, lambda: monkeypatch.setattr(MixtureHead, "condition", forget))
