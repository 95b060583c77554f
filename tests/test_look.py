"""Looking into a model: the laws of what is shown, and that the figures show it."""

import io
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax import look
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.decode.spans import Completion, Span, Spans, visible
from mtp_jax.heads.shortlist import put_listed
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import split
from mtp_jax.validate import ConfigError
from support import tiny
from support.heads import wake

TEXT = "def f(x):\n    return $x$ + 1"
HEADS = {
    "full": {},
    "ntp": {"target": "ntp", "factors": "shared"},
    "shortlist": {"factors": "lowrank", "shortlist": 28},
    "independent": {"circuit": "independent", "rank": 1},
    "token": {"target": "ntp", "factors": "lowrank", "encoder": "token", "shortlist": 28},
    "block": {"target": "ntp", "factors": "shared", "encoder": "block"},
}


def make_run(**head):
    """A run that was never trained, with a gate that has opinions."""
    tokenizer = ByteTokenizer()
    config = tiny.train_config(tiny.model_config(vocab_size=264), tiny.head_config(**head))
    with tiny.mesh() as mesh:
        model = tiny.make_model(config)
        if config.head.circuit == "cpd" and config.head.kind == "mixture":
            head = model.head if config.head.encoder == "none" else model.head.mixture
            gate_DR = head.circuit.gate_DR
            gate_DR[...] = jax.random.normal(jax.random.key(1), gate_DR.shape)
        model = wake(model) if config.head.encoder != "none" else model
        if config.head.shortlist:
            graph, params = split(model)
            model = nnx.merge(graph, put_listed(params, np.array([10, 32, *range(97, 123)])))
    return LoadedRun(model, tokenizer, config, mesh, 0, {})


# The slow ones are cousins of the others.
@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n in ("full", "ntp", "token") else pytest.mark.slow) for n in HEADS],
)
def run(request):
    return make_run(**HEADS[request.param])


@pytest.fixture(scope="module")
def full():
    return make_run()


def see(run, text):
    return run.model.see(run.tokenizer.encode(text)[None])


def test_weights_are_distributions_and_their_entropy_lies_between_none_and_all_alike(run):
    gate, rank = look.gate(run, TEXT), run.config.head.rank
    assert gate.weights_TR.shape == (len(TEXT), rank) and len(gate.tokens) == len(TEXT)
    np.testing.assert_allclose(gate.weights_TR.sum(-1), 1, rtol=1e-6)
    assert np.all(gate.entropy_T >= -1e-6) and np.all(gate.entropy_T <= np.log(rank) + 1e-6)
    np.testing.assert_allclose(gate.share_R.sum(), 1, rtol=1e-6)
    tokens_T = run.tokenizer.encode(TEXT)
    with jax.set_mesh(run.mesh):
        seen = see(run, TEXT)
        chosen = int(np.argmax(run.model.target(seen)[0][0, -1]))
        next_1T = jnp.asarray(np.append(tokens_T[1:], chosen)[None], jnp.int32)
        expected_TR = np.exp(run.model.head.gate(seen, next_1T))[0]
    np.testing.assert_allclose(gate.weights_TR, expected_TR, rtol=1e-5, atol=1e-9)


def test_entropy_of_known_distributions():
    found = look.entropy(np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]))
    np.testing.assert_allclose(found, [0, np.log(2), np.log(4)], atol=1e-12)


def test_weighted_components_sum_to_the_marginal_and_the_joint_is_the_heads(run):
    """A window's marginal is summed over all tokens before it; its joint is the head's likelihood of the path."""
    window, head = look.window(run, TEXT), run.config.head
    assert window.factors_RWV.shape == (head.rank, head.window, 264)
    np.testing.assert_allclose(window.factors_RWV.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(window.marginal_WV.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(window.joint_WV.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(window.posterior_WR.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(window.posterior_WR[0], window.weights_R, rtol=1e-5)
    with jax.set_mesh(run.mesh):
        seen = see(run, TEXT)
        target_V = np.exp(run.model.target(seen)[0])[0, -1]
        # An encoder with layers reads the tokens behind all positions.
        tokens_T = np.append(run.tokenizer.encode(TEXT), window.path_W)
        targets_1TW = np.stack([tokens_T[s : s + len(TEXT)] for s in range(1, head.window + 1)], axis=-1)[None]
        likelihood_W = np.exp(run.model.head.log_likelihood(seen, targets_1TW.astype(np.int32)))[0, -1]
    np.testing.assert_allclose(window.joint_WV[0], target_V, rtol=1e-4)
    if head.target == "marginal":
        np.testing.assert_allclose(window.marginal_WV[0], target_V, rtol=1e-4)
    on_path = window.joint_WV[np.arange(head.window), window.path_W]
    np.testing.assert_allclose(on_path[1:], likelihood_W[1:], rtol=1e-4)


def test_posteriors_follow_bayes_rule(full):
    window = look.window(full, TEXT)
    log_alpha_R = np.log(window.weights_R)
    for s, token in enumerate(window.path_W):
        alpha_R = np.exp(log_alpha_R - np.logaddexp.reduce(log_alpha_R))
        np.testing.assert_allclose(window.posterior_WR[s], alpha_R, rtol=1e-4)
        np.testing.assert_allclose(window.joint_WV[s], alpha_R @ window.factors_RWV[:, s], rtol=1e-4)
        log_alpha_R += np.log(window.factors_RWV[:, s, token])
    assert np.abs(window.posterior_WR[-1] - window.weights_R).max() > 1e-3, "the components of this run differ"


def test_the_path_is_what_greedy_decoding_drafts_from(full):
    first = full.generate_tokens([full.tokenizer.encode(TEXT)], max_new_tokens=1).tokens[0][0]
    assert look.window(full, TEXT).path_W[0] == first


DRAFTING = {
    "cpd": {},
    "token": HEADS["token"],
    "sequential": {"kind": "sequential", "target": "ntp", "temperature": 0.7},
    "attention": {"kind": "sequential", "target": "ntp", "attention": True},
}


@pytest.mark.parametrize("name", [n if n != "token" else pytest.param(n, marks=pytest.mark.slow) for n in DRAFTING])
def test_drafts_are_the_heads_and_stand_beside_the_targets_own_law(name):
    run = make_run(**DRAFTING[name])
    found = look.ahead(run, TEXT)
    window, ids = run.config.head.window, run.tokenizer.encode(TEXT)
    assert found.draft_KV.shape == found.target_KV.shape == (window - 1, 264)
    np.testing.assert_array_equal(found.path_W[1:], found.draft_KV.argmax(-1))
    tokens_T = np.append(ids, found.path_W).astype(np.int32)
    targets_1TW = np.stack([tokens_T[s : s + len(ids)] for s in range(1, window + 1)], axis=-1)[None]
    with jax.set_mesh(run.mesh):
        likelihood_W = np.exp(run.model.head.log_likelihood(see(run, TEXT), targets_1TW))[0, -1]
        law_TV = np.exp(run.model.target(run.model.see(tokens_T[None]))[0])[0] ** (1 / run.config.head.temperature)
        law_TV /= law_TV.sum(-1, keepdims=True)
    assert found.path_W[0] == law_TV[len(ids) - 1].argmax()
    on_path = found.draft_KV[np.arange(window - 1), found.path_W[1:]]
    np.testing.assert_allclose(on_path, likelihood_W[1:], rtol=1e-4)
    np.testing.assert_allclose(found.target_KV, law_TV[len(ids) : len(tokens_T) - 1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.overlap_K, 1 - np.abs(found.draft_KV - found.target_KV).sum(-1) / 2, rtol=1e-4)


@pytest.mark.parametrize("text, words", [("", "has 0 tokens"), ("x" * 129, "has 129 tokens; the model reads 1..128")])
def test_a_text_that_cannot_be_read_is_refused(full, text, words):
    for function in (look.gate, look.window):
        with pytest.raises(ConfigError, match=words):
            function(full, text)


def test_drafts_want_room_and_a_head(full):
    with pytest.raises(ConfigError, match=r"has 126 tokens; the model reads 1\.\.125"):
        look.ahead(full, "x" * 126)
    with pytest.raises(ConfigError, match="no head that drafts"):
        look.ahead(make_run(kind="none", window=1, circuit="independent", rank=1, target="ntp", balance="none"), TEXT)


def test_a_head_without_components_is_refused():
    run = make_run(kind="sequential", target="ntp")
    for function in (look.gate, look.window):
        with pytest.raises(ConfigError, match="kind sequential; what is shown here are the components of a mixture"):
            function(run, TEXT)


# Spans


def test_spans_join_to_the_text_and_count_what_the_generation_counts(full):
    tokens = full.tokenizer.encode(TEXT)
    options = {"max_new_tokens": 40, "temperature": 0.7, "seed": 5, "stop_tokens": ()}
    completion = look.complete(full, TEXT, **options)
    generation = full.generate_tokens([tokens], **options)
    raw = full.tokenizer.decode_bytes(generation.tokens[0])
    assert completion.text == TEXT + raw.decode("utf-8", "replace")
    accepted, forwards = int(generation.accepted.sum()), int(generation.forwards.sum())
    assert completion.summary.startswith(f"[40 tokens, {accepted} of them accepted drafts; {forwards} forwards")
    assert f"{generation.block_efficiency:.2f} tokens per forward" in completion.summary
    assert completion.spans[0] == Span(TEXT, "prompt")


def cut(parts, stops=()):
    spans = Spans(ByteTokenizer(), list(b"> "), [(list(text), n) for text, n in parts], stops)
    return list(spans), spans.summary


def test_drafts_come_first_and_the_last_token_is_the_targets():
    found, summary = cut([(b"a", 0), (b"bcd", 2), (b"e", 0), (b"fg", 1)])
    assert [(span.text, span.kind) for span in found] == [
        ("> ", "prompt"), ("a", "target"), ("bc", "draft"), ("d", "target"), ("e", "target"), ("f", "draft"),
        ("g", "target"),
    ]  # fmt: skip
    assert summary == "[7 tokens, 3 of them accepted drafts; 3 forwards after prefill, 2.00 tokens per forward]"


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), repeat=3)))
def test_however_forwards_cut_the_text_it_is_cut_at_the_stop(sizes):
    text, parts, begin = "aé<b<end>c".encode(), [], 0
    for size in itertools.cycle(sizes):
        if begin >= len(text):
            break
        parts.append((text[begin : begin + size], size - 1))
        begin += size
    assert "".join(span.text for span in cut(parts)[0]) == "> aé<b<end>c"
    assert "".join(span.text for span in cut(parts, [b"<end>"])[0]) == "> aé<b"


def test_a_page_has_every_character_and_colours_drafts_alone():
    spans = (Span("x < 1 &\n", "prompt"), Span("\x1b[0m<b>", "target"), Span("[red]ok", "draft"))
    page = Completion(spans, "[counts]")._repr_html_()
    plain = re.sub("<[^>]*>", "", page)
    assert (
        plain.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
        .startswith("x < 1 &\n\\x1b[0m<b>[red]ok\n[counts]")
    )
    bold = re.findall(r'<span style="[^"]*font-weight: bold[^"]*">([^<]*)</span>', page)
    assert bold == ["[red]ok"]
    assert str(Completion(spans, "[counts]")) == "x < 1 &\n\\x1b[0m<b>[red]ok\n[counts]"


def test_control_characters_are_escaped():
    assert visible("a\tb\n\x1b[31m\x07é") == "a\tb\n\\x1b[31m\\x07é"


# Figures


def test_figures_show_the_numbers_and_draw_any_text(run):
    """Any warning fails here: a dollar is no formula, and a character that the font has not is escaped."""
    text = "$\\x$ \t\n\u4e2d\U0001f600é"
    gate, window = look.gate(run, text), look.window(run, text)
    figure = look.plot_gate(gate)
    heat, share, line, *_ = figure.axes
    np.testing.assert_allclose(heat.collections[0].get_array(), gate.weights_TR.T)
    np.testing.assert_allclose([bar.get_width() for bar in share.patches], gate.share_R)
    np.testing.assert_allclose(line.lines[0].get_ydata(), gate.entropy_T)
    assert [label.get_text() for label in line.get_xticklabels()] == list(gate.tokens)
    figure.savefig(io.BytesIO(), dpi=40)

    figure = look.plot_window(window, top=2)
    rank, width = window.factors_RWV.shape[:2]
    grid = np.array(figure.axes).reshape(rank + 2, width)
    laws = [*window.factors_RWV, window.marginal_WV, window.joint_WV]
    for axes, law_V in zip(grid.flat, (law_V for law_WV in laws for law_V in law_WV), strict=True):
        np.testing.assert_allclose([bar.get_width() for bar in axes.patches], np.sort(law_V)[::-1][:2])
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [window.vocabulary[int(token)] for token in np.argsort(-law_V, kind="stable")[:2]]
    figure.savefig(io.BytesIO(), dpi=40)


def test_the_figure_of_drafts_shows_both_laws_and_how_far_they_agree(full):
    found = look.ahead(full, "$x$ \n\u4e2d")
    figure = look.plot_ahead(found, top=2)
    grid = np.array(figure.axes).reshape(2, len(found.draft_KV))
    for line, law_KV in zip(grid, (found.draft_KV, found.target_KV), strict=True):
        for axes, law_V in zip(line, law_KV, strict=True):
            np.testing.assert_allclose([bar.get_width() for bar in axes.patches], np.sort(law_V)[::-1][:2])
    shown = [axes.get_title().partition("overlap ")[2] for axes in grid[0]]
    assert shown == [f"{overlap:.0%}" for overlap in found.overlap_K]
    figure.savefig(io.BytesIO(), dpi=40)


def test_tokens_are_shown_as_text_that_can_be_told_apart(full):
    vocabulary = look.Vocabulary(full.tokenizer)
    shown = [vocabulary[token] for token in range(264)]
    assert len(set(shown)) == 264 and "" not in shown
    assert shown[full.tokenizer.end_of_document] == "<end>"
    assert (shown[0x20], shown[0x0A], shown[0xFF], shown[263]) == ("\u2423", "\u21b5", "\\xff", "<263>")
