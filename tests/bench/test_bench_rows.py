"""Rows of the decode benchmark: what one says follows from what was timed."""

import dataclasses

import numpy as np
import pytest

from mtp_jax.bench import cells as bench
from mtp_jax.bench.cells import Cell
from mtp_jax.bench.config import BenchConfig
from mtp_jax.decode.verify import VERIFIERS
from support.generations import generation

PLAIN = Cell(
    *(0.7, 0, "coupled", "float32", 1, False, False),
    [[generation(range(9), 8), generation(range(20, 29), 8)]] * 3,
    [[2.0, 3.0], [3.0, 1.0], [1.5, 1.5]],
)
DRAFTED = Cell(
    *(0.7, 2, "coupled", "float32", 1, False, False),
    [[generation(range(9), 5, [3, 1]), generation(range(20, 29), 3, [2, 2])]] * 3,
    [[4.0, 4.0], [1.0, 1.5], [1.5, 0.5]],
)
COUNTS = (5, [3, 1]), (8, [0, 0]), (2, [2, 2])


def no_gap(*args):
    pytest.fail("no row differs")


def test_a_row_is_the_arithmetic_of_what_was_measured():
    assert bench.row(DRAFTED, PLAIN, PLAIN, no_gap) == {
        "batch": 1,
        "temperature": 0.7,
        "k": 2,
        "auto": False,
        "verifier": "coupled",
        "dtype": "float32",
        "plain_dtype": "float32",
        "tokens_per_second": 16 / 2.5,  # the first token of each prompt comes from prefill, which is not timed
        "speedup": 1.5,
        "speedup_next_token": None,
        "speedups": [5 / 8, 1.6, 1.5],  # 5 seconds against 8, 4 against 2.5, 3 against 2
        "block_efficiency": 2.0,
        "acceptance": [5 / 8, 3 / 8],
        "verify_cost": 4 / 3,  # 2 seconds for 8 forwards against 3 for 16
        "iteration_seconds": [8 / 8, 2.5 / 8, 2 / 8],
        "identical_to_plain": True,
        "rows_that_differ": 0,
        "logit_gap": None,
    }
    row = bench.row(PLAIN, PLAIN, PLAIN, no_gap)
    assert row["tokens_per_second"] == 4 and row["acceptance"] == []
    assert row["speedup"] == row["verify_cost"] == row["block_efficiency"] == 1 and row["identical_to_plain"]


@pytest.mark.parametrize("seconds, median", [([2.0], 2.0), ([2.0, 4.0], 3.0), ([8.0, 1.0, 4.0], 4.0)])
def test_times_are_medians_over_repetitions(seconds, median):
    cell, plain = repeated(DRAFTED, seconds), repeated(PLAIN, [2.0] * len(seconds))
    row = bench.row(cell, plain, plain, no_gap)
    assert row["tokens_per_second"] == 16 / median
    assert row["verify_cost"] == median and row["speedup"] == np.median(2 / np.array(seconds))


def repeated(cell, seconds):
    return dataclasses.replace(
        cell, batch_seconds=[[of] for of in seconds], generations=cell.generations[:1] * len(seconds)
    )


def test_ratios_are_medians_of_ratios():
    """A machine that is slow in one repetition is slow for all: tokens/s are those of one and of the other here."""
    cell, plain = repeated(DRAFTED, [1.0, 9.0, 4.0]), repeated(PLAIN, [2.0, 18.0, 3.0])
    row = bench.row(cell, plain, plain, no_gap)
    assert row["speedup"] == 2 and row["verify_cost"] == 1
    assert row["tokens_per_second"] == 4 and plain.rate == 16 / 3


def test_a_speed_up_counts_the_tokens_of_its_repetition():
    """In bfloat16 the tokens of another k can differ, and with them where a row ends."""
    cell = dataclasses.replace(
        DRAFTED, generations=[[generation(range(n), 8)] for n in (9, 5, 5)], batch_seconds=[[1.0]] * 3
    )
    plain = repeated(dataclasses.replace(PLAIN, generations=[[generation(range(9), 8)]]), [1.0] * 3)
    assert bench.row(cell, cell, plain, no_gap)["speedup"] == 0.5


def test_a_batch_takes_as_many_iterations_as_its_slowest_row():
    uneven = dataclasses.replace(generation(range(9), 5, [3, 1], batch=2), forwards=np.array([5, 3]))
    cell = dataclasses.replace(DRAFTED, batch=2, generations=[[uneven]], batch_seconds=[[2.5]])
    row = bench.row(cell, cell, repeated(PLAIN, [4.0]), no_gap)
    assert row["tokens_per_second"] == 16 / 2.5 and row["block_efficiency"] == 2.0
    assert row["verify_cost"] == 2.5 / 5 / (4 / 16)


def test_each_repetition_has_forwards_of_its_own():
    """A machine of another rounding accepts other drafts."""
    generations = [[generation(range(9), 8, [0, 0])], [generation(range(9), 4, [3, 1])]]
    cell = dataclasses.replace(DRAFTED, generations=generations, batch_seconds=[[4.0]] * 2)
    row = bench.row(cell, cell, repeated(PLAIN, [4.0, 4.0]), no_gap)
    assert row["iteration_seconds"] == [0.5, 1.0] and row["block_efficiency"] == 16 / 12
    assert row["acceptance"] == [3 / 12, 1 / 12] and row["tokens_per_second"] == 2


def parted(tokens):
    """What is said of a cell whose first row is `tokens`; the gap at position n is n / 2."""
    asked = []

    def gap(cell, index, shared, own, other):
        asked.append((index, shared.tolist(), own, other))
        return len(shared) / 2

    cell = dataclasses.replace(DRAFTED, generations=[[generation(tokens, 5, [3, 1]), DRAFTED.generations[0][1]]] * 3)
    row = bench.row(cell, PLAIN, PLAIN, gap)
    return [row[name] for name in ("identical_to_plain", "rows_that_differ", "logit_gap")], asked


def test_the_gap_is_asked_for_where_a_row_parts():
    assert parted([*range(8), 0]) == ([False, 1, 4.0], [(0, [*range(8)], 8, 0)])
    assert parted([0, 7, *range(2, 9)]) == ([False, 1, 0.5], [(0, [0], 1, 7)]), "the first place, not another"
    for ended_elsewhere in (range(8), range(10)):
        assert parted(ended_elsewhere) == ([False, 1, None], [])


def test_the_gap_of_a_row_is_the_largest_of_all_prompts():
    others = [generation([*range(at), 0, *range(at + 1, 9)], 5, [3, 1]) for at in (3, 6, 2)]
    plain = dataclasses.replace(PLAIN, generations=[[PLAIN.generations[0][0]] * 3] * 3)
    cell = dataclasses.replace(DRAFTED, generations=[others] * 3)
    row = bench.row(cell, plain, plain, lambda cell, index, shared, own, other: float(len(shared)))
    assert (row["rows_that_differ"], row["logit_gap"]) == (3, 6.0)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_identity_is_said_of_verifiers_that_promise_it(verifier):
    cell = dataclasses.replace(DRAFTED, verifier=verifier)
    row = bench.row(cell, PLAIN, PLAIN, no_gap)
    promised = {"greedy": True, "coupled": True}.get(verifier)
    assert (row["identical_to_plain"], row["rows_that_differ"]) == (promised, 0 if promised else None)


def test_rows_are_compared_with_plain_decoding_in_their_own_setting():
    settings = [(0.0, "greedy", 1), (0.7, "coupled", 1), (0.7, "block", 1), (0.7, "block", 4)]
    cells = [
        Cell(temperature, k, verifier, dtype, batch, False, False, [[generation(range(9), 8)]], [[seconds]])
        for temperature, verifier, batch in settings
        for k, dtype, seconds in [(0, "float32", 4.0), (1, "float32", 1.0), (0, "bfloat16", 2.0 + 4 * (batch == 4))]
    ]
    for i, cell in enumerate(cells):
        plain, other = cells[i // 3 * 3], cells[i // 3 * 3 + 2]
        assert bench.plain(cells, cell) is (other if cell.dtype == "bfloat16" else plain), "its tokens: its own dtype"
        assert bench.fastest(cells, cell) is (plain if cell.batch == 4 else other), "its speed: the fastest"
    row = bench.row(cells[1], cells[0], cells[2], no_gap)
    assert (row["dtype"], row["plain_dtype"], row["speedup"]) == ("float32", "bfloat16", 2.0)


def test_categories_are_measured_for_themselves_and_the_mean_counts_each_once():
    """Two prompts are of one category and one is of the other, which drafts serve."""
    tokens = [range(9), range(20, 29), range(40, 49)]
    of_plain = [generation(of, 8) for of in tokens]
    of_drafted = [generation(of, *counts) for of, counts in zip(tokens, COUNTS, strict=True)]
    plain = dataclasses.replace(PLAIN, generations=[of_plain] * 2, batch_seconds=[[2.0, 3.0, 3.0], [4.0, 6.0, 8.0]])
    drafted = dataclasses.replace(
        DRAFTED, generations=[of_drafted] * 2, batch_seconds=[[2.0, 3.0, 1.0], [4.0, 6.0, 1.0]]
    )
    code, chat, mean = bench.category_rows(drafted, plain, {"code": [0, 1], "chat": [2]})
    setting = {"batch": 1, "temperature": 0.7, "k": 2, "auto": False, "verifier": "coupled"}
    for row, category, prompts in ((code, "code", 2), (chat, "chat", 1), (mean, None, 3)):
        assert row.items() >= {**setting, "category": category, "prompts": prompts, "plain_dtype": "float32"}.items()
    assert (code["tokens_per_second"], code["speedup"], code["block_efficiency"]) == (16 / 7.5, 1.0, 16 / 13)
    assert (chat["tokens_per_second"], chat["speedup"], chat["block_efficiency"]) == (8.0, 5.5, 4.0)
    assert (code["acceptance"], chat["acceptance"]) == ([3 / 13, 1 / 13], [1.0, 1.0])
    assert mean["speedup"] == 3.25 and mean["block_efficiency"] == (16 / 13 + 4) / 2
    assert mean["acceptance"] == pytest.approx([8 / 13, 7 / 13])
    (*_, nothing) = bench.category_rows(plain, plain, {"code": [0, 1], "chat": [2]})
    assert nothing["acceptance"] == [] and nothing["speedup"] == 1.0


def test_a_marginal_run_is_compared_with_a_plain_table_too():
    """In the dtype that is fastest for that, prompt for prompt; nothing else is compared with it."""
    cells = bench.grid(BenchConfig(temperatures=(0.7,)), 1, "float32", [0, 2], next_token=True)
    cells += bench.grid(BenchConfig(temperatures=(0.7,)), 1, "bfloat16", [0, 2], next_token=True)
    assert [(cell.k, cell.next_token) for cell in cells] == [(0, False), (2, False), (0, True)] * 2
    for cell, seconds in zip(cells, (8.0, 2.0, 4.0, 9.0, 9.0, 1.0), strict=True):
        cell.generations, cell.batch_seconds = [[generation(range(9), 8)] * 2], [[seconds / 4, seconds * 3 / 4]]
    assert bench.ordinary(cells, cells[1]) is cells[5] and bench.fastest(cells, cells[5]) is cells[0]
    assert bench.plain(cells, cells[1]) is cells[0] and bench.ordinary(cells[:2], cells[1]) is None
    row = bench.row(cells[1], cells[0], cells[0], no_gap, cells[5])
    assert (row["speedup"], row["speedup_next_token"]) == (4.0, 0.5)
    own = bench.row(cells[5], None, cells[0], no_gap, cells[5])
    assert (own["speedup"], own["speedup_next_token"], own["identical_to_plain"]) == (8.0, 1.0, None)
    cells[5].batch_seconds = [[0.5, 0.5]]
    code, chat, mean = bench.category_rows(cells[1], cells[0], {"code": [0], "chat": [1]}, cells[5])
    found = [of["speedup_next_token"] for of in (code, chat, mean)]
    assert found == [1.0, 1 / 3, pytest.approx(2 / 3)]
    assert bench.category_rows(cells[1], cells[0], {"code": [0]})[-1]["speedup_next_token"] is None


def test_k_auto_is_a_cell_of_its_own_and_never_what_others_are_compared_with():
    config = BenchConfig(temperatures=(0.0, 0.7), verifiers=("block",), auto=True)
    cells = bench.grid(config, 1, "float32", [0, 2])
    found = [(cell.temperature, cell.verifier, cell.k, cell.auto) for cell in cells]
    each = [(0, False), (2, False), (0, True)]
    assert found == [(t, v, k, auto) for t, v in ((0.0, "greedy"), (0.7, "block")) for k, auto in each]
    for cell in cells:
        cell.generations, cell.batch_seconds = [[generation(range(9), 8)]], [[1.0 if cell.auto else 2.0]]
    assert bench.plain(cells[::-1], cells[1]) is bench.fastest(cells, cells[2]) is cells[0]
    rows = [bench.row(cell, cells[0], cells[0], no_gap) for cell in cells[:3]]
    assert [row["auto"] for row in rows] == [False, False, True] and rows[2]["speedup"] == 2
