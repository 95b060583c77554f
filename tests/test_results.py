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
from mtp_jax.results.claims import balance, claims, faster, low_overhead, lower_loss, more_acceptance
from mtp_jax.results.compare import (
    Estimate,
    _drawn_ratios,
    compare,
    estimated,
    iteration_seconds,
    joint_loss,
    over,
    speed,
    speed_ratio,
    speeds,
    speedup,
)
from mtp_jax.results.figures import FIGURES
from mtp_jax.results.load import load_results
from mtp_jax.results.page import _code, markdown, recommendation, write_page


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
        (lambda r: r.update(format=5), "is of format 5 and this is for 3, 4; write it anew."),
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


def test_an_interval_over_seeds_covers_the_truth():
    # 1,000 experiments of three seeds. A right interval covers 931 to 969 of them with probability 0.99; one that took
    # the normal's 1.96 for Student's 4.30 would cover about 810.
    rng = np.random.default_rng(0)
    found = (estimated(list(rng.normal(0.2, 0.1, 3)), 1, 0.0).interval() for _ in range(1000))
    assert 930 <= sum(low <= 0.2 <= high for low, high in found) <= 970


def test_an_interval_holds_documents_and_seeds_both():
    # 40 documents whose effects differ by 0.5, and three seeds that share them, against the mean effect of 0.2 of all
    # documents that there are. 300 experiments: a right interval covers 274 to 297 of them with probability 0.99; one
    # of the seeds' spread alone covers fewer than half.
    rng, hits, seeds_alone = np.random.default_rng(0), 0, 0
    for _ in range(300):
        documents, ones = rng.normal(0.2, 0.5, 40), np.ones(40)
        units = [
            ((documents + rng.normal(0, 0.01) + rng.normal(0, 0.05, 40), ones), (np.zeros(40), ones)) for _ in range(3)
        ]
        e = over(units, lambda own, other: own - other)
        low, high = e.interval()
        hits += low <= 0.2 <= high
        low, high = estimated([float(a.mean()) for (a, _), _ in units], 40, 0.0).interval()
        seeds_alone += low <= 0.2 <= high
    assert hits >= 274 and seeds_alone < 150


def test_pairs_have_narrower_intervals_than_strangers():
    rng = np.random.default_rng(0)
    shared, ones = rng.normal(0, 2, 40), np.ones(40)
    own, other = shared + 0.05 + rng.normal(0, 0.1, 40), shared + rng.normal(0, 0.1, 40)
    paired = over([((own, ones), (other, ones))], lambda a, b: a - b)
    strangers = over([((own, ones), (rng.permutation(other), ones))], lambda a, b: a - b)
    assert paired.error < 0.2 * strangers.error and paired.seeds == 1


def test_tests_that_are_made_together_have_wider_intervals():
    e = estimated([0.1, 0.2, 0.3], 40, 0.01)
    (low, high), (lower, higher) = e.interval(), e.interval(4)
    assert lower < low < 0.2 < high < higher
    assert Estimate(0.2, 1, 40, 0.0, 0.1).interval() == pytest.approx((0.2 - 0.196, 0.2 + 0.196), abs=1e-3)


def test_runs_are_compared_with_the_reference_of_their_seed(load):
    (found,) = load(results(loss=-0.3, noise=0.0))
    e = compare(found, (4,), "steps", joint_loss)
    assert (
        e and (e.seeds, e.documents) == (3, 40) and e.mean == pytest.approx(-0.6) and e.how == "3 seeds, 40 documents"
    )
    e = compare(found, (4,), "seconds", joint_loss)
    assert e and e.mean == pytest.approx(-0.48)
    assert compare(found, (4,), "quarter", joint_loss) is None
    (alone,) = load(results(seeds=(0,)))
    e = compare(alone, (4,), "steps", joint_loss)
    assert e and e.how == "1 seed, 40 documents" and e.seed_error == 0


def test_a_speed_is_tokens_per_iteration_over_what_the_iteration_takes(load):
    (found,) = load(results(kept=0.0, noise=0.0, verify=0.1, second=0.5))
    seconds = iteration_seconds(found, (2,), 0.7)
    assert {k: np.median(of) for k, of in seconds.items()} == pytest.approx(
        {0: 0.0019 * 1.03} | {k: 0.002 * (1.1 + k / 8) * 1.03 for k in (1, 2, 3)}
    )
    tokens = np.mean(found.of((2,))[1].at("seconds")["decoding"][0]["documents"]["emitted"]) / 250
    fast = speed(found, (2,), "seconds", 0.7)
    assert fast and fast.k == 3 and fast.rate == pytest.approx(tokens / (0.00295 * 1.03))
    assert speedup(found, (2,), "seconds", 0.7) == pytest.approx(tokens / 1.475 * 0.95)
    e = speed_ratio(found, (2,), "seconds", 0.7)
    # Rounds that are slower for all alike say nothing against the ratio; the best k is another one in few of the draws.
    assert e and e.seeds == 3 and e.mean == pytest.approx(1.375 / 1.475) and e.error < 2e-3
    assert speed(found, (1,), "seconds", 0.7).rate > fast.rate


def test_each_point_decodes_with_the_k_that_is_best_for_it(load):
    """Two drafts are best for rank 1, and three for rank 4, of which each is worth more."""
    (found,) = load(results(kept=1.0, noise=0.0, verify=0.0, second=0.85))
    best = {rank: speed(found, (rank,), "seconds", 0.7) for rank in (1, 4)}
    rate = {1: 1.8 * 0.93, 4: (1.8 + 0.8 * 2) * 0.93}
    ease = best[4].tokens / rate[4]  # of the documents, the same for all
    assert [at.k for at in best.values()] == [2, 3]
    assert best[1].tokens == pytest.approx(1 + 0.85 * (ease * rate[1] - 1))
    e = speed_ratio(found, (4,), "seconds", 0.7)
    assert e and e.mean == pytest.approx(best[4].tokens / 1.375 / (best[1].tokens / 1.25))


def test_older_files_know_the_most_drafts_and_none(load):
    (found,) = load(results(older=True, second=0.99))
    assert list(iteration_seconds(found, (1,), 0.7)) == [0, 3] and speed(found, (1,), "seconds", 0.7).k == 3


def test_the_best_k_is_drawn_anew_with_the_rounds(load):
    """Where drafts are as fast as none but for the clock, some draws are better with drafts, and none is worse."""
    value = results(ranks=(1, 4), kept=0.0, noise=0.0, verify=0.1078, second=0.5)
    wobble = np.array([0.9, 1.1, 0.95, 1.0, 1.05, 0.9, 1.1])
    for run in value["runs"]:
        for row in run["cost"]["decoding"]:
            steady = row["iteration_seconds"][0]
            drafts = run["changes"]["head.rank"] == 4 and row["k"] == 3
            row["iteration_seconds"] = (steady * (wobble if drafts else np.ones(7))).tolist()
    (found,) = load(value)
    own, other = (speeds(found, (rank,), "seconds", 0.7) for rank in (4, 1))
    plain, drafts = ([at for at in own if at.k == k] for k in (0, 3))
    reference = [at for at in other if at.k == 3]
    best, *alone = (_drawn_ratios(of, reference) for of in (own, plain, drafts))
    np.testing.assert_allclose(best, np.maximum(*alone))
    assert all(np.mean(best > of + 1e-6) > 0.1 for of in alone)


def test_noise_of_the_clock_is_in_the_interval_of_a_speed(load):
    value = results(kept=0.0, noise=0.0)
    rng = np.random.default_rng(0)
    for run in value["runs"]:
        for row in run["cost"]["decoding"]:
            row["iteration_seconds"] = (np.array(row["iteration_seconds"]) * rng.uniform(0.9, 1.1, 7)).tolist()
    e = speed_ratio(load(value)[0], (2,), "seconds", 0.7)
    assert e and e.seed_error < 1e-9 and 0.01 < e.error < 0.1


def test_where_drafts_do_not_pay_a_speed_is_that_of_plain_decoding(load):
    (found,) = load(results(verify=3.0))
    fast = speed(found, (4,), "seconds", 0.7)
    assert fast and (fast.k, fast.tokens) == (0, 1.0) and speedup(found, (4,), "seconds", 0.7) == pytest.approx(1)


def test_plain_decoding_that_is_the_same_work_has_one_time(load):
    """Of one trunk and its own head; from scratch each rank has a law of its own, which another head computes."""
    fast, slow = 0.0019 * 1.03, 3 * 0.0019 * 1.03
    for freeze, expected in (("trunk", [fast] * 3), ("none", [fast, slow, fast])):
        value = results(freeze=freeze)
        for run in value["runs"]:
            for row in run["cost"]["decoding"] if run["changes"]["head.rank"] == 2 else []:
                row["iteration_seconds"] = [3 * seconds for seconds in row["iteration_seconds"]]
        (found,) = load(value)
        times = [iteration_seconds(found, (rank,), 0.7)[0] for rank in (1, 2, 4)]
        assert [float(np.median(of)) for of in times] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rank_4", "error", "verdict", "low"),
    [
        (1.2, 0.01, "confirmed", "R = 2, R = 4"),
        (1.3, 0.01, "not confirmed", "R = 2"),
        (1.26, 0.01, "undecided", "R = 2"),  # one error from the limit
        (1.3, 0.2, "undecided", "none"),
    ],
)
def test_the_overhead_is_low_if_that_is_sure_of_all_ranks(load, rank_4, error, verdict, low):
    value = results()
    for run in value["runs"]:
        over = run["cost"]["over_reference"]
        over["error"] = error
        if run["changes"]["head.rank"] == 4:
            over["measured"] = rank_4
    claim = low_overhead(load(value))
    assert claim.verdict == verdict and claim.text.endswith(f"In rank_code (cpu) it is low for {low}.")
    assert f"+- {error:.2f}" in claim.table


def test_a_reading_for_which_a_run_has_no_checkpoint_says_how_much_it_had(load):
    # A step of rank 2 costs 1.1, and of rank 4 1.2 times one of rank 1; both are read after half of the steps.
    table = next(c for c in claims(load(results())) if "joint loss" in c.title).table
    rows = {cells[2].strip(): cells for line in table.splitlines() if len(cells := line.split("|")) > 8}
    assert "of it" not in "".join(rows["R = 1"])
    for column, reading in ((5, "FLOPs"), (6, "wall-clock")):
        assert [re.findall(r"\((\d+)% of it\)", rows[run][column]) for run in ("R = 2", "R = 4")] == [["55"], ["60"]], (
            reading
        )
    assert "of it" not in rows["R = 4"][4], "after all steps"


def test_a_gain_is_confirmed(verdicts):
    text = results(sweep="rank_text", source="text")
    of = verdicts(results(), text, results(freeze="none", sweep="scratch_code", noise=1e-3))
    for word in ("lowers the joint loss", "raises acceptance", "speeds up", "overhead", "from scratch and"):
        assert of(word) == "confirmed", word
    assert of("Conditioning") == "confirmed"
    assert of("first token does not") == "confirmed"


def test_a_gain_on_one_data_set_alone_is_not_confirmed(verdicts):
    of = verdicts(results(), results(sweep="rank_text", source="text", loss=0.1, kept=-0.1))
    for word in ("lowers the joint loss", "raises acceptance", "speeds up"):
        assert of(word) == "not confirmed", word


def test_too_little_to_tell_is_undecided(verdicts):
    noisy, alone = verdicts(results(loss=-0.1, kept=0.05, noise=0.2)), verdicts(results(seeds=(0,)))
    for word in ("lowers the joint loss", "raises acceptance", "speeds up", "Conditioning"):
        assert alone(word) == "undecided", word
    assert noisy("lowers the joint loss") == noisy("raises acceptance") == "undecided"


def test_no_effect_is_rarely_confirmed(load):
    # 200 draws of four ranks and three seeds without any effect. Each claim may be confirmed in at most 2.5% of them, 5
    # on average: more than 11 have probability 0.005. Without the correction for four ranks it would be about 18.
    confirmed = {lower_loss: 0, more_acceptance: 0}
    for draw in range(200):
        found = load(results(ranks=(1, 2, 4, 8, 16), loss=0.0, kept=0.0, noise=0.1, draw=draw))
        for claim in confirmed:
            confirmed[claim] += claim(found).verdict == "confirmed"
    assert max(confirmed.values()) <= 11


def test_an_effect_on_the_first_token_refutes_that_there_is_none(verdicts):
    assert verdicts(results(freeze="none", first=0.2))("first token does not") == "not confirmed"
    assert verdicts(results(freeze="none", noise=0.1))("first token does not") == "undecided"  # too few to tell


def test_what_costs_more_than_it_gives_is_not_faster(verdicts):
    assert verdicts(results(verify=0.5))("speeds up") == "not confirmed"


def test_one_kind_of_head_that_is_faster_on_a_kind_of_text_is_enough(verdicts):
    slow, fast = results(verify=0.5), results(sweep="lora_code")
    assert verdicts(slow, fast)("speeds up") == "confirmed"
    assert verdicts(fast, results(sweep="rank_text", source="text", verify=0.5))("speeds up") == "not confirmed"


def test_a_speed_that_was_measured_on_a_busy_machine_says_so(load):
    value = results(ranks=(1, 2))
    for run, load_of in zip(value["runs"], (0.9, 2.1), strict=False):
        run["measured"]["240"]["load"] = load_of
    rows = [line for line in faster(load(value)).table.splitlines() if "R = " in line]
    assert [line.split("|")[5].strip() for line in rows] == ["1.30x", "1.30x (busy)"]


def test_it_is_said_if_the_reference_has_another_head_in_more_than_its_rank(load):
    value = results()
    assert "rank is not all that differs" not in markdown(load(value), {}, "")
    for run in value["runs"]:
        full = run["changes"]["head.rank"] == 1
        run["config"]["head"] |= {"factors": "full" if full else "lora", "factor_width": 64 if full else 16}
    words = "In rank_code (cpu) the reference has another `head.factors` too, so rank is not all that differs."
    assert words in markdown(load(value), {}, "")


def test_other_sweeps_over_rank_are_no_data_sets(verdicts):
    windows = results(sweep="windows", loss=0.5, kept=-0.5)
    windows["fields"] = ["head.window", "head.rank", "seed"]
    for run in windows["runs"]:
        run["changes"]["head.window"] = 4
    of = verdicts(results(), windows)
    assert of("lowers the joint loss") == of("raises acceptance") == "confirmed"


@pytest.mark.parametrize(("kept", "verdict"), [(0.9, "confirmed"), (0.2, "not confirmed")])
def test_accepted_drafts_are_counted_at_the_temperature_that_is_judged(verdicts, kept, verdict):
    assert verdicts(results(kept=kept))("two drafts") == verdict


def test_without_data_nothing_is_decided(verdicts):
    of = verdicts(results())
    for word in ("sizes", "goes on", "from scratch and", "balancing", "first token does not"):
        assert of(word) == "undecided", word


def test_sizes_are_compared_at_the_ranks_that_all_have(verdicts):
    one, other = results(d_model=64), results(ranks=(1, 4), d_model=32, sweep="sizes")
    assert verdicts(one, other)("sizes") == "confirmed"
    worse = results(ranks=(1, 4), d_model=32, sweep="sizes", loss=0.2)
    assert verdicts(one, worse)("sizes") == "not confirmed"
    longer = copy.deepcopy(worse)
    for run in longer["runs"]:
        run["config"]["steps"] = 960  # which is another question
    assert verdicts(one, longer)("sizes") == "undecided"


def test_every_rank_has_a_row_in_every_table_over_rank(load):
    tables = [claim.table for claim in claims(load(results())) if claim.table]
    assert len(tables) == 6
    for table in tables:
        assert [table.count(f"| rank_code (cpu) | R = {rank} |") for rank in (1, 2, 4)] == [1, 1, 1], table


def test_lengths_are_three_readings(verdicts):
    assert verdicts(results(lengths=True))("goes on") == "confirmed"
    assert verdicts(results(lengths=True, kept=-0.1))("goes on") == "not confirmed"


@pytest.mark.parametrize(("effect", "verdict"), [(0.2, "confirmed"), (-0.2, "not confirmed")])
def test_balancing_must_help(verdicts, effect, verdict):
    cases = {"none": {"head.balance": "none"}, "squared": {"head.balance": "squared", "head.balance_weight": 0.1}}
    value = results(ranks=(4,), cases=cases, loss=-effect, kept=effect)
    assert verdicts(value)("balancing") == verdict
    alone = results(ranks=(4,), cases=cases, loss=-effect, kept=effect, seeds=(0,))
    assert verdicts(alone)("balancing") == "undecided"


@pytest.mark.parametrize(
    ("effective", "effect", "verdict", "text"),
    [
        (1.0, 0.2, "confirmed", "the components collapse without balancing, and balancing helps."),
        (2.0, 0.2, "not confirmed", "the components do not collapse without balancing, and balancing helps."),
        (1.0, -0.2, "not confirmed", "the components collapse without balancing, and balancing does not help."),
    ],
)
def test_the_halves_of_the_claim_about_balancing_are_told_apart(load, effective, effect, verdict, text):
    cases = {"none": {"head.balance": "none"}, "squared": {"head.balance": "squared", "head.balance_weight": 0.1}}
    value = results(ranks=(4,), cases=cases, loss=-effect, kept=effect)
    for run in value["runs"]:
        for found in run["measured"].values():
            found["gate"]["effective"] = effective if run["changes"]["head.balance"] == "none" else 3.0
    claim = balance(load(value))
    assert claim.verdict == verdict and text in claim.text


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
    captions = dict(re.findall(r"\(figures/(\w+)\.png\)\n\n\*[^*]+\* Data: (.*); drawn by", page))
    drawn = {name: re.findall(r"experiments/(\w+)\.py", data) for name, data in captions.items()}
    assert drawn == {name: ["rank_code", "rank_text"] for name in FIGURES} | {"balancing": ["balance"]}
    assert len(re.findall(r"^### .+: (confirmed|not confirmed|undecided)$", page, re.MULTILINE)) == 11
    assert "nan" not in page and "None" not in page
    assert (
        "| 9: 3 seeds of R = 1 / R = 2 / R = 4 |" in page
        and "| 8: 3 seeds of R = 1 / R = 2; 2 seeds of R = 4 |" in page
    )
    assert re.search(
        r"^\| squared, R = 4 \| none, R = 4 \| -0\.3\d\d \[.* \| \+0\.\d+ \[.*x \[.*\| 3 seeds, 40", page, re.M
    )
    interval = r"(?:, )?\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]"
    assert re.search(rf"^\| R = 4 \| kept, T = 0\.7 \| (?:{interval}){{3}} \|$", page, re.MULTILINE)
    # Loss falls by 0.3 with each doubling, and tokens per forward rise by 0.2 from 1.8, times 0.93 at T = 0.7.
    (end,) = re.findall(r"^\| R = 4 \| 3 \| ([\d.]+) \| ([\d.]+) \|.*?\| 3\.00 \| 1\.00 \|(.*)$", page.split(
        "### rank_code (cpu)\n")[1].split("###")[0], re.MULTILINE)  # fmt: skip
    kept = [float(cell) for cell in end[2].split("|")[:3]]
    assert kept[0] > kept[1] > kept[2] and kept[1] == pytest.approx(2.2 * 0.93, abs=0.05)
    assert (
        float(end[0]) == pytest.approx(9 - 0.6, abs=0.5) and end[1] != end[0] and end[2].split("|")[-2].strip() == "120"
    )
    best = r"^\* rank_code \(cpu\): R = 4 \(`window` 4, .*\. Beside R = 1, R = 4 has 1\.\d+x \[1\.\d+, 1\.\d+\] its"
    assert re.search(best, page, re.MULTILINE)


def test_a_sweep_whose_reference_has_not_run_yet_has_a_page(load):
    found = load(results(ranks=(2, 4)))
    page = markdown(found, {}, "the command")
    assert low_overhead(found).verdict == faster(found).verdict == "undecided" and "of it)" not in page
    assert "| rank_code (cpu) | R = 4 |" in page and "nothing to recommend yet" in page and "nan" not in page


def test_ranks_of_heads_of_another_kind_are_a_sweep_over_rank(tmp_path):
    value = results()
    for run in value["runs"]:
        run["changes"] = {"case": f"kind-{run['config']['head']['rank']}", "seed": run["changes"]["seed"]}
    value |= {"fields": ["case", "seed"], "reference": {"case": "kind-1"}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    page = write_page([tmp_path / "a.json"], tmp_path / "out").read_text()
    assert "| rank_code (cpu) | kind-4 |" in page and "* rank_code (cpu): kind-4 (`window` 4, `rank` 4, " in page
    assert (tmp_path / "out" / "figures" / "loss_by_rank.png").exists()
    # Not so where they are compared with another rank.
    (tmp_path / "a.json").write_text(json.dumps(value | {"reference": {"case": "kind-2"}}))
    assert not load_results([tmp_path / "a.json"])[0].over_rank


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"kept": 0.4},
            "some rank above 1 is faster, and the project's own bar of 1.10x on code is met (judged: R = 2, R = 4).",
        ),
        (
            {"seeds": (0,)},
            "it is undecided, and the project's own bar of 1.10x on code is undecided (judged: none has two seeds).",
        ),
        (
            {"verify": 0.5},
            "none above 1 is faster, and the project's own bar of 1.10x on code is not met (judged: R = 2, R = 4).",
        ),
        ({"source": "text"}, "some rank above 1 is faster (judged: R = 2, R = 4)."),
    ],
)
def test_what_is_faster_is_said_of_each_file(load, changes, words):
    assert f"In rank_code (cpu) {words}" in faster(load(results(**changes))).text


def test_a_page_names_every_size_of_a_sweep_and_how_fast_it_is(tmp_path):
    value = results(ranks=(1, 4))
    value["runs"] += results(ranks=(1, 4), d_model=32)["runs"]
    for run, size in zip(value["runs"], 6 * ["wide"] + 6 * ["slim"], strict=True):
        run["changes"]["case"] = size
    value["fields"] = ["case", *value["fields"]]
    (tmp_path / "a.json").write_text(json.dumps(value))
    page = write_page([tmp_path / "a.json"], tmp_path / "out").read_text()
    assert re.search(r"\| \d x 64, V = \d+; \d x 32, V = \d+ \|", page)
    rows = re.findall(r"^\| rank_code \(cpu\) \| \d x (\d+) \| 4 \|.*\| \d\.\d+x \[", page, re.MULTILINE)
    assert rows == ["32", "64"]


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


def test_where_no_rank_is_faster_rank_1_is_recommended(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(results(verify=0.5)))
    assert "* rank_code (cpu): R = 1 (`window` 4, " in write_page([tmp_path / "a.json"], tmp_path / "out").read_text()


def test_a_rank_that_is_surely_faster_is_recommended_though_another_may_be_faster_yet(load):
    value = results(kept=0.4)
    value["runs"] = [run for run in value["runs"] if run["changes"]["head.rank"] != 4 or run["changes"]["seed"] == 0]
    assert "* rank_code (cpu): R = 2 (" in recommendation(load(value))


def test_a_window_is_shown_whatever_it_holds():
    assert _code("a`b") == "`` a`b ``" and _code("\x00") == "`\\x00`" and math.isfinite(len(_code("|")))
