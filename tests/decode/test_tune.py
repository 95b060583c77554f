"""k = "auto": what is chosen, when it is measured, and where it is kept."""

import json

import jax
import numpy as np
import pytest

from mtp_jax.decode import tune
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.generate import generate
from mtp_jax.validate import ConfigError
from support.decoding import NEW, PROMPTS, WINDOW, ask, build, same

AUTO = {"max_new_tokens": NEW, "k": "auto", "stop_tokens": [31]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that remembers nothing."""
    monkeypatch.setenv("MTP_JAX_CACHE", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "tune"


def forget(monkeypatch):
    monkeypatch.setattr(tune, "_CHOSEN", {})


@pytest.fixture
def measured(monkeypatch):
    """How often something was measured; two drafts always win."""
    calls = []
    monkeypatch.setattr(
        tune, "measure", lambda *asked: calls.append(asked) or ({0: 1.0, 1: 1.1, 3: 1.2}, [0.9, 0.1, 0.1])
    )
    return calls


CHOICES = [
    ({0: 1.0, 1: 1.0, 3: 1.0}, [0.5, 0.4, 0.3], 3),
    ({0: 1.0, 1: 2.0, 3: 4.0}, [0.9, 0.8, 0.7], 0),  # drafts cost more than they give
    ({0: 1.0, 1: 1.2, 3: 2.5}, [0.9, 0.3, 0.1], 1),
    ({0: 1.0, 1: 1.49, 3: 9.0}, [0.5, 0.0, 0.0], 0),  # within the noise: the fewest drafts
    ({0: 1.0}, [], 0),
]


@pytest.mark.parametrize(("seconds", "acceptance", "best"), CHOICES)
def test_the_choice_is_that_of_most_tokens_per_second(seconds, acceptance, best):
    assert tune.choose(seconds, acceptance) == best


def test_candidates_are_few_and_fit_the_window():
    assert [tune.candidates(window) for window in (1, 2, 4, 9)] == [[0], [0, 1], [0, 1, 3], [0, 1, 3, 8]]


def test_what_is_measured_is_the_cost_of_each_k_and_the_acceptance_at_each_offset(model):
    seconds, acceptance = tune.measure(model, PROMPTS, DecodeConfig(NEW))
    assert list(seconds) == [0, 1, 3] and min(seconds.values()) > 0
    assert len(acceptance) == WINDOW - 1 and 0 < acceptance[-1] <= acceptance[0] < 1


@pytest.mark.parametrize("verifier", ["greedy", "coupled"])
@pytest.mark.parametrize("k", [0, 1])
def test_prompts_that_were_read_for_more_drafts_serve_fewer(model, k, verifier):
    def decoding(k):
        temperature = 0.0 if verifier == "greedy" else 0.8
        return ask(model, k=k, temperature=temperature, verifier=verifier, seed=3)

    wide, narrow, fresh = decoding(WINDOW - 1), decoding(k), decoding(k)
    narrow.state = wide.state.narrowed(k)
    for each in (narrow, fresh, wide):
        each.advance()
    assert same(narrow.result().tokens, fresh.result().tokens) and wide.done
    np.testing.assert_array_equal(narrow.result().forwards, fresh.result().forwards)
    np.testing.assert_array_equal(narrow.result().drafted, fresh.result().drafted)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "coupled"])
def test_the_output_is_that_of_the_k_that_is_chosen_and_the_result_names_it(model, measured, options):
    out = generate(model, PROMPTS, **AUTO, **options)
    fixed = generate(model, PROMPTS, **{**AUTO, "k": 1}, **options)
    assert (out.k, fixed.k) == (1, 1) and same(out.tokens, fixed.tokens)
    np.testing.assert_array_equal(out.forwards, fixed.forwards)


def test_it_is_measured_once_for_each_kind_of_request(model, measured, monkeypatch):
    for _ in range(2):
        generate(model, PROMPTS, **AUTO)
    generate(model, [[1, 2], [3], [4, 5, 6]], **AUTO)  # the same buckets
    assert len(measured) == 1
    forget(monkeypatch)  # another process
    assert generate(model, PROMPTS, **AUTO).k == 1 and len(measured) == 1
    generate(model, PROMPTS, **AUTO, temperature=0.5)
    generate(model, PROMPTS[:1], **AUTO)
    generate(model, PROMPTS, **{**AUTO, "max_new_tokens": 40})
    assert len(measured) == 4


def test_other_parameters_are_another_model(models, model, measured):
    generate(model, PROMPTS, **AUTO)
    generate(build(jax.sharding.get_mesh(), norm_eps=1e-4).ready, PROMPTS, **AUTO)
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "{", '{"k": 2}', '{"k": "many"}', "[]"])
def test_a_cache_that_makes_no_sense_is_measured_anew(model, measured, monkeypatch, cache, text):
    generate(model, PROMPTS, **AUTO)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["k"] == 1
    file.write_text(text)
    forget(monkeypatch)
    assert generate(model, PROMPTS, **AUTO).k == 1
    assert len(measured) == 2 and json.loads(file.read_text())["k"] == 1


def test_a_cache_that_cannot_be_written_is_done_without(model, measured, monkeypatch, cache):
    cache.write_text("a file where the folder would be")
    for _ in range(2):
        assert generate(model, PROMPTS, **AUTO).k == 1
    assert len(measured) == 1


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_a_seed_and_a_verifier_whose_tokens_depend_on_k_are_refused(model, measured, verifier):
    with pytest.raises(ConfigError, match=rf"k is 'auto', the verifier {verifier} and seed 3; its tokens depend on k"):
        generate(model, PROMPTS, **AUTO, temperature=0.8, verifier=verifier, seed=3)
    assert generate(model, PROMPTS, **AUTO, temperature=0.8, verifier=verifier).k == 1


def test_another_word_is_refused(model):
    with pytest.raises(ConfigError, match=r"k is 'best'; it must be an integer or .* or 'auto'"):
        generate(model, PROMPTS, max_new_tokens=4, k="best")


@pytest.mark.parametrize("new", [1, NEW])
def test_rows_that_end_soon_or_at_a_stop_token_go_on_while_they_are_measured(model, new):
    config = DecodeConfig(new, 0.9, verifier="block", k="auto", stop_tokens=range(0, 32, 2))
    seconds, acceptance = tune.measure(model, PROMPTS, config)
    assert min(seconds.values()) > 0 and acceptance[0] > 0.05
    out = generate(model, PROMPTS, max_new_tokens=new, k="auto")
    assert out.k in (0, 1, 3) and [len(row) for row in out.tokens] == [new] * 4


def test_what_cannot_be_decoded_is_refused_before_it_is_measured(model, measured):
    with pytest.raises(ConfigError, match="Prompt 0 is empty"):
        generate(model, [[]], **AUTO)
    assert not measured
