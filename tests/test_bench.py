"""The decode benchmark: what a row says follows from what was timed, and only decoding is timed.

No model runs here. The decoder is a fake whose every part takes a known time on a clock that only the fake moves.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from mtp_jax.bench import decode as bench
from mtp_jax.bench.decode import Cell, bench_decode, held_out_prompts
from mtp_jax.commands import parse
from mtp_jax.commands.bench import Decode
from mtp_jax.config import BenchConfig, ConfigError
from mtp_jax.data import Documents, Store
from mtp_jax.decode.generate import Generation
from mtp_jax.train.step import build_model


def generation(tokens, forwards, accepted=()):
    """Of one row, which used all drafts in every forward."""
    accepted_1k = np.array([accepted], np.int32).reshape(1, -1)
    return Generation(
        tokens=[np.array(tokens)],
        forwards=np.array([forwards]),
        accepted=accepted_1k,
        drafted=np.full_like(accepted_1k, forwards),
        logprobs=[np.zeros(len(tokens))],
        finite=np.array([True]),
    )


def documents(split, first, lengths):
    """Documents whose token i is `first + i`."""
    offsets = np.cumsum([0, *lengths])
    names = [f"{split}{i}" for i in range(len(lengths))]
    return Documents(split, np.arange(first, first + offsets[-1], dtype=np.uint16), offsets, names)


@pytest.fixture
def store(tmp_path):
    """Tokens below 1000 are for training, the others are held out, of which 2, 3 and 5 are too short."""
    return Store(tmp_path, {}, documents("train", 0, [50] * 9), documents("valid", 1000, [9, 12, 7, 8, 20, 1, 9, 30]))


# Rows


PLAIN = Cell(0.7, 0, "coupled", [generation(range(9), 8), generation(range(20, 29), 8)], [5.0, 4.0, 3.0])
DRAFTED = Cell(
    *(0.7, 2, "coupled"),
    [generation(range(9), 5, [3, 1]), generation(range(20, 29), 3, [2, 2])],
    [9.0, 2.5, 2.0],
)


def test_a_row_is_the_arithmetic_of_what_was_measured():
    assert bench._row(DRAFTED, PLAIN, "float32") == {
        "batch": 1,
        "temperature": 0.7,
        "k": 2,
        "verifier": "coupled",
        "dtype": "float32",
        "tokens_per_second": 16 / 2.5,  # the first token of each prompt comes from prefill, which is not timed
        "speedup": 1.6,
        "block_efficiency": 2.0,
        "acceptance": [5 / 8, 3 / 8],
        "verify_cost": 1.25,  # 2.5 seconds for 8 forwards against 4 for 16
        "identical_to_plain": True,
    }
    row = bench._row(PLAIN, PLAIN, "float32")
    assert row["tokens_per_second"] == 4 and row["acceptance"] == []
    assert row["speedup"] == row["verify_cost"] == row["block_efficiency"] == 1 and row["identical_to_plain"]


@pytest.mark.parametrize("seconds, median", [([2.0], 2.0), ([2.0, 4.0], 3.0), ([8.0, 1.0, 4.0], 4.0)])
def test_times_are_medians_over_repetitions(seconds, median):
    row = bench._row(Cell(0.7, 2, "coupled", DRAFTED.generations, seconds), PLAIN, "float32")
    assert row["tokens_per_second"] == 16 / median
    assert row["speedup"] * row["verify_cost"] == pytest.approx(row["block_efficiency"])


@pytest.mark.parametrize("tokens", [[*range(8), 0], range(8), range(10)], ids=["another", "fewer", "more"])
def test_one_other_token_is_not_identical(tokens):
    cell = Cell(0.7, 2, "coupled", [generation(tokens, 5, [3, 1]), DRAFTED.generations[1]], [2.5])
    assert bench._row(cell, PLAIN, "float32")["identical_to_plain"] is False


def test_rows_are_compared_with_plain_decoding_at_their_own_temperature():
    cells = [Cell(temperature, k, "") for temperature in (0.0, 0.7) for k in (0, 1)]
    assert [bench._plain(cells, cell) for cell in cells] == [cells[0], cells[0], cells[2], cells[2]]


# Prompts


def test_prompts_are_beginnings_of_held_out_documents(store):
    prompts = held_out_prompts(store, 5, 8)
    names = [name for name, _ in prompts]
    assert sorted(names) == [f"valid{i}" for i in (0, 1, 4, 6, 7)] and set(names) <= set(store.valid.names)
    for name, tokens in prompts:
        begin = 1000 + store.valid.offsets[store.valid.names.index(name)]
        assert tokens.tolist() == list(range(begin, begin + 8))


def test_prompts_depend_on_the_seed_and_on_nothing_else(store):
    def names(count, seed):
        return [name for name, _ in held_out_prompts(store, count, 8, seed)]

    assert names(5, 3) == names(5, 3) and names(2, 3) == names(5, 3)[:2]
    assert len({tuple(names(3, seed)) for seed in range(20)}) > 10


def test_more_prompts_than_there_are_are_refused(store):
    with pytest.raises(ConfigError, match=r"6 prompts were asked for and 5 held-out documents have more than 8 tokens"):
        held_out_prompts(store, 6, 8)
    with pytest.raises(
        ConfigError, match=r"1 prompts were asked for and 0 held-out documents have more than 31 .*valid_fraction"
    ):
        held_out_prompts(store, 1, 31)


# Measuring


CONFIG = BenchConfig(prompts=3, prompt_tokens=8, new_tokens=5, temperatures=(0.0, 0.7), repetitions=3, seed=4)
CELLS = [(temperature, k) for temperature in CONFIG.temperatures for k in range(3)]


class Work:
    """What a device still does for `seconds` after the host was given it."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def block_until_ready(self):
        self.clock.now += self.seconds
        self.seconds = 0
        return self


class FakeDecoder:
    """A prefill takes 100 seconds, the loop `loop_seconds`, laying out and fetching 10,000; a plan compiles for 1,000.

    The one that decodes with two drafts at temperature 0.7 gets the second prompt wrong.
    """

    def __init__(self):
        self.now, self.compiled, self.requests, self.timed = 0.0, set(), [], []

    def loop_seconds(self, cell, index, repetition):
        return (8, 5, 3)[cell[1]] * (1 + repetition) + index + cell[0]

    def perf_counter(self):
        return self.now

    def make_request(self, model, prompts, config):
        self.now += 10_000
        (prompt,), cell = prompts, (config.temperature, config.k)
        self.requests.append((cell, prompt.tolist(), config))
        return SimpleNamespace(cell=cell, index=config.seed - CONFIG.seed)

    def start(self, model, request):
        return Work(self, self.compile("start", request) + 100)

    def proceed(self, model, request, state, max_forwards=None):
        if max_forwards is not None:
            return Work(self, state.seconds + self.compile("proceed", request) + 1)
        assert state.seconds == 0, "prefill is not done and would be timed as decoding"
        repetition = len(self.timed) // (len(CELLS) * CONFIG.prompts)
        self.timed.append((repetition, request.index, request.cell))
        return Work(self, self.compile("proceed", request) + self.loop_seconds(*self.timed[-1][::-1]))

    def compile(self, what, request):
        new = (what, request.cell) not in self.compiled
        self.compiled.add((what, request.cell))
        return 1000 * new

    def result(self, request, state):
        self.now += 10_000
        wrong = request.cell == (0.7, 2) and request.index == 1
        k = request.cell[1]
        return generation([7, request.index, 3, 4, 9 if wrong else 8], 4 - k, [2] * k)


@pytest.fixture
def measured(store, monkeypatch):
    """The fake, the bench that came of it, and what the user saw on the way."""
    fake, lines = FakeDecoder(), []
    for name in ("make_request", "start", "proceed", "result"):
        monkeypatch.setattr(bench, name, getattr(fake, name))
    monkeypatch.setattr(bench, "time", fake)
    monkeypatch.setattr(bench, "prepare", lambda config: store)
    config = tiny.train_config(head=tiny.head_config(window=3))
    with tiny.mesh() as mesh:
        model = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
    run = SimpleNamespace(config=config, mesh=mesh, model=model, decoder=object(), step=40)
    return SimpleNamespace(fake=fake, bench=bench_decode(run, CONFIG, lines.append), lines=lines)


def test_all_cells_of_a_prompt_follow_one_another(measured):
    """So that a machine whose speed drifts slows all of them."""
    assert measured.fake.timed == [(r, index, cell) for r in range(3) for index in range(3) for cell in CELLS]
    assert measured.lines[:6] == [f"compiled T = {temperature:g}, k = {k}" for temperature, k in CELLS]
    assert measured.lines[6] == "prompt 1 of 3, repetition 1 of 3" and len(measured.lines) == 6 + 9


def test_every_cell_is_asked_for_the_same(measured, store):
    prompts = [tokens.tolist() for _, tokens in held_out_prompts(store, 3, 8, CONFIG.seed)]
    assert {token for prompt in prompts for token in prompt} <= set(store.valid.tokens.tolist())
    _, *timed = measured.fake.requests[len(CELLS) - 1 :]
    assert [prompt for _, prompt, _ in timed] == [prompts[index] for _, index, _ in measured.fake.timed]
    for (temperature, k), _, config in measured.fake.requests:
        assert (config.max_new_tokens, config.temperature, config.k) == (5, temperature, k)
        assert (config.top_k, config.top_p, config.stop_tokens) == (0, 1.0, ()), "each row has all its tokens"
    assert [config.seed for *_, config in timed] == [CONFIG.seed + index for _, index, _ in measured.fake.timed]


def test_only_the_loop_is_timed(measured):
    """Compiling, laying out, prefill and fetching are not in a cell's seconds."""
    rows = {(row["temperature"], row["k"]): row for row in measured.bench["rows"]}
    assert list(rows) == CELLS
    for cell, row in rows.items():
        totals = [sum(measured.fake.loop_seconds(cell, index, r) for index in range(3)) for r in range(3)]
        assert row["tokens_per_second"] == pytest.approx(3 * 4 / totals[1])
        assert row["block_efficiency"] == pytest.approx(4 / (4 - cell[1]))
        assert row["acceptance"] == pytest.approx([2 / (4 - cell[1])] * cell[1])
        assert row["verifier"] == ("greedy" if cell[0] == 0 else "coupled")
        assert row["identical_to_plain"] is (cell != (0.7, 2))
    assert rows[0.0, 2]["speedup"] == pytest.approx((2 * 8 * 3 + 3) / (2 * 3 * 3 + 3))
    assert measured.bench["prefill_seconds"] == 100
    assert measured.bench["compile_seconds"] == len(CELLS) * (10_000 + 1000 + 100 + 1000 + 1)


def test_the_bench_says_what_was_measured(measured):
    shared = {name: value for name, value in measured.bench.items() if name in vars(CONFIG)}
    assert shared == {"prompts": 3, "prompt_tokens": 8, "new_tokens": 5, "repetitions": 3, "seed": 4}
    assert measured.bench["step"] == 40 and measured.bench["device"] == jax.devices()[0].device_kind
    assert measured.bench["versions"] == bench.versions()
    assert measured.bench["parameters"]["embedding"] == tiny.VOCAB * 16


def test_the_default_is_the_benchmark_that_is_published():
    """Figures are compared with each other, so what is measured without being asked for does not drift."""
    assert vars(BenchConfig()) == {
        **{"prompts": 24, "prompt_tokens": 96, "new_tokens": 256, "temperatures": (0.0, 0.7)},
        **{"repetitions": 3, "seed": 0},
    }
    asked = parse(Decode, ["run"], "bench decode")
    assert asked == Decode("run", BenchConfig(), step=None, report=False)
