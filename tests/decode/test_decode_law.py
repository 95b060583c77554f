"""The joint law of what is decoded, through the production loop and cache, and deliberate faults that break it.

A table of known probabilities stands in for the network (`table.py`). Each row decodes five tokens; the joint law of
the last four, which come from the loop and not from prefill, has 256 cells.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decode import loop
from mtp_jax.decode.law import gumbel
from mtp_jax.decode.verify import Verdict, get_verifier, rejection
from mtp_jax.decode.verify.base import leading
from mtp_jax.decode.verify.block import BlockRule
from mtp_jax.decode.verify.coupled import Coupled
from mtp_jax.decode.verify.rejection import Rejection
from support.laws import FALSE_ALARM, POWER, goodness_of_fit, reference_law
from support.table import VOCAB, WINDOW, joint_law, table_decoding, table_model, tables

pytestmark = pytest.mark.usefixtures("mesh")


NEW, ROWS, FEWER_ROWS = 5, 200_000, 30_000
TABLES = tables()
DRAFTS = ("good", "bad", "adversarial")
SAMPLERS = ("coupled", "token", "block")
# Temperature, top-k, top-p.
PLAIN = [(1.0, 0, 1.0), (0.7, 0, 1.0)]
FILTERED = [(t, k, p) for t in (1.0, 0.7) for k, p in ((2, 1.0), (0, 0.8), (3, 0.8))]
GRID = list(itertools.product(SAMPLERS, DRAFTS, PLAIN + FILTERED))
# A law that has all of temperature, top-k and top-p, and one without anything.
FAST = [(v, "adversarial", FILTERED[-1]) for v in SAMPLERS] + [("coupled", "adversarial", PLAIN[0])]
ALARM = FALSE_ALARM / len(GRID)  # Bonferroni


@functools.cache
def expected(law) -> tuple[np.ndarray, np.ndarray]:
    """The exact law of the last four tokens, and one in which 3% of the rows are uniform over what is possible."""
    p = joint_law(TABLES["target"], NEW, law).sum(0)
    return p, 0.97 * p + 0.03 * (p > 0) / np.count_nonzero(p)


def p_value(tokens_BT: np.ndarray, law) -> tuple[float, float]:
    counts = np.bincount(np.ravel_multi_index(tokens_BT.T, [VOCAB] * NEW), minlength=VOCAB**NEW)
    return goodness_of_fit(counts.reshape([VOCAB] * NEW).sum(0), *expected(law), ALARM)


def decode(draft: str, verifier: str, law=PLAIN[0], **options):
    decoding = table_decoding(table_model(TABLES["target"], TABLES[draft]), ROWS, NEW, verifier, law, **options)
    decoding.advance()
    return decoding.result()


def stepwise(verifier: str, draft: str, law=PLAIN[0], **options):
    """Decode by `loop.begin` and `loop.step` as they are now, unjitted: a patch is felt and nothing compiles anew."""
    model = table_model(TABLES["target"], TABLES[draft])
    d = table_decoding(model, FEWER_ROWS, NEW, verifier, law, **options)
    last, caches = loop.read(model, d.prompt_BP, d.length_B)
    begin = loop.begin.__wrapped__
    d.state = begin(d.plan, model, last, caches, d.prompt_BP, d.length_B, d.limits, d.sampling, d.stops_n)
    while not d.done:
        d.state = loop.step(d.plan, model, d.state, d.sampling, d.stops_n)
    return d.result()


def cases(grid):
    return pytest.mark.parametrize(
        ("verifier", "draft", "law"), grid, ids=["{}-{}-T{}-k{}-p{}".format(v, d, *law) for v, d, law in grid]
    )


def check_joint_law(verifier, draft, law):
    out = decode(draft, verifier, law)
    value, power = p_value(np.stack(out.tokens), law)
    assert power > POWER
    assert value > ALARM


@cases(FAST)
def test_the_joint_law_is_the_targets(verifier, draft, law):
    """False alarm: 1e-4 over the whole grid. Power: 3% of the rows uniform are found with probability 0.999."""
    check_joint_law(verifier, draft, law)


@pytest.mark.slow
@cases([cell for cell in GRID if cell not in FAST])
def test_the_joint_law_is_the_targets_under_every_filter(verifier, draft, law):
    """The rest of the grid."""
    check_joint_law(verifier, draft, law)


# `block` looks at more of the drafts than the others do.
by_verifier = pytest.mark.parametrize(
    "verifier", [pytest.param(name, marks=() if name == "block" else pytest.mark.slow) for name in SAMPLERS]
)


@by_verifier
def test_the_law_holds_where_rows_draft_as_many_tokens_as_they_like(verifier):
    """0 to 3 drafts, by row."""
    most_B = np.arange(ROWS) % WINDOW
    out = decode("bad", verifier, k=most_B)
    value, power = p_value(np.stack(out.tokens), PLAIN[0])
    assert power > POWER and value > ALARM
    for most in range(WINDOW):
        drafted_Bk = out.drafted[most_B == most]
        assert drafted_Bk[:, most:].sum() == 0 and (drafted_Bk[:, :most].sum(0) > 0).all()


@by_verifier
def test_a_row_does_not_depend_on_how_many_drafts_its_neighbours_have(verifier):
    number_B = np.arange(FEWER_ROWS)
    mixed = np.stack(stepwise(verifier, "bad", k=number_B % WINDOW).tokens)
    for k in (0, 1):
        rows = number_B % WINDOW == k
        np.testing.assert_array_equal(mixed[rows], np.stack(stepwise(verifier, "bad", k=k).tokens)[rows])


@pytest.mark.parametrize("verifier", ["token", "block"])
@pytest.mark.parametrize("draft", ["target", *DRAFTS])
def test_rows_of_temperature_0_are_greedy_among_rows_that_sample(verifier, draft):
    cold_B = np.arange(FEWER_ROWS) % 2 == 0
    out = stepwise(verifier, draft, (np.where(cold_B, 0.0, 1.0), 0, 1.0))
    sharp_CV = TABLES["target"] ** 50
    chain = np.unravel_index(joint_law(sharp_CV, NEW, PLAIN[0]).argmax(), [VOCAB] * NEW)
    tokens_BT = np.stack(out.tokens)
    assert (tokens_BT[cold_B] == np.array(chain)).all()
    assert len(np.unique(tokens_BT[~cold_B], axis=0)) > 100
    if draft == "target":
        assert (out.forwards[cold_B] == 1).all()


@pytest.mark.parametrize("verifier", SAMPLERS)
def test_a_draft_that_is_the_target_is_always_accepted(verifier):
    out = decode("target", verifier)
    assert (out.forwards == 1).all() and out.acceptance == [1.0] * (WINDOW - 1)


@pytest.mark.parametrize("draft", DRAFTS[:2])
def test_acceptance_is_what_theory_says(draft):
    """At the first offset `token` accepts sum min(p, q), to five deviations; over the block `block` accepts more."""
    model, rows = table_model(TABLES["target"], TABLES[draft]), ROWS
    accepted = {}
    for verifier in ("token", "block"):
        decoding = table_decoding(model, rows, NEW, verifier)
        decoding.advance(1)
        accepted[verifier] = decoding.result().accepted
    first_V = joint_law(TABLES["target"], 1, PLAIN[0])
    contexts_V = (0 * VOCAB + 1) * VOCAB + np.arange(VOCAB)  # the prompt's last two tokens, then the first new one
    overlap_V = np.minimum(TABLES["target"][contexts_V], TABLES[draft][contexts_V]).sum(axis=1)
    share = float(first_V @ overlap_V)
    assert abs(accepted["token"][:, 0].mean() - share) < 5 * np.sqrt(share * (1 - share) / rows)
    length = {name: a.sum(axis=1) for name, a in accepted.items()}
    gain, deviation = length["block"].mean() - length["token"].mean(), np.std(length["token"]) * np.sqrt(2 / rows)
    assert gain > 5 * deviation


@pytest.mark.parametrize(
    ("verifier", "law", "learnt", "share"),
    [
        ("token", FILTERED[-1], 0.3, 0.6),
        *(pytest.param(v, PLAIN[1], 1.0, s, marks=pytest.mark.slow) for v in SAMPLERS for s in (0.0, 0.6, 1.7)),
    ],
)
def test_drafts_are_sampled_at_their_own_temperature(verifier, law, learnt, share):
    """The text's law is the target's all the same. `token` accepts sum min(p, q), to five deviations; with drafts of
    the text's temperature it would be another number."""
    contexts_V = (0 * VOCAB + 1) * VOCAB + np.arange(VOCAB)
    head = {"temperature": learnt, "draft_temperature": share}
    decoding = table_decoding(table_model(TABLES["target"], TABLES["bad"], **head), ROWS, NEW, verifier, law)
    decoding.advance(1)
    hits_B = decoding.result().accepted[:, 0]
    decoding.advance()
    value, power = p_value(np.stack(decoding.result().tokens), law)
    assert power > POWER and value > ALARM
    if verifier != "token":
        return
    first_V = joint_law(TABLES["target"], 1, law)

    def error(temperature: float) -> float:
        p_CV, q_CV = (
            np.stack([reference_law(row, at, *law[1:]) for row in np.log(TABLES[name][contexts_V])])
            for name, at in (("target", law[0]), ("bad", temperature))
        )
        chance = float(first_V @ np.minimum(p_CV, q_CV).sum(axis=1))
        return abs(hits_B.mean() - chance) / np.sqrt(chance * (1 - chance) / ROWS)

    assert error(share * law[0] / learnt) < 5 < error(law[0])


# Exactly, without drawing anything.


@pytest.mark.parametrize("name", ["token", "block"])
@pytest.mark.parametrize("used", [0, 1, 2])
def test_the_rule_gives_the_targets_joint_law_by_enumeration(name, used):
    """Over all drafts of two tokens out of three and all that may come of them, of which a row uses `used`."""
    vocab, k, rng, verifier = 3, 2, np.random.default_rng(used), get_verifier(name)
    assert isinstance(verifier, Rejection)
    p = [rng.dirichlet([0.5] * vocab, vocab**i).reshape([vocab] * (i + 1)) for i in range(k + 1)]
    q = [rng.dirichlet([0.5] * vocab, vocab**i).reshape([vocab] * (i + 1)) for i in range(k)]
    q[0][2] = 0.0
    q[0] /= q[0].sum()
    out = np.zeros([vocab] * (k + 1))
    for draft in itertools.product(range(vocab), repeat=k):
        mass = np.prod([q[i][draft[: i + 1]] for i in range(k)])
        if mass == 0:
            continue
        p_TV = np.stack([p[i][draft[:i]] for i in range(k + 1)])
        q_TV = np.stack([q[i][draft[:i]] if i < used else np.zeros(vocab) for i in range(k + 1)])
        ratio_k = np.log([p[i][draft[: i + 1]] / q[i][draft[: i + 1]] for i in range(k)])
        arrays = (jnp.asarray(a[None], jnp.float32) for a in (ratio_k, p_TV, q_TV))
        chance_1k, rho_1T = verifier.chances(*arrays)
        kept = np.asarray(chance_1k[0], np.float64) * (np.arange(k) < used)
        for outcome in itertools.product([0, 1], repeat=k):
            chance = mass * np.prod(np.where(outcome, kept, 1 - kept))
            count = int(verifier.accepted(jnp.asarray([outcome], bool))[0]) if chance else 0
            rest_V = np.asarray(rejection.rest(p_TV[count], q_TV[count], float(rho_1T[0, count])), np.float64)
            for own in range(vocab):
                tokens = (*draft[:count], own)
                share = chance * rest_V[own] / rest_V.sum() if chance else 0.0
                # What follows in later blocks is the target's.
                if count == 0:
                    out[tokens] += share * p[1][tokens][:, None] * p[2][tokens]
                elif count == 1:
                    out[tokens] += share * p[2][tokens]
                else:
                    out[tokens] += share
    np.testing.assert_allclose(out, p[0][:, None, None] * p[1][:, :, None] * p[2], atol=1e-6)


# Pathwise.


@pytest.mark.slow
def test_coupled_output_is_the_same_function_of_the_seed_whatever_is_drafted():
    """Every draft and every k, token for token; `k` may differ between the rows."""
    plain = decode("bad", "coupled", k=0)
    any_k = np.arange(ROWS) % WINDOW
    for draft, k in (("target", any_k), *((draft, WINDOW - 1) for draft in DRAFTS)):
        out = decode(draft, "coupled", k=k)
        np.testing.assert_array_equal(out.tokens, plain.tokens)


# Deliberate faults.


def drop_the_targets_token(patch):
    """mtpc: where a draft was accepted, the token behind the accepted ones is thrown away."""
    verify = Rejection.verify

    def dropping(self, logits_BTV, state, sampling):
        tokens_BT, accepted_B = verify(self, logits_BTV, state, sampling)
        return Verdict(tokens_BT, jnp.maximum(accepted_B - 1, 0))

    patch.setattr(Rejection, "verify", dropping)


def stop_the_block_at_the_first_rejection(patch):
    patch.setattr(BlockRule, "accepted", lambda self, kept_Bk: leading(kept_Bk))


def report_q_before_the_filter(patch):
    draft = loop.draft

    def raw(plan, head, state, drafting, sampling):
        out, laws = draft(plan, head, state, drafting, sampling), []
        for i in range(plan.k):
            laws.append(head.next_log_probs(drafting))
            drafting = head.condition(drafting, out.draft_Bk[:, i])
        return dataclasses.replace(out, logq_BkV=jnp.stack(laws, axis=1))

    patch.setattr(loop, "draft", raw)


def replace_choice_of_drafts(patch, change):
    """Drafts, and not the tokens behind them, are chosen from changed logits or noise."""
    choose = Rejection.choose
    patch.setattr(
        Rejection,
        "choose",
        lambda self, logits, noise: choose(self, *(change(logits, noise) if logits.ndim == 3 else (logits, noise))),
    )


def draft_the_argmax(patch):
    replace_choice_of_drafts(patch, lambda logits, noise: (logits, 0 * noise))


def draft_in_bfloat16(patch):
    """Raw logits that are offset by 128, where bfloat16 has whole numbers only; q is verified in float32."""

    def rounded(logits, noise):
        return (logits + 128).astype(jnp.bfloat16).astype(jnp.float32), noise

    replace_choice_of_drafts(patch, rounded)


def cut_the_draft_by_its_tokens(patch):
    """Drafting stops before a token that turned out to be unlikely: decided after it was drawn."""
    draft = loop.draft

    def cutting(plan, head, state, drafting, sampling):
        out = draft(plan, head, state, drafting, sampling)
        chosen = jax.nn.one_hot(out.draft_Bk, VOCAB, dtype=bool)
        likely_Bk = jnp.sum(jnp.where(chosen, jnp.exp(out.logq_BkV), 0.0), axis=-1) > 0.4
        return dataclasses.replace(out, draft_len_B=jnp.minimum(out.draft_len_B, leading(likely_Bk)))

    patch.setattr(loop, "draft", cutting)


def leave_q_in_the_rest(patch):
    patch.setattr(rejection, "rest", lambda p, q, rho: p)


def keep_q_of_the_block_before(patch):
    draft = loop.draft

    def stale(plan, head, state, drafting, sampling):
        out = draft(plan, head, state, drafting, sampling)
        return dataclasses.replace(out, logq_BkV=state.logq_BkV) if state.logq_BkV is not None else out

    patch.setattr(loop, "draft", stale)


def noise_that_does_not_move(patch):
    """The same randomness for every block."""
    keys, noise = rejection.block_keys, Coupled.noise
    patch.setattr(rejection, "block_keys", lambda sampling, start_B, purpose: keys(sampling, 0 * start_B, purpose))
    patch.setattr(
        Coupled, "noise", lambda self, sampling, start_B, width, size: noise(self, sampling, 0 * start_B, width, size)
    )


def noise_by_position(patch):
    """Drafts are drawn and kept by noise keyed by their own positions: `block` has looked at what it rejects."""

    def by_position(self, sampling, start_B, width, vocab_size):
        return gumbel(sampling.key_B, start_B[:, None] + jnp.arange(width)[None], vocab_size)

    def uniform(sampling, start_B, k):
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(sampling.key_B, 10**6)
        return jnp.exp(-jnp.exp(-by_position(None, dataclasses.replace(sampling, key_B=keys_B), start_B, k, 1)[..., 0]))

    patch.setattr(Rejection, "noise", by_position)
    patch.setattr(rejection, "uniform", uniform)


def accept_one_too_many(patch):
    for cls in (Rejection, Coupled):

        def generous(self, logits_BTV, state, sampling, verify=cls.verify):
            tokens_BT, accepted_B = verify(self, logits_BTV, state, sampling)
            return Verdict(tokens_BT, jnp.minimum(accepted_B + 1, state.draft_Bk.shape[1]))

        patch.setattr(cls, "verify", generous)


BOTH = ("token", "block")
FAULTS = [
    (drop_the_targets_token, BOTH, "bad", PLAIN[0]),
    (stop_the_block_at_the_first_rejection, ("block",), "bad", PLAIN[0]),
    (report_q_before_the_filter, BOTH, "bad", (1.0, 2, 1.0)),
    (draft_the_argmax, BOTH, "bad", PLAIN[0]),
    (draft_in_bfloat16, BOTH, "bad", PLAIN[0]),
    (cut_the_draft_by_its_tokens, BOTH, "bad", PLAIN[0]),
    (leave_q_in_the_rest, BOTH, "bad", PLAIN[0]),
    (keep_q_of_the_block_before, BOTH, "bad", PLAIN[0]),
    (noise_that_does_not_move, SAMPLERS, "bad", PLAIN[0]),
    (noise_by_position, ("block",), "bad", PLAIN[0]),
    (accept_one_too_many, SAMPLERS, "bad", PLAIN[0]),
]


@pytest.mark.parametrize("verifier", SAMPLERS)
def test_without_a_fault_the_unjitted_step_gives_the_joint_law(verifier):
    for law in {law for _, _, _, law in FAULTS}:
        assert p_value(np.stack(stepwise(verifier, "bad", law).tokens), law)[0] > ALARM


@pytest.mark.parametrize(
    ("fault", "verifier", "draft", "law"),
    [(fault, verifier, draft, law) for fault, verifiers, draft, law in FAULTS for verifier in verifiers],
    ids=[f"{fault.__name__}-{verifier}" for fault, verifiers, _, _ in FAULTS for verifier in verifiers],
)
def test_the_joint_law_finds_the_fault(fault, verifier, draft, law, monkeypatch):
    fault(monkeypatch)
    assert p_value(np.stack(stepwise(verifier, draft, law).tokens), law)[0] < ALARM


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_what_has_no_probability_is_never_accepted(verifier, monkeypatch):
    """The uniform number is 0 for all drafts, and each draft is a token that the target rules out."""
    target_CV = np.where(np.eye(VOCAB)[TABLES["target"].argmin(axis=1)] > 0, 0, TABLES["target"])
    monkeypatch.setitem(TABLES, "target", target_CV / target_CV.sum(axis=1, keepdims=True))
    allowed = joint_law(np.maximum(TABLES["target"], 1e-30), NEW, PLAIN[0]) > 1e-20

    monkeypatch.setattr(rejection, "uniform", lambda sampling, start_B, k: jnp.zeros((len(start_B), k)))
    assert allowed[tuple(np.stack(stepwise(verifier, "adversarial").tokens).T)].all()
    # A hair below 0 is what u <= chance would be, in place of u < chance.
    monkeypatch.setattr(rejection, "uniform", lambda sampling, start_B, k: jnp.full((len(start_B), k), -1e-30))
    assert not allowed[tuple(np.stack(stepwise(verifier, "adversarial").tokens).T)].all()
