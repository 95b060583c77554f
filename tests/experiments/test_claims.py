"""The claims of the paper: verdicts on known effects and on the committed results, the page and its figures."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.claims import data
from experiments.claims.__main__ import main
from experiments.claims.claim import TOKENS_T
from experiments.claims.claims import balance, claims, lower_loss, more_acceptance, rises
from experiments.claims.figures import FIGURES
from experiments.claims.page import _code, markdown, recommendation, write_page
from experiments.claims.speed import faster, low_overhead
from experiments.claims.verdict import TOKENS, equal, holds, judge
from mtp_jax.sweep.compare import Estimate
from support.results import results

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def load(tmp_path):
    """Results files as they are read."""

    def write(*values):
        paths = [tmp_path / f"{index}.json" for index in range(len(values))]
        for path, value in zip(paths, values, strict=True):
            path.write_text(json.dumps(value))
        return data.load(paths)

    return write


@pytest.fixture
def verdicts(load):
    """The verdict on every claim, by a word of its title."""

    def of(*values):
        found = {claim.title: claim.verdict for claim in claims(load(*values))}
        return lambda word: next(verdict for title, verdict in found.items() if word in title)

    return of


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


estimates = st.builds(
    Estimate,
    mean=st.floats(-1, 1),
    seeds=st.integers(1, 6),
    documents=st.just(40),
    seed_error=st.floats(0, 0.5),
    error=st.floats(0, 0.5),
    looks=st.integers(1, 3),
)
USELESS = Estimate(0.01, 3, 40, 1e-4, 1e-4)  # surely there, and surely of no use


@given(st.lists(estimates, max_size=4), st.floats(0, 0.1))
@example([USELESS], TOKENS)
def test_no_interval_is_both_confirmed_and_a_failure(found, useful):
    known = [e for e in found if e.seeds > 1]
    confirmed = any(e.interval(len(known))[0] > useful for e in known)
    failed = bool(known) and all(e.interval()[1] < useful for e in known)
    assert not (confirmed and failed)
    verdict = "confirmed" if confirmed else "not confirmed" if failed else "undecided"
    assert judge([holds(found, useful)]) == verdict


@given(st.lists(estimates, max_size=4), st.floats(0.001, 0.1))
def test_no_interval_is_both_equal_and_different(found, margin):
    bounds = [e.interval(len(found)) for e in found if e.seeds > 1]
    same = bool(bounds) and all(-margin <= low and high <= margin for low, high in bounds)
    different = any(low > margin or high < -margin for low, high in bounds)
    assert not (same and different)
    assert equal(found, margin) is (True if same else False if different else None)


def test_an_effect_that_is_surely_there_and_of_no_use_is_a_failure():
    low, high = USELESS.interval()
    assert low > 0 and high < TOKENS and holds([USELESS], TOKENS) is False


def test_a_data_set_that_was_looked_at_twice_has_the_level_divided(load):
    twice, once = (load(results(freeze="none", sweep=sweep))[0] for sweep in ("scratch_code", "rank_code"))
    (wide, *_), (narrow, *_) = (data.differences(found, "steps", TOKENS_T) for found in (twice, once))
    assert (wide.looks, narrow.looks) == (2, 1) and wide.interval() == pytest.approx(narrow.interval(2))
    assert "scratch_code (cpu) was looked at 2 times: three seeds left acceptance" in markdown([twice], {}, "")


def test_the_verdicts_on_the_committed_results():
    found = data.load(sorted((REPOSITORY / "experiments" / "results").glob("*.json")))
    assert {claim.title.partition(" (this")[0]: claim.verdict for claim in claims(found)} == {
        "Rank above 1 lowers the joint loss": "confirmed",
        "Rank above 1 raises acceptance": "confirmed",
        "The loss of the first token does not depend on rank": "undecided",
        "Rank above 1 speeds up the generation of text and code": "undecided",
        "The overhead of rank is low": "not confirmed",
        "What rank gives holds across model sizes": "confirmed",
        "What rank gives holds as training goes on": "confirmed",
        "It works from scratch and with heads on a frozen trunk": "undecided",
        "Without load balancing the components collapse, and balancing helps": "not confirmed",
        "About two drafts are accepted on average in code generation": "not confirmed",
        "Conditioning the head on the token that the target chose raises acceptance": "confirmed",
    }
    (scratch,) = data.rank_sweeps(found, frozen=False)
    e = data.differences(scratch, "steps", TOKENS_T)[0]
    assert e and f"{e:+.3f}" == "+0.167 [-0.029, +0.363]" and rises(scratch, "steps") is None


def test_a_file_that_is_not_of_results_ends_with_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "a.json"), "--out", str(tmp_path)])
    assert end.value.code == 2 and f"There is no results file {tmp_path / 'a.json'}" in capsys.readouterr().err


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


@pytest.mark.slow
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
    main([*paths, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"Wrote {tmp_path / 'out' / 'report.md'}" in capsys.readouterr().out
    for value in values:
        assert f"`{value['command']}`" in page
    assert f"`python -m experiments.claims {' '.join(paths)} --out {tmp_path / 'out'}`" in page
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
    assert not data.load([tmp_path / "a.json"])[0].over_rank


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
