"""Results files: what is refused, intervals and their coverage, verdicts on known effects, the page and its figures."""

import copy
import json
import math
import re

import numpy as np
import pytest
from results import results

from mtp_jax.cli import main
from mtp_jax.config import ConfigError
from mtp_jax.results.claims import claims
from mtp_jax.results.compare import (
    T975,
    compare,
    estimate,
    iteration_seconds,
    joint_loss,
    over_seeds,
    over_units,
    rate,
    speed_ratio,
    speedup,
    tokens_per_forward,
)
from mtp_jax.results.figures import FIGURES
from mtp_jax.results.load import load_results
from mtp_jax.results.page import _code, write_page


@pytest.fixture
def load(tmp_path):
    """Results files as they are read."""

    def write(*values):
        paths = [tmp_path / f"{index}.json" for index in range(len(values))]
        for path, value in zip(paths, values, strict=True):
            path.write_text(json.dumps(value))
        return load_results(paths)

    return write


@pytest.fixture
def verdicts(load):
    """The verdict on every claim, by a word of its title."""

    def of(*values):
        found = {claim.title: claim.verdict for claim in claims(load(*values))}
        return lambda word: next(verdict for title, verdict in found.items() if word in title)

    return of


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("fields"), "has no field 'fields'; give a file that `mtp-jax sweep` has written."),
        (lambda r: r.update(format=2), "is of format 2 and this is for 1; write it anew."),
        (lambda r: r["runs"][0].pop("state"), "a run has no field 'state' (rank=1,seed=0)."),
        (lambda r: r["runs"][0].pop("cost"), "the run rank=1,seed=0 is done and has no field 'cost'."),
        (lambda r: r.update(runs=[]), "has no finished run (0 failed); start the sweep again."),
    ],
)
def test_a_file_that_is_not_of_results_is_refused_by_name(load, tmp_path, change, message):
    value = results()
    change(value)
    with pytest.raises(ConfigError) as error:
        load(value)
    assert str(tmp_path / "0.json") in str(error.value) and message in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_results([tmp_path / "a.json"])
    with pytest.raises(ConfigError, match="There is no results file"):
        load_results([tmp_path / "b.json"])
    with pytest.raises(ConfigError, match="There are no results files"):
        load_results([])


def test_the_quantiles_are_those_of_student():
    from scipy import stats

    np.testing.assert_allclose(T975[1:], stats.t.ppf(0.975, np.arange(1, len(T975))), atol=5e-4)


def test_an_interval_over_seeds_covers_the_truth():
    # 1,000 experiments of three seeds. A right interval covers 931 to 969 of them with probability 0.99; one that took
    # the normal's 1.96 for Student's 4.30 would cover about 810.
    rng = np.random.default_rng(0)
    hits = sum(e.low <= 0.2 <= e.high for e in (over_seeds(list(rng.normal(0.2, 0.1, 3))) for _ in range(1000)))
    assert 930 <= hits <= 970


def test_a_paired_interval_covers_the_truth_and_is_narrower_than_an_unpaired_one():
    rng, hits, narrower = np.random.default_rng(0), 0, 0
    for _ in range(200):
        shared = rng.normal(0, 2, 40)
        own, other = (shared + shift + rng.normal(0, 0.1, 40) for shift in (0.05, 0.0))
        ones = np.ones(40)
        paired = over_units((own, ones), (other, ones), lambda a, b: a - b)
        unpaired = over_units((own, ones), (rng.permutation(other), ones), lambda a, b: a - b)
        hits += paired.low <= 0.05 <= paired.high
        narrower += paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    assert 180 <= hits <= 198 and narrower == 200  # 95% of 200 is 190 +- 3


def test_runs_are_compared_with_the_reference_of_their_seed(load):
    (found,) = load(results(loss=-0.3, noise=0.0))
    e = compare(found, (4,), "steps", joint_loss)
    assert e and e.over == "seeds" and e.count == 3 and e.mean == pytest.approx(-0.6)
    e = compare(found, (4,), "seconds", joint_loss)
    assert e and e.mean == pytest.approx(-0.48)
    assert compare(found, (4,), "quarter", joint_loss) is None


def test_one_seed_is_compared_over_documents(load):
    (found,) = load(results(seeds=(0,), kept=0.2, noise=0.0))
    e = compare(found, (2,), "steps", tokens_per_forward(0.0))
    assert e and e.over == "documents" and e.count == 40
    assert e.low < e.mean < e.high and e.how == "1 seed, 40 documents"
    own = estimate(found, (2,), "steps", tokens_per_forward(0.0))
    assert own and own.high - own.low > 3 * (e.high - e.low)  # documents differ more than ranks


def test_a_speed_is_tokens_per_iteration_over_what_the_iteration_takes(load):
    (found,) = load(results(kept=0.0, noise=0.0, verify=0.1))
    run = found.of((2,))[1]
    seconds = iteration_seconds(run, 0.7)
    assert seconds == pytest.approx({0: 0.0019, 1: 0.002 * (1 + 1 / 6 + 0.1), 2: 0.002 * (1 + 2 / 6 + 0.1), 3: 0.0032})
    share = np.mean(run.at("seconds")["decoding"][0]["documents"]["emitted"]) / 250 - 1
    by_k = [(1 + share * kept) / seconds[k] for k, kept in enumerate((0.0, 0.5, 0.8, 1.0))]
    assert rate(run, "seconds", 0.7) == (pytest.approx(max(by_k)), int(np.argmax(by_k)))
    plain = found.of((1,))[1]
    assert speedup(run, "seconds", 0.7)[0] == pytest.approx(max(by_k) * 0.0019)
    e = speed_ratio(found, (2,), "seconds", 0.7)
    assert e and e.count == 3 and e.mean == pytest.approx(max(by_k) / rate(plain, "seconds", 0.7)[0])


def test_a_gain_is_confirmed(verdicts):
    of = verdicts(results(), results(sweep="rank_text"), results(freeze="none", sweep="scratch_code"))
    for word in ("lowers the joint loss", "raises acceptance", "speeds up", "overhead", "from scratch and"):
        assert of(word) == "confirmed", word
    assert of("Conditioning") == "confirmed"
    assert of("first token does not") == "confirmed"


def test_a_gain_on_one_data_set_alone_is_not_confirmed(verdicts):
    of = verdicts(results(), results(sweep="rank_text", loss=0.1, kept=-0.1))
    for word in ("lowers the joint loss", "raises acceptance", "speeds up"):
        assert of(word) == "not confirmed", word


def test_a_gain_within_the_spread_of_seeds_is_not_confirmed(verdicts):
    of = verdicts(results(loss=-0.01, kept=0.01, noise=0.3))
    assert of("lowers the joint loss") == of("raises acceptance") == "not confirmed"


def test_an_effect_on_the_first_token_refutes_that_there_is_none(verdicts):
    assert verdicts(results(freeze="none", first=0.2))("first token does not") == "not confirmed"


def test_what_costs_more_than_it_gives_is_not_faster(verdicts):
    assert verdicts(results(verify=0.5))("speeds up") == "not confirmed"


def test_without_data_nothing_is_decided(verdicts):
    of = verdicts(results())
    for word in ("sizes", "goes on", "from scratch and", "balancing", "first token does not"):
        assert of(word) == "undecided", word


def test_sizes_are_compared_at_the_ranks_that_all_have(verdicts):
    one, other = results(d_model=64), results(ranks=(1, 4), d_model=32, sweep="sizes")
    assert verdicts(one, other)("sizes") == "confirmed"
    worse = results(ranks=(1, 4), d_model=32, sweep="sizes", loss=0.2)
    assert verdicts(one, worse)("sizes") == "not confirmed"


def test_lengths_are_three_readings(verdicts):
    assert verdicts(results(lengths=True))("goes on") == "confirmed"
    assert verdicts(results(lengths=True, kept=-0.1))("goes on") == "not confirmed"


@pytest.mark.parametrize(("effect", "verdict"), [(0.2, "confirmed"), (-0.2, "not confirmed")])
def test_balancing_must_help(verdicts, effect, verdict):
    cases = {"none": {"head.balance": "none"}, "squared": {"head.balance": "squared", "head.balance_weight": 0.1}}
    value = results(ranks=(4,), cases=cases, loss=-effect, kept=effect)
    assert verdicts(value)("balancing") == verdict


def test_the_page_has_every_claim_figure_and_command(tmp_path, capsys):
    cases = {"none": {"head.balance": "none"}, "squared": {"head.balance": "squared", "head.balance_weight": 0.1}}
    broken = results(sweep="rank_text")
    broken["runs"][-1] = {
        "name": "rank=4,seed=2", "changes": {"head.rank": 4, "seed": 2}, "state": "failed", "error": "no memory",
    }  # fmt: skip
    values = [results(lengths=True), broken, results(ranks=(4,), cases=cases, sweep="balance")]
    for index, value in enumerate(values):
        (tmp_path / f"{index}.json").write_text(json.dumps(value))
    paths = [str(tmp_path / f"{index}.json") for index in range(len(values))]
    main(["report", *paths, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"Wrote {tmp_path / 'out' / 'report.md'}" in capsys.readouterr().out
    for value in values:
        assert f"`{value['command']}`" in page
    assert f"`mtp-jax report {' '.join(paths)} --out {tmp_path / 'out'}`" in page
    assert "| rank_text (cpu) | rank=4,seed=2 | no memory |" in page
    assert "`if\u2423\\|x\u21b5` 3.0x" in page
    for name in FIGURES:
        png = tmp_path / "out" / "figures" / f"{name}.png"
        assert png.read_bytes().startswith(b"\x89PNG") and f"(figures/{name}.png)" in page
    assert len(re.findall(r"^### .+: (confirmed|not confirmed|undecided)$", page, re.MULTILINE)) == 11
    assert "nan" not in page and "None" not in page
    assert re.search(
        r"^\* rank_code \(cpu\): R = 4 .* the tokens/s of rank 1, which excludes rank 1\.$", page, re.MULTILINE
    )


def test_a_page_without_speeds_or_components_says_so(tmp_path):
    value = copy.deepcopy(results())
    for run in value["runs"]:
        for found in run["measured"].values():
            found["speed"], found["components"] = [], []
        run["cost"]["decoding"] = []
    (tmp_path / "a.json").write_text(json.dumps(value))
    text = write_page([tmp_path / "a.json"], tmp_path / "out").read_text()
    assert "there is nothing to recommend yet" in text and "specialise" not in text
    assert not (tmp_path / "out" / "figures" / "speed_by_k.png").exists()


def test_a_window_is_shown_whatever_it_holds():
    assert _code("a`b") == "`` a`b ``" and _code("\x00") == "`\\x00`" and math.isfinite(len(_code("|")))
