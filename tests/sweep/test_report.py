"""Results of sweeps: what is refused, intervals and their coverage, and the page of any sweep."""

import json
import re

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.sweep.compare import Estimate, compare, estimated, joint_loss, over
from mtp_jax.sweep.report import _figure, readings_of, speeds, write_report
from mtp_jax.sweep.results import load_results
from mtp_jax.validate import ConfigError
from support import REPOSITORY
from support.results import results


@pytest.fixture
def load(tmp_path):
    """Results files as they are read."""

    def write(*values):
        paths = [tmp_path / f"{index}.json" for index in range(len(values))]
        for path, value in zip(paths, values, strict=True):
            path.write_text(json.dumps(value))
        return load_results(paths)

    return write


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


def test_an_interval_over_two_looks_is_as_wide_as_over_two_tests(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(results()))
    once, twice = (load_results([tmp_path / "a.json"], looks)[0] for looks in (1, 2))
    own, other = (compare(found, (4,), "steps", joint_loss) for found in (once, twice))
    assert own and other and other.interval() == own.interval(2) and other.how.endswith(", 2 looks")
    with pytest.raises(ConfigError, match="looks is 0; give how often the results were looked at, 1 or more"):
        load_results([tmp_path / "a.json"], 0)


def sweep_over_rates(**options):
    """A user's own sweep, over learning rates, of a head without components; loss falls by 0.3 with each doubling."""
    value = results(sweep="rates", **options)
    for run in value["runs"]:
        doublings = run["changes"].pop("head.rank")
        run["changes"]["optimizer.learning_rate"] = run["config"]["optimizer"]["learning_rate"] = 1e-3 * doublings
        run["config"]["head"] = {"kind": "sequential", "window": 4, "target": "ntp"}
        run["readings"] = dict.fromkeys(run["readings"], 480)
        for found in run["measured"].values():
            del found["gate"], found["components"]
    return value | {"fields": ["optimizer.learning_rate", "seed"], "reference": {"optimizer.learning_rate": 1e-3}}


def report(tmp_path, *values, options=()):
    """The page that the command writes of results files."""
    paths = [str(tmp_path / f"{index}.json") for index in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        (tmp_path / path).write_text(json.dumps(value))
    main(["report", *paths, "--out", str(tmp_path / "out"), *options])
    return (tmp_path / "out" / "report.md").read_text()


def test_any_sweep_has_a_page_with_a_row_for_each_variant(tmp_path, capsys):
    page = report(tmp_path, sweep_over_rates(noise=0.0))
    assert f"Wrote {tmp_path / 'out' / 'report.md'}" in capsys.readouterr().out
    (header, _, *rows), (offsets, _, *by_offset) = (
        re.findall(r"^\| (.*) \|$", table, re.MULTILINE) for table in page.split("By offset:")
    )
    names = header.split(" | ")
    assert names[:3] == ["run", "seeds", "joint loss"]
    assert offsets.split(" | ") == ["run", "loss", "drafts kept, T = 0.7"]  # no components are known
    assert [row.split(" | ")[0] for row in by_offset] == [row.split(" | ")[0] for row in rows]
    cells = [dict(zip(names, row.split(" | "), strict=True)) for row in rows]
    assert [of["run"] for of in cells] == [f"optimizer.learning_rate = {rate}" for rate in (0.001, 0.002, 0.004)]
    assert [of["seeds"] for of in cells] == ["3, **reference**", "3", "3"]
    interval = r"\[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]"
    for of, doublings in zip(cells[1:], (1, 2), strict=True):
        assert re.fullmatch(rf"-0\.{3 * doublings}00 {interval}", of["joint loss"])
        assert re.fullmatch(rf"\+0\.[1-4]\d\d {interval}", of["tokens per forward, T = 0.7"])
        assert of["training step"] == f"1.{doublings}0x +- 0.01"
    first = "At equal wall-clock, T = 0.7: most tokens per forward: learning_rate = 0.004, +"
    assert f"\n{first}{cells[2]['tokens per forward, T = 0.7'][1:]} over the reference (3 seeds, " in page
    assert not re.match(r"[+-]", cells[0]["joint loss"]) and cells[0]["training step"] == "100 ms"
    assert page.count("\n### At equal steps, equal training FLOPs, equal wall-clock\n") == 1 == page.count("\n### ")
    assert (tmp_path / "out" / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert f"`mtp-jax report {tmp_path / '0.json'} --out {tmp_path / 'out'}`" in page
    assert "nan" not in page and "None" not in page


def test_a_page_says_whether_drafts_pay(tmp_path):
    """In one of the committed results they do, in the other they cost more than they give."""
    pages = {}
    for name in ("heads-bytes", "heads-cpu"):
        file = REPOSITORY / "experiments" / "results" / f"{name}.json"
        pages[name] = write_report([file], tmp_path / name).read_text()
    assert "; fastest: medusa with k = 3, 1.21 times plain decoding." in pages["heads-bytes"]
    assert "; none is faster than plain decoding." in pages["heads-cpu"]


def test_a_page_of_a_second_look_says_so_and_has_wider_intervals(tmp_path):
    found = [report(tmp_path, sweep_over_rates(), options=options) for options in ((), ("--looks", "2"))]
    assert "for one look at the data." in found[0] and "for all 2 looks together." in found[1]
    widths = []
    for page in found:
        low, high = re.findall(r"^\| optimizer\.learning_rate = 0\.004 \|.*? \[(.*?), (.*?)\]", page, re.MULTILINE)[0]
        widths.append(float(high) - float(low))
    assert widths[1] > 1.2 * widths[0] and found[1].endswith("--looks 2`.\n")


def test_what_is_known_of_components_is_shown(tmp_path):
    page = report(tmp_path, results(lengths=True))
    assert re.search(r"^\| run \| loss \|.*\| components in effect \|$", page, re.MULTILINE)
    # Three readings of one run, and the lengths, which are where one of them is too or another.
    assert re.findall(r"^### At (.*)$", page, re.MULTILINE) == [
        "equal steps", "equal training FLOPs, equal wall-clock, `half`", "`quarter`",
    ]  # fmt: skip


def test_speeds_are_of_iterations_that_were_timed_together(load, tmp_path):
    value = results(ranks=(1, 4), noise=0.0)
    (found,) = load(value)
    for point in found.points:
        rates = speeds(found, point, "seconds", 0.7)
        assert list(rates) == [0, 1, 2, 3] and rates[0] == pytest.approx(1 / (0.0019 * 1.03))  # in the faster dtype
        run = found.of(point)[0]
        (row,) = [row for row in run.at("seconds")["decoding"] if row["k"] == 3]
        tokens = sum(row["documents"]["emitted"]) / sum(row["documents"]["forwards"])
        (timed,) = [row for row in run.raw["cost"]["decoding"] if row["k"] == 3]
        assert rates[3] == pytest.approx(tokens / np.median(timed["iteration_seconds"]))
    k = max(rates, key=rates.get)
    page = report(tmp_path, value)
    assert "| tokens/s, T = 0.7 | over plain decoding, T = 0.7 |" in page
    assert f"| {rates[k]:,.0f} (k = {k}) | {rates[k] / rates[0]:.2f} |" in page


def test_a_variant_is_named_by_all_that_it_changes(tmp_path):
    cases = {"a": {"head.balance": "none", "model.width": [1, 2]}, "b": {"head.balance": "squared", "head.width": 3}}
    page = report(tmp_path, results(ranks=(4,), cases=cases))
    a, b = "head.balance = none, model.width = [1, 2]", "head.balance = squared, head.width = 3"
    assert f"| case | changes |\n| --- | --- |\n| a | {a} |\n| b | {b} |" in page
    assert "| a, head.rank = 4 | 3, **reference** |" in page
    assert "| b, head.rank = 4 | 3 |" in page


def test_others_may_be_compared_with(load, tmp_path):
    """Differences are to the run that is named; what was equal at equal cost stays so."""
    value = results(ranks=(1, 2, 4))
    (tmp_path / "a.json").write_text(json.dumps(value))
    own, other = (load_results([tmp_path / "a.json"], 1, given)[0] for given in ({}, {"head.rank": "2"}))
    assert own.reference((4,)) == (1,) and other.reference((4,)) == (2,)
    assert own.share((4,), "seconds") == other.share((4,), "seconds")
    a, b = (compare(own, (rank,), "steps", joint_loss) for rank in (2, 4))
    c = compare(other, (4,), "steps", joint_loss)
    assert c.mean == pytest.approx(b.mean - a.mean)
    page = report(tmp_path, value, options=("--reference", "head.rank=2"))
    assert "reference: `head.rank` 2;" in page and page.rstrip().endswith("--reference head.rank=2`.")
    assert "| head.rank = 2 | 3, **reference** |" in page
    with pytest.raises(ConfigError, match=r"reference is head\.rank=3, and .* has the values 1, 2, 4"):
        load_results([tmp_path / "a.json"], 1, {"head.rank": "3"})
    with pytest.raises(ConfigError, match=r"reference is case=a, and .* has no such run; it has head\.rank"):
        load_results([tmp_path / "a.json"], 1, {"case": "a"})


def test_a_field_may_have_lists_for_values(load):
    value = results(ranks=(1, 2))
    value |= {"fields": ["betas", "seed"], "reference": {"betas": [0.9, 1]}}
    for run in value["runs"]:
        run["changes"]["betas"] = [0.9, run["changes"].pop("head.rank")]
    (found,) = load(value)
    assert found.points == [((0.9, 1),), ((0.9, 2),)] and found.reference(found.points[1]) == ((0.9, 1),)
    e = compare(found, ((0.9, 2),), "steps", joint_loss)
    assert e and e.seeds == 3


def test_runs_that_failed_are_listed_and_a_missing_reference_leaves_no_differences(tmp_path):
    value = results(ranks=(2, 4))
    value["runs"][-2] = {"name": "rank=2,seed=2", "changes": {"head.rank": 2, "seed": 2}, "state": "failed",
                         "error": "no memory"}  # fmt: skip
    page = report(tmp_path, value)
    assert "| rank=2,seed=2 | no memory |" in page and "joint loss |" not in page and "nan" not in page
    assert re.findall(r"^\| head\.rank = (\d) \| (\d) \| ", page, re.MULTILINE)[:2] == [("2", "2"), ("4", "3")]


def test_a_sweep_without_a_reference_or_speeds_shows_what_each_variant_has(tmp_path):
    value = sweep_over_rates() | {"reference": {}}
    for run in value["runs"]:
        run["cost"]["decoding"] = []
    page = report(tmp_path, value)
    assert page.count("**reference**") == 3 and "; reference: none;" in page and "tokens/s, T" not in page


def test_the_figure_draws_the_differences(load):
    found = load(results(), sweep_over_rates(seeds=(0,)))
    assert [list(readings_of(of)) for of in found] == [["steps", "flops"], ["steps"]]
    axes = _figure(found).axes
    assert [of.get_title(loc="left") for of in axes] == ["rank_code (cpu)", "", "rates (cpu)", ""]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["R = 1 (ref.)", "R = 2", "R = 4"]
    drawn = [float(container.lines[0].get_xdata()[0]) for container in axes[0].containers]
    expected = [compare(found[0], (rank,), reading, joint_loss) for reading in ("steps", "flops") for rank in (2, 4)]
    assert drawn == pytest.approx([e.mean for e in expected])
    assert len(axes[2].containers) == 2 and axes[2].containers[0].lines[0].get_markerfacecolor() == "white"
