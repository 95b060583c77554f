"""The benchmarks of the loss and of the training step: what they compare, and what they print."""

import functools
import json
import re
import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mtp_jax import cli
from mtp_jax.bench import loss as bench_loss_module
from mtp_jax.bench import timing
from mtp_jax.bench.config import LossBenchConfig, TrainBenchConfig
from mtp_jax.bench.loss import bench_loss
from mtp_jax.bench.train import NEXT_TOKEN, bench_train
from mtp_jax.config import MeshConfig
from mtp_jax.heads.factors import FACTORS
from mtp_jax.mesh import make_mesh
from mtp_jax.train.step import make_trainer
from mtp_jax.validate import ConfigError
from support import tiny

SMALL = {"d": 16, "v": 64, "window": 3, "rank": 2, "tokens": 24, "factor_width": 4, "repetitions": 2}


@pytest.mark.parametrize(
    "options", [*({"factors": f} for f in FACTORS), {"shortlist": 20}, {"circuit": "hmm"}], ids=str
)
def test_all_methods_solve_one_problem(options):
    """What is timed as ours and as naive gives the same loss and gradients."""
    config = LossBenchConfig(**SMALL, **options)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        form, arrays = bench_loss_module._problem(config, config.tokens)
        both = bench_loss_module._ours, bench_loss_module._naive
        law = bench_loss_module._law(config)
        ours, naive = (bench_loss_module._gradient(functools.partial(loss, form, law)) for loss in both)
        ours = jax.device_get(ours(*arrays))
    naive = jax.device_get(naive(*jax.device_get(arrays)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, naive)
    assert ours[0] > 3


def test_figures_of_the_loss():
    bench = bench_loss(LossBenchConfig(**SMALL, dtype="bfloat16"))
    assert set(bench["seconds"]) == {"ours", "naive", "matmuls"} and bench["naive_fits"]
    assert bench["time_ratio_to_matmuls"] > 0 and bench["time_ratio_to_naive"] > 0
    assert bench["temp_bytes"] > 0 and bench["naive_temp_bytes"] > 0
    assert 1e-5 < bench["grad_error"] < 0.02 and 1e-5 < bench["naive_grad_error"] < 0.02
    assert bench["tile_positions"] == 24


def test_another_circuit_is_compared_with_cpd():
    bench = bench_loss(LossBenchConfig(**SMALL, circuit="btree"))
    assert set(bench["seconds"]) == {"ours", "cpd", "naive", "matmuls"} and bench["time_ratio_to_cpd"] > 0


def test_a_naive_loss_that_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench_loss_module, "free_bytes", lambda: 1)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    cli.main(["bench", "loss", *options])
    *_, said, ratio, errors, last = capsys.readouterr().out.splitlines()
    bench = json.loads(last)
    assert re.fullmatch(r"naive needs \d+ MiB and 0 are free\.", said)
    assert "naive" not in ratio and "gradient error" in errors
    assert bench["time_ratio_to_naive"] is None and not bench["naive_fits"] and bench["naive_temp_bytes"] > 1
    assert set(bench["seconds"]) == {"ours", "matmuls"}


def test_figures_of_the_training_step():
    config = tiny.train_config(tiny.model_config(vocab_size=258), mesh=MeshConfig(2, 2, 2))
    bench = bench_train(config, TrainBenchConfig(ranks=(1, 3), repetitions=2))
    names = [row["head"] for row in bench["rows"]]
    assert names == [NEXT_TOKEN, "R = 1", "R = 3"]
    plain, one, three = bench["rows"]
    assert plain["step_ratio"] == plain["predicted_ratio"] == 1
    assert 1 < one["predicted_ratio"] < three["predicted_ratio"]
    # One unembedding; one for each offset and the gate; three for each offset and the gate.
    matrix = config.model.d_model * config.model.vocab_size
    gates = [config.model.d_model * rank for rank in (1, 3)]
    assert [row["head_parameters"] for row in bench["rows"]] == [matrix, 4 * matrix + gates[0], 12 * matrix + gates[1]]
    for row in bench["rows"]:
        assert row["tokens_per_second"] * row["seconds"]["median"] == pytest.approx(8 * 16)
        assert row["peak_bytes"] > row["state_bytes"] > 0 and row["mfu"] is None


def test_a_bench_without_ranks_is_refused():
    with pytest.raises(ConfigError, match="give one or more"):
        TrainBenchConfig(ranks=())


@pytest.mark.slow
def test_the_command_of_the_training_step(tmp_path, capsys):
    (tmp_path / "small.py").write_text(
        "from support import tiny\nCONFIG = tiny.train_config(tiny.model_config(vocab_size=257))\n"
    )
    cli.main(["bench", "train", f"{tmp_path}/small.py", "--bench.ranks", "2", "--bench.repetitions", "1"])
    *table, last = capsys.readouterr().out.splitlines()
    assert [row["head"] for row in json.loads(last)["rows"]] == [NEXT_TOKEN, "R = 2"]
    assert any("step / predicted" in line for line in table)


def test_rounds_are_interleaved_and_ratios_are_of_one_round(monkeypatch):
    order, now = [], [0.0]
    times = {"a": [9, 1, 2, 8, 4, 4], "b": [9, 1, 1, 2, 2, 2]}
    costs = {name: iter(of) for name, of in times.items()}

    def run(name):
        order.append(name)
        now[0] += next(costs[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    seconds = timing.interleave({name: lambda name=name: run(name) for name in costs}, 5)
    rounds = {a + b for a, b in zip(order[::2], order[1::2], strict=True)}
    assert len(order) == 12 and rounds == {"ab", "ba"}, "in turn, and neither is always the first"
    assert seconds == {name: of[1:] for name, of in times.items()}
    assert timing.ratio(seconds, "a", "b") == 2
    assert timing.summary([1, 2, 8]) == {"median": 2, "quartile_1": 1.5, "quartile_3": 5}


@pytest.fixture(scope="module")
def gpu_check():
    return SimpleNamespace(**runpy.run_path("experiments/gpu_check.py"))


def test_the_gpu_check_writes_each_part_as_it_ends(gpu_check, tmp_path, monkeypatch, capsys):
    """On any device; here with parts that take no time, one of which fails."""
    file = tmp_path / "results" / "device.json"

    def second():
        assert json.loads(file.read_text())["parts"]["loss a"]["figures"] == 1
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu_check.main.__globals__, "PARTS", {"loss a": lambda: 1, "loss b": second, "train": 1 / 1})
    monkeypatch.setattr("sys.argv", ["gpu_check.py", str(file), "--only", "loss,peers"])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    result = json.loads(file.read_text())
    assert stop.value.code == 1 and result["platform"] == "cpu" and list(result["parts"]) == ["loss a", "loss b"]
    assert "ValueError: no such kernel" in result["parts"]["loss b"]["error"]


def test_the_peers_of_the_gpu_check_have_one_loss(gpu_check):
    found = gpu_check.measure_peers(rows=64, width=16, vocab=48, chunk=16)
    assert found["loss"]["ours"] == pytest.approx(found["loss"]["checkpoint"], rel=1e-3)
    assert found["peer_over_ours"].keys() == found["loss"].keys()


def test_the_parts_of_the_gpu_check_are_what_it_says(gpu_check):
    assert {name.split()[0] for name in gpu_check.PARTS} == {"loss", "peers", "train"}
    for attention in ("xla", "cudnn"):
        config = gpu_check.train_config(gpu_check.SMALL, 32, attention=attention)
        assert config.model.attention == attention and config.model.dtype == "bfloat16"
        with tiny.mesh():
            trainer = make_trainer(config)
            jax.eval_shape(trainer.step, jax.eval_shape(trainer.init), tiny.make_batch(config))
