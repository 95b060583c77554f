"""The decode benchmark: only decoding is timed, of prompts that every cell shares.

The decoder is a fake whose every part takes a known time on a clock that only the fake moves; three tests have a model.
"""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mtp_jax.bench import cells as of_cells
from mtp_jax.bench import decode as bench
from mtp_jax.bench import hf, session
from mtp_jax.bench.cells import Cell
from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.decode import bench_decode
from mtp_jax.commands import parse
from mtp_jax.commands.bench import Decode
from mtp_jax.data.prompts import file_prompts, held_out_prompts
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import ENDLESS
from mtp_jax.decode.generate import generate
from mtp_jax.state import build_model
from mtp_jax.sweep.costs import untrained
from mtp_jax.validate import ConfigError
from support import tiny
from support.generations import generation

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


def test_files_give_prompts(tmp_path):
    for i, length in enumerate([9, 12, 7, 8]):
        (tmp_path / f"{i}.txt").write_bytes(bytes([97 + i] * length))
    found = file_prompts(str(tmp_path / "*.txt"), ByteTokenizer(), 3, 8, seed=2)
    assert {name: tokens.tolist() for name, tokens in found} == {f"{i}.txt": [97 + i] * 8 for i in (0, 1, 3)}
    with pytest.raises(ConfigError, match=r"4 prompts were asked for and 3 files of .*txt' have 8 tokens or more"):
        file_prompts(str(tmp_path / "*.txt"), ByteTokenizer(), 4, 8)
    with pytest.raises(ConfigError, match=r"no file matches it"):
        file_prompts(str(tmp_path / "*.md"), ByteTokenizer(), 1, 8)


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
        self.of = []  # (model, config) of every request
        self.forward_seconds = {"float32": 1, "bfloat16": 2}  # of plain decoding, by model

    def loop_seconds(self, cell, index, repetition):
        return (8, 5, 3)[cell[1]] * (1 + repetition) + index + cell[0]

    def perf_counter(self):
        return self.now

    def asked(self, model, prompts, config):
        """What stands for a `Decoding`."""
        self.now += 10_000
        self.requests.append(((config.temperature, config.k), [prompt.tolist() for prompt in prompts], config))
        self.of.append((model, config))
        return FakeDecoding(self, model, len(prompts), config)

    def compile(self, what, asked):
        plan = (what, asked.cell, asked.batch, asked.model)
        new = plan not in self.compiled
        self.compiled.add(plan)
        return 1000 * new


class FakeModels(dict):
    """A model by dtype, and the one with a plain table by another name."""

    def next_token(self, dtype):
        return f"table in {dtype}"


class FakeDecoding:
    """A decoding whose work takes time on the clock of its decoder, at the latest when it is waited for."""

    programs = (None,)

    def __init__(self, decoder, model, batch, config):
        self.decoder, self.model, self.batch, self.due = decoder, model, batch, 0.0
        self.cell, self.index = (config.temperature, config.k), config.row

    def wait(self):
        self.decoder.now += self.due
        self.due = 0.0

    def prefill(self):
        self.due += self.decoder.compile("start", self) + 100
        self.wait()

    def advance(self, max_forwards=ENDLESS):
        fake = self.decoder
        if max_forwards != ENDLESS:
            self.due += fake.compile("proceed", self) + fake.forward_seconds[self.model] * max_forwards
            return
        assert self.due == 0, "prefill is not done and would be timed as decoding"
        repetition = len(fake.timed) // (len(CELLS) * CONFIG.prompts)
        fake.timed.append((repetition, self.index, self.cell))
        self.due += fake.compile("proceed", self) + fake.loop_seconds(*fake.timed[-1][::-1])

    def enter(self, max_forwards, attended):
        assert (max_forwards, attended) == (0, None), "it is compiled and nothing is decoded"

    def result(self):
        self.decoder.now += 10_000
        wrong = self.cell == (0.7, 2) and self.index == 1
        k = self.cell[1]
        return generation([7, self.index, 3, 4, 9 if wrong else 8], 4 - k, [2] * k, self.batch)


@pytest.fixture
def measure(store, monkeypatch):
    """A function that benchmarks with a fake and gives it, the bench that came of it, and what the user saw."""

    def run(config=CONFIG, target="ntp", **forward_seconds):
        fake, lines, chosen = FakeDecoder(), [], []
        fake.forward_seconds |= forward_seconds
        monkeypatch.setattr(session, "Decoding", fake.asked)
        monkeypatch.setattr(session, "time", fake)
        monkeypatch.setattr(session, "best_k", lambda model, prompts, config: chosen.append(config) or 1)
        monkeypatch.setattr(bench, "prepare", lambda config, tokenizer, reading: store)
        monkeypatch.setattr(bench, "Decoders", lambda run: FakeModels({"float32": "float32", "bfloat16": "bfloat16"}))
        monkeypatch.setattr(bench.Session, "gap", lambda self, cell, index, shared, own, other: own / other)
        run_config = tiny.train_config(head=tiny.head_config(window=3, target=target))
        with tiny.mesh() as mesh:
            model = jax.eval_shape(lambda: build_model(run_config, jax.random.key(0)))
        run = SimpleNamespace(config=run_config, mesh=mesh, model=model, tokenizer=None, step=40, stop_tokens=(5,))
        return SimpleNamespace(fake=fake, bench=bench_decode(run, config, lines.append), lines=lines, chosen=chosen)

    return run


@pytest.fixture
def measured(measure):
    return measure()


def test_all_cells_of_a_prompt_follow_one_another(measured):
    """So that a machine whose speed drifts slows all of them; their order changes, so that none is always first."""
    turns = [measured.fake.timed[i : i + len(CELLS)] for i in range(0, len(measured.fake.timed), len(CELLS))]
    assert [sorted(turn) for turn in turns] == [[(r, i, cell) for cell in CELLS] for r in range(3) for i in range(3)]
    assert len({tuple(cell for *_, cell in turn) for turn in turns}) > 6
    tried, lines = measured.lines[:2], measured.lines[2:]
    assert tried == [f"tried k = {k} in float32 and bfloat16" for k in (0, 2)]
    assert lines[:6] == [f"compiled T = {temperature:g}, k = {k}" for temperature, k in CELLS]
    assert lines[6] == "prompt 1 of 3 in float32, repetition 1 of 3" and len(lines) == 6 + 9


def test_every_cell_is_asked_for_the_same(measured, store):
    prompts = [tokens.tolist() for _, tokens in held_out_prompts(store, 3, 8, CONFIG.seed)]
    assert {token for prompt in prompts for token in prompt} <= set(store.valid.tokens.tolist())
    timed = measured.fake.requests[-len(measured.fake.timed) :]
    assert [prompt for _, (prompt,), _ in timed] == [prompts[index] for _, index, _ in measured.fake.timed]
    for (temperature, k), _, config in measured.fake.requests:
        assert (config.max_new_tokens, config.temperature, config.k) == (5, temperature, k)
        assert (config.top_k, config.top_p, config.seed) == (0, 1.0, CONFIG.seed)
    tried = measured.fake.requests[: -len(measured.fake.timed)]
    assert {config.stop_tokens for *_, config in timed} == {(5,)}
    assert {config.stop_tokens for *_, config in tried} == {(-1,)}, "what is compiled and tried does not end early"
    assert [config.row for *_, config in timed] == [index for _, index, _ in measured.fake.timed]


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
        wrong = cell == (0.7, 2)
        assert row["identical_to_plain"] is (not wrong)
        assert (row["rows_that_differ"], row["logit_gap"]) == ((1, 8 / 9) if wrong else (0, None))
    assert rows[0.0, 2]["speedup"] == pytest.approx((2 * 8 * 3 + 3) / (2 * 3 * 3 + 3))
    assert measured.bench["prefill_seconds"] == 100
    # The first cell and the one with the most drafts were tried before, in both dtypes: their code is there when their
    # turn comes.
    plans, calls = len(CELLS) + 2, len(CELLS) + 4
    assert measured.bench["compile_seconds"] == calls * (10_000 + 100 + 1) + 2 + plans * 2000


def test_the_other_dtype_is_measured_where_it_is_faster(measure):
    plain, drafted = measure().bench["trials"]
    assert plain == {"batch": 1, "k": 0, "next_token": False, "forwards_per_second": {"float32": 1.0, "bfloat16": 0.5}}
    assert (drafted["batch"], drafted["k"]) == (1, 2)
    assert {row["dtype"] for row in measure(bfloat16=0.97).bench["rows"]} == {"float32"}, "that may be noise"
    found = measure(bfloat16=0.25).bench
    assert found["trials"][0]["forwards_per_second"] == {"float32": 1.0, "bfloat16": 4.0}
    plain = [(row["temperature"], row["dtype"]) for row in found["rows"] if row["k"] == 0]
    assert sorted(plain) == [(T, dtype) for T in (0.0, 0.7) for dtype in ("bfloat16", "float32")]
    ks = [(row["dtype"], row["k"]) for row in found["rows"] if row["temperature"] == 0.7]
    assert ks == [(dtype, k) for dtype in ("float32", "bfloat16") for k in range(3)]


def test_dtypes_take_turns_and_a_repetition_begins_with_the_last_of_the_one_before(measure):
    """Each goes first as often as the other, or nearly, and a model is laid out once a repetition."""
    lines = [line for line in measure(bfloat16=0.25).lines if line.startswith("prompt")]
    turns = [line.split(" in ")[1].split(",")[0] for line in lines]
    one, other = session.DTYPES
    assert turns == [dtype for dtype in (one, other, other, one, one, other) for _ in range(CONFIG.prompts)]


def test_every_cell_of_the_grid_decodes_all_prompts(measure):
    config = dataclasses.replace(
        CONFIG, prompts=4, prompt_tokens=7, batch_sizes=(1, 2, 4), verifiers=("token", "block")
    )
    found = measure(config)
    settings = [(0.0, "greedy"), (0.7, "token"), (0.7, "block")]
    grid = [(b, T, verifier, k) for b in config.batch_sizes for T, verifier in settings for k in range(3)]
    assert [(row["batch"], row["temperature"], row["verifier"], row["k"]) for row in found.bench["rows"]] == grid
    asked = {}
    for (temperature, k), prompts, options in found.fake.requests:
        rows = asked.setdefault((len(prompts), temperature, options.verifier, k), {})
        rows |= {(options.seed, options.row + i): prompt for i, prompt in enumerate(prompts)}
    assert asked.keys() == set(grid)
    assert all(rows == asked[grid[0]] and len(rows) == 4 for rows in asked.values()), "the same prompts, the same seeds"


def test_the_ks_that_are_named_are_measured(measure):
    rows = measure(dataclasses.replace(CONFIG, ks=(0, 2))).bench["rows"]
    assert [(row["temperature"], row["k"]) for row in rows] == [(T, k) for T in (0.0, 0.7) for k in (0, 2)]
    with pytest.raises(ConfigError, match=r"ks is \(0, 7\) and the head of the run drafts at most 2 tokens"):
        measure(dataclasses.replace(CONFIG, ks=(0, 7)))


def test_a_marginal_run_is_measured_beside_a_plain_table_in_the_same_turns(measure, monkeypatch):
    """Which no stop token ends, which has rows of its own, and whose dtype is tried too."""
    assert measure().bench["next_token"] == []
    seconds = {"table in float32": 4, "table in bfloat16": 3}
    monkeypatch.setattr(FakeDecoder, "loop_seconds", lambda self, cell, index, repetition: 8 - 2 * cell[1])
    found = measure(target="marginal", **seconds)
    assert [trial["next_token"] for trial in found.bench["trials"]] == [False, False, True]
    rows, (table, *others) = found.bench["rows"], found.bench["next_token"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}, "for the table is faster in the other one"
    assert (table["temperature"], table["k"], table["dtype"], len(others)) == (0.0, 0, "float32", 3)
    assert table["identical_to_plain"] is None and table["speedup_next_token"] == 1.0
    assert [row["speedup_next_token"] for row in rows[:3]] == [1.0, 8 / 6, 2.0]
    of_table = [config for model, config in found.fake.of if model.startswith("table")]
    assert of_table and {(config.k, config.stop_tokens) for config in of_table} == {(0, (-1,))}
    assert {config.temperature for config in of_table} == set(CONFIG.temperatures)


def test_k_auto_is_chosen_before_anything_is_timed_and_has_rows_of_its_own(measure):
    found = measure(dataclasses.replace(CONFIG, auto=True))
    rows = [(row["temperature"], row["k"], row["auto"]) for row in found.bench["rows"]]
    assert rows == [(T, *k) for T in (0.0, 0.7) for k in ((0, False), (1, False), (2, False), (1, True))]
    assert len(found.chosen) == 2
    timed = [seconds for row in found.bench["rows"] if row["auto"] for seconds in row["iteration_seconds"]]
    fixed = [s for row in found.bench["rows"] if row["k"] == 1 and not row["auto"] for s in row["iteration_seconds"]]
    assert len(timed) == len(fixed)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(batch_sizes=(5,)), r"batch_sizes is \(5,\) and prompts is 24"),
        (dict(batch_sizes=()), r"batch_sizes is \(\)"),
        (dict(batch_sizes=(0,)), r"batch_sizes is \(0,\)"),
        (dict(verifiers=("greedy",)), r"verifiers is \('greedy',\).*temperature 0 always has greedy"),
        (dict(verifiers=("block",), temperatures=(0.0,)), r"temperatures is \(0\.0,\).*add a temperature"),
        (dict(ks=(1, 2)), r"ks is \(1, 2\); give numbers of drafts, 0 among them"),
        (dict(compare="vllm"), r"compare is 'vllm'; it must be one of 'none', 'hf'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        BenchConfig(**options)


def test_unknown_verifiers_and_absent_packages_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"verifier is 'blok'; did you mean 'block'"):
        bench.check(BenchConfig(verifiers=("blok",)), tiny.train_config())
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"torch and transformers is not installed; `pip install .* leave --compare out"
    ):
        bench.check(BenchConfig(compare="hf"), tiny.train_config())
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"mixture of 3 softmaxes"):
        bench.check(BenchConfig(compare="hf"), tiny.train_config())
    bench.check(BenchConfig(compare="hf"), tiny.train_config(head=tiny.head_config(target="ntp")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "own, faster",
    [
        (("float32", "float32"), ("float32", "float32", "bfloat16", "float32")),
        (("float32", "float32"), ("float32", "float32", "float32", "bfloat16")),  # with drafts alone
        (("float32", "bfloat16"), ("float32", "float32", "bfloat16", "bfloat16")),
    ],
)
def test_runs_that_are_measured_together_have_the_same_cells(monkeypatch, own, faster):
    """If one of them is faster in the other dtype, or has it, both are measured in both: else their speeds would not
    compare."""
    trials = iter([{dtype: 1.0 + (dtype == best) for dtype in session.DTYPES} for best in faster])
    monkeypatch.setattr(bench.Session, "trial", lambda *_: next(trials))
    config = BenchConfig(prompts=1, prompt_tokens=4, new_tokens=3, temperatures=(0.0,), ks=(0, 1), repetitions=1)
    runs = {
        name: untrained(tiny.train_config(tiny.model_config(vocab_size=258, dtype=dtype)))
        for name, dtype in zip(("one", "other"), own, strict=True)
    }
    monkeypatch.setattr(bench, "chosen_prompts", lambda *_: [("", np.array([1, 2, 3, 4]))])
    cells = {(dtype, k) for dtype in session.DTYPES for k in (0, 1)}
    for found in bench.bench_runs(runs, config).values():
        assert {(row["dtype"], row["k"]) for row in found["rows"]} == cells


def test_the_gap_is_that_of_what_plain_decoding_chooses_by():
    """Plain decoding's own token is the best at every temperature, and all others are as far off as the gap says."""
    config = BenchConfig(prompts=1, new_tokens=5, seed=3)
    prompt = np.arange(1, 8)
    with tiny.mesh():
        model = for_decoding(tiny.make_model(tiny.train_config()))
        made = session.Session({"float32": model}, [prompt], (), config)
        for temperature, verifier in ((0.0, "greedy"), (0.9, "coupled")):
            cell = Cell(temperature, 0, verifier, "float32")
            out = generate(model, [prompt], max_new_tokens=5, temperature=temperature, seed=3, k=0)
            tokens, logprobs = out.tokens[0], out.logprobs[0]
            gaps = [made.gap(cell, 0, tokens[:4], int(tokens[4]), other) for other in range(tiny.VOCAB)]
            assert gaps[tokens[4]] == 0 and all(gap > 0 for i, gap in enumerate(gaps) if i != tokens[4])
            others = [made.gap(cell, 0, tokens[:4], int(np.argsort(gaps)[1]), other) for other in range(tiny.VOCAB)]
            assert others[tokens[4]] == gaps[np.argsort(gaps)[1]]
            if temperature == 0:  # gaps of log-probabilities: they say what all probabilities are
                logp_V = logprobs[4] - np.array(gaps)
                assert np.exp(logp_V).sum() == pytest.approx(1, abs=1e-4)


def test_texts_end_at_a_stop_token_and_are_counted_up_to_it():
    config, prompt = BenchConfig(prompts=1, new_tokens=12, repetitions=1), np.arange(1, 8)
    with tiny.mesh():
        model = for_decoding(tiny.make_model(tiny.train_config()))
        whole = generate(model, [prompt], max_new_tokens=12, k=0).tokens[0].tolist()
        for stop in (whole[0], whole[4]):
            end = whole.index(stop) + 1
            made = session.Session({"float32": model}, [prompt], (stop,), config)
            cells = [Cell(0.0, k, "greedy", "float32") for k in (0, 2)]
            for cell in cells:
                generation, _, seconds = made.decode(cell, 0)
                cell.generations, cell.batch_seconds = [[generation]], [[seconds]]
                assert cell.rows[0].tolist() == whole[:end] and cell.emitted == end - 1
                assert made.trial(cell)["float32"] > 0
            found = of_cells.row(cells[1], cells[0], cells[0], made.gap)
            assert found["identical_to_plain"]
            said = np.isfinite([found[name] for name in ("speedup", "block_efficiency", "verify_cost")])
            assert said.all() if end > 1 else not said.any(), "nothing is said of no forwards"


@pytest.mark.parametrize("tied, factors", [(False, "full"), (True, "full"), (False, "shared")])
def test_the_plain_table_has_the_same_trunk_in_memory_once(tied, factors):
    """It is the model's own where there is one; what its decoding computes is one softmax of V x D."""
    config = tiny.train_config(tiny.model_config(tie_embeddings=tied), tiny.head_config(factors=factors))
    with tiny.mesh():
        model = tiny.make_model(config)
        made = session.Decoders(SimpleNamespace(config=config, model=model))  # type: ignore[arg-type]
        own, plain = made["float32"], made.next_token("float32")
        assert plain is made.next_token("float32") and plain.head.config.kind == "none"
        shared = {id(leaf) for leaf in jax.tree.leaves(own)}
        new = [leaf.shape for leaf in jax.tree.leaves(plain) if id(leaf) not in shared]
        assert new == ([] if tied or factors == "shared" else [(tiny.VOCAB, 16)])
        out = generate(plain, [[1, 2, 3]], max_new_tokens=1, k=0)
        logits_V = np.asarray(plain.unembed_VD[...]) @ np.asarray(model.see(np.array([[1, 2, 3]])).x_BTD)[0, -1]
        assert out.tokens[0][0] == logits_V.argmax()
        assert out.logprobs[0][0] == pytest.approx(logits_V.max() - np.log(np.exp(logits_V).sum()), abs=1e-4)
        assert made["bfloat16"] is not own and made.next_token("bfloat16").config.dtype == "bfloat16"


def test_the_other_dtype_is_the_same_model():
    with tiny.mesh():
        model = tiny.make_model(tiny.train_config())
        run = SimpleNamespace(config=tiny.train_config(), model=model)
        made = session.Decoders(run)
        assert list(made) == ["float32", "bfloat16"] and made["float32"] is made["float32"]
        first = weakref.ref(made["float32"])
        assert made["float32"].config.dtype == "float32" and made["bfloat16"] is made["bfloat16"]
        gc.collect()
        assert first() is None, "one decoder is in memory"
        assert model.config.dtype == "float32" and made["bfloat16"].config.dtype == "bfloat16"
        assert made["bfloat16"].trunk.blocks[0].attention.wo_NHD.w_NK.dtype == "bfloat16"
        a, b = (generate(m, [[1, 2, 3]], max_new_tokens=8, k=0).logprobs[0] for m in made.values())
        assert a[0] == pytest.approx(b[0], abs=0.05) and not np.array_equal(a, b)


# What is published


def test_the_bench_says_what_was_measured(measured):
    shared = {name: value for name, value in measured.bench.items() if name in vars(CONFIG)}
    assert shared == {
        "prompts": 3,
        "prompt_tokens": 8,
        "new_tokens": 5,
        "files": "",
        "suite": "",
        "repetitions": 3,
        "seed": 4,
    }
    assert measured.bench["hf"] is None
    assert measured.bench["step"] == 40 and measured.bench["device"] == jax.devices()[0].device_kind
    assert measured.bench["versions"] == bench.versions()
    assert measured.bench["parameters"]["embedding"] == 2 * tiny.VOCAB * 16


def test_the_default_is_the_benchmark_that_is_published():
    """Figures are compared with each other, so what is measured without being asked for does not drift."""
    assert vars(BenchConfig()) == {
        **{"prompts": 24, "prompt_tokens": 96, "new_tokens": 256, "temperatures": (0.0, 0.7)},
        **{
            "batch_sizes": (1,),
            "verifiers": (),
            "ks": (),
            "files": "",
            "suite": "",
            "auto": False,
            "compare": "none",
            "repetitions": 3,
            "seed": 0,
        },
    }
    asked = parse(Decode, ["run"], "bench decode")
    assert asked == Decode("run", config=BenchConfig(), step="latest", report=False)
