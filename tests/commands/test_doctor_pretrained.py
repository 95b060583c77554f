"""The doctor on pretrained models: a frozen trunk in its own dtype, a head to come, and decoding."""

import dataclasses
import json
import re

import pytest

from mtp_jax import cli
from mtp_jax.config import MeshConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.interop.importing import import_run
from mtp_jax.model.cache import init_cache
from mtp_jax.train.forecast import decoding_bytes, forecast
from mtp_jax.train.step import make_trainer
from support import pretrained, tiny
from support.states import held

pytestmark = pytest.mark.usefixtures("quick_compilation")

FROZEN = dict(base="runs/base")


@pytest.mark.parametrize("mesh", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (1, 4, 2)])
def test_a_frozen_trunk_keeps_its_dtype_and_has_nothing_else(mesh):
    """Two bytes a weight, no moments, and no gradient, which is among the temporaries of a run that has one."""
    shape = dict(vocab_size=264, num_layers=6, d_model=64, d_ff=256)
    head, mesh = tiny.head_config(target="ntp"), MeshConfig(*mesh)
    trained = forecast(tiny.train_config(tiny.model_config(**shape), head, mesh=mesh))
    frozen = forecast(tiny.train_config(tiny.model_config(**shape), head, mesh=mesh, **FROZEN))
    narrow = forecast(tiny.train_config(tiny.model_config(**shape, param_dtype="bfloat16"), head, mesh=mesh, **FROZEN))
    split = {row["name"]: row for row in narrow["shardings"]}
    heads = sum(row["bytes"] for name, row in split.items() if name.startswith("head."))
    trunk = sum(row["bytes"] for row in frozen["shardings"]) - heads
    norms = sum(row["bytes"] for name, row in split.items() if name.endswith("scale"))
    assert {row["dtype"] for name, row in split.items() if "scale" in name or "head" in name} == {"float32"}
    assert narrow["bytes"]["parameters"] == heads + norms + (trunk - norms) // 2
    # Moments of the head alone, and the optimizer's counter or two.
    for found in frozen, narrow:
        assert 0 <= found["bytes"]["optimizer"] - 2 * heads <= 8
    assert trained["bytes"]["temporaries"] - frozen["bytes"]["temporaries"] > 0.9 * trunk


def test_a_forecast_of_a_frozen_run_is_what_it_uses():
    config = tiny.train_config(
        tiny.model_config(vocab_size=264, param_dtype="bfloat16", dtype="bfloat16"), mesh=MeshConfig(2, 2, 2), **FROZEN
    )
    size = forecast(config)["bytes"]
    with tiny.mesh(2, 2, 2):
        trainer = make_trainer(config)
        state, batch = trainer.init(), tiny.make_batch(config)
        used = trainer.step.lower(state, batch).compile().memory_analysis()
        state, _ = trainer.step(state, batch)
    assert (size["parameters"], size["optimizer"]) == (held(state.whole), held(state.opt_state))
    assert size["temporaries"] == used.temp_size_in_bytes


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_forecast_of_decoding_is_what_decoding_holds(shape):
    model = tiny.model_config(vocab_size=264, param_dtype="bfloat16")
    config = tiny.train_config(model, tiny.head_config(factors="lowrank"), **FROZEN)
    with tiny.mesh(*shape) as mesh:
        found = decoding_bytes(config, mesh)
        decoder = for_decoding(tiny.make_model(config))
        cache = init_cache(model, shape[0] * shape[1], model.context_length)
        narrow = dataclasses.replace(config, model=dataclasses.replace(model, dtype="bfloat16"))
        half = decoding_bytes(narrow, mesh)
    assert found == {"weights": held(decoder), "row": held(cache), "context": 128}
    assert half["row"] == found["row"] // 2 and half["weights"] < 0.6 * found["weights"]


def test_an_imported_run_is_reported_on_without_its_weights(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
    run = import_run(str(pretrained.write(tmp_path / "source", "float16")[0]), tmp_path / "run")
    (run / "checkpoints").rmtree()
    options = ["--devices", "4", "--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--accelerator", "h100"]
    head = ["--head.kind", "mixture", "--head.circuit", "cpd", "--head.window", "4", "--head.rank", "2"]

    def report(*argv):
        cli.main(["doctor", str(run), *argv])
        output = capsys.readouterr().out
        return output, json.loads(output.splitlines()[-1])

    alone, found = report(*options)
    assert "Nothing would be trained: the trunk is frozen and there is no head" in alone
    assert found["bytes"]["optimizer"] <= 8 and found["parameters"]["head"] == 0
    assert {row["dtype"] for row in found["shardings"] if "scale" not in row["name"]} == {"float16"}
    with_head, more = report(*options, *head)
    assert "Nothing would be trained" not in with_head and more["parameters"]["head"] > 0
    assert 0 <= more["bytes"]["optimizer"] - 2 * (more["bytes"]["parameters"] - found["bytes"]["parameters"]) <= 8
    row = 2 * pretrained.L * pretrained.K // 2 * pretrained.H * 64 * 4
    assert more["decoding"]["row"] == row and more["decoding"]["context"] == 64
    rooms = (80 * 2**30 - more["decoding"]["weights"]) // row
    assert re.search(r"^decoding +weights .* MiB of keys and values for each row of 64$", with_head, re.MULTILINE)
    assert f"room for {rooms:,} such rows on a device" in with_head
