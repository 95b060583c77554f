"""The doctor: what it foresees is what a real run uses; the step and the decode loop lower for machines not here."""

import dataclasses
import functools
import json
import re
import resource
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from mtp_jax import cli
from mtp_jax.commands.doctor import lines
from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.law import Sampling
from mtp_jax.decode.loop import Limits, Plan, prefill, run
from mtp_jax.heads.config import HeadConfig
from mtp_jax.mesh import AXES
from mtp_jax.model.config import ModelConfig
from mtp_jax.sharding import RULES
from mtp_jax.state import build_model
from mtp_jax.train.advice import advice
from mtp_jax.train.collectives import count_collectives
from mtp_jax.train.forecast import ForecastError, abstract_step, forecast
from mtp_jax.train.step import make_trainer
from mtp_jax.validate import ConfigError
from support import tiny
from support.states import held

# What is compared here is what the partitioner does; faster code would take twice as long to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


# Counting collectives

LOOP = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %ag = f32[16]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[16]{0}) tuple(%p, %ag)
}

%inner_condition (p: (s32[], f32[16])) -> pred[] {
  %p = (s32[], f32[16]{0}) parameter(0)
  %n = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  %ar = f32[16]{0:T(8)} all-reduce(%p), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %w = (s32[], f32[16]{0}) while(%p), condition=%inner_condition, body=%inner
}

%outer_condition (p: (s32[], f32[16])) -> pred[] {
  %p = (s32[], f32[16]{0}) parameter(0)
  ROOT %lt = pred[] custom-call(%p), custom_call_target="unknown"
}

ENTRY %main (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  ROOT %w = (s32[], f32[16]{0}) while(%p), condition=%outer_condition, body=%outer, KNOWN
}
"""


def one(instruction, header="num_partitions=8"):
    """The traffic of a module of one instruction."""
    return count_collectives(
        f"HloModule m, {header}\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT {instruction}\n}}\n"
    )


def test_a_collective_counts_as_often_as_its_loops_run():
    found = count_collectives(LOOP.replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}'))
    assert found.counts == {"all-gather": 15, "all-reduce": 5}
    assert found.sent == {"all-gather": 15 * 64 * 3 // 4, "all-reduce": 5 * 64}
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_said():
    found = count_collectives(LOOP.replace(", KNOWN", ""))
    assert found.counts == {"all-gather": 3, "all-reduce": 1}
    assert found.unknown_loops == 1


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", 4),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([4,2]T(1,0)) {'a','c'}", 4),
        ("mesh['a'=8] {'a':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_the_size_of_a_group_is_read_in_every_notation(groups, size):
    text = f"%c = (f32[8]{{0}}, /*index=1*/bf16[2,4]{{1,0}}) all-reduce(%p), channel_id=1, replica_groups={groups}, x=1"
    found = one(text)
    assert found.counts == {"all-reduce": 1}
    assert found.sent == {"all-reduce": round(2 * 48 * (size - 1) / size)}


@pytest.mark.parametrize(
    "instruction, kind, sent",
    [
        ("%c = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}", "reduce-scatter", 24),
        ("%c = f32[8]{0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-to-all", 24),
        ("%c = pred[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 8),
        ("%c = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8]", "all-gather", 24),
        ("%c = f32[8]{0} all-reduce-start(%p), replica_groups=[2,4]<=[8]", "all-reduce", 48),
        (
            "%c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
            "collective-permute",
            32,
        ),
    ],
)
def test_bytes_are_what_a_ring_sends(instruction, kind, sent):
    found = one(instruction)
    assert (found.counts, found.sent) == ({kind: 1}, {kind: sent})


@pytest.mark.parametrize(
    "instruction",
    [
        "%c = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add",
        "%c = f32[8]{0} all-gather-done(%p)",
        '%c = f32[8]{0} add(%p, %p), metadata={op_name="all-gather(x)"}',
        "%c = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
    ],
)
def test_what_is_no_exchange_does_not_count(instruction):
    assert one(instruction).counts == {}


def test_what_a_tpu_spreads_over_fusions_counts_once():
    fused = '  %g = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="7"}\n'
    text = "HloModule m, num_partitions=8\n\n"
    text += "".join(f"%f{i} (p: f32[2]) -> f32[8] {{\n{fused}}}\n\n" for i in range(3))
    text += "%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {\n"
    text += "  %r = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add\n}\n\n"
    text += "ENTRY %main () -> f32[8] {\n"
    text += "".join(f"  %x{i} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%f{i}\n" for i in range(3))
    text += "  ROOT %y = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    found = count_collectives(text)
    assert found.counts == {"all-gather": 1, "reduce-scatter": 1}
    assert found.sent == {"all-gather": 24, "reduce-scatter": 24}


# What is foreseen and what is there


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_forecast_is_what_a_real_run_uses(optimizer):
    config = tiny.train_config(optimizer=OptimizerConfig(optimizer, warmup_steps=0), mesh=MeshConfig(2, 2, 2))
    found = forecast(dataclasses.replace(config, model=tiny.model_config(vocab_size=264)))
    config = dataclasses.replace(config, model=tiny.model_config(vocab_size=264))
    with tiny.mesh(2, 2, 2):
        trainer = make_trainer(config)
        state, batch = trainer.init(), tiny.make_batch(config)
        used = trainer.step.lower(state, batch).compile().memory_analysis()
        before = {"parameters": held(state.params), "optimizer": held(state.opt_state), "batch": held(batch)}
        old = jax.tree.leaves(state)
        state, _ = trainer.step(state, batch)
        after = held(state.params), held(state.opt_state)
    size = found["bytes"]
    assert {name: size[name] for name in before} == before
    assert after == (size["parameters"], size["optimizer"])
    assert size["temporaries"] == used.temp_size_in_bytes > 0
    # The whole state is donated, and what was donated is gone.
    assert all(array.is_deleted() for array in old)
    assert size["kept"] == size["parameters"] + size["optimizer"] + state.step.nbytes
    assert size["peak"] >= sum(before.values()) + size["temporaries"]
    assert sum(row["bytes"] for row in found["shardings"]) == size["parameters"]


@pytest.mark.parametrize("memory, fits", [(2**40, True), (1000, False)])
def test_whether_it_fits_is_said(memory, fits):
    config = tiny.train_config(tiny.model_config(vocab_size=264, num_layers=1), mesh=MeshConfig(8))
    found = forecast(config, memory=memory)
    assert found["fits"] is fits and bool(found["advice"]) is not fits


@pytest.mark.parametrize(
    "backend, memory, verdict",
    [
        ("cpu", 2**40, "fits"),
        ("cpu", 1000, "does not fit"),
        ("cpu", None, "may not fit"),
        ("tpu", None, "does not fit"),
    ],
)
def test_only_a_devices_own_compiler_rules_a_step_out(backend, memory, verdict):
    config = tiny.train_config(tiny.model_config(vocab_size=264, num_layers=1), mesh=MeshConfig(8))
    found = forecast(config, memory=memory)
    size = found["bytes"]
    if memory is None:  # the state fits and the step does not
        memory = size["parameters"] + size["optimizer"] + 1
        found |= {"memory": memory, "fits": size["peak"] <= memory}
    said = [name for name, text in lines(found | {"backend": backend}, "v5e") if text.startswith("v5e")]
    assert said == [verdict]


@pytest.mark.slow
def test_layers_add_the_same_collectives_each():
    """A scan runs its body once for each layer: what is counted of it grows by the same with every layer."""

    def counts(layers, mesh):
        config = tiny.train_config(tiny.model_config(vocab_size=264, num_layers=layers), mesh=mesh)
        return forecast(config)["collectives"]

    two, three, five = (counts(layers, MeshConfig(2, 2, 2)) for layers in (2, 3, 5))
    for kind in ("all-gather", "all-reduce"):
        each = three[kind]["count"] - two[kind]["count"]
        assert each > 0 and five[kind]["count"] - three[kind]["count"] == 2 * each, kind
    # Every matrix of a layer is gathered for the forward pass and for the backward pass.
    assert three["all-gather"]["count"] - two["all-gather"]["count"] >= 2 * 7
    assert counts(2, MeshConfig(8, 1, 1)).keys() == {"all-reduce"}


def test_simulated_devices_say_what_as_many_real_ones_do():
    config = tiny.train_config(tiny.model_config(vocab_size=264), mesh=MeshConfig(2, 2, 2))
    here, there = forecast(config), forecast(config, devices=8)
    for found in (here, there):
        del found["compile_seconds"]
    assert here == there


@pytest.mark.slow
def test_more_devices_than_this_machine_has():
    config = tiny.train_config(tiny.model_config(vocab_size=264, d_model=64), batch=64, mesh=MeshConfig(4, 8, 2))
    found = forecast(config, devices=64)
    assert (found["devices"], found["mesh"]) == (64, {"data": 4, "fsdp": 8, "tensor": 2})
    split = {row["name"]: row for row in found["shardings"]}
    assert split["embed_VD"]["bytes"] == 264 * 64 * 4 // 16
    assert split["embed_VD"]["spec"] == ["tensor", "fsdp"]


ADVISED = tiny.train_config(
    tiny.model_config(vocab_size=264, num_layers=4, d_ff=256, num_heads=8, num_kv_heads=8), batch=64, seq_len=128
)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, least", [((4, 2, 1), 4), ((1, 8, 1), 3)])
def test_what_is_advised_helps(mesh, least, tmp_path):
    config = dataclasses.replace(ADVISED, mesh=MeshConfig(*mesh))
    before = forecast(config, memory=1000)
    advised = [line for line in before["advice"] if line.startswith("--")]
    assert len(advised) >= least
    for line in advised:
        option = line.partition(":")[0]
        changed = config
        for name, value in re.findall(r"--(\S+) (\S+)", option):
            if name.startswith("mesh."):
                mesh = dataclasses.replace(changed.mesh, **{name.removeprefix("mesh."): int(value)})
                changed = dataclasses.replace(changed, mesh=mesh)
            elif name == "grad-accumulation":
                changed = dataclasses.replace(changed, grad_accumulation=int(value))
            else:
                assert name == "model.remat"
                changed = dataclasses.replace(changed, model=dataclasses.replace(changed.model, remat=value))
        assert forecast(changed)["bytes"]["peak"] < before["bytes"]["peak"], line


def test_advice_names_what_is_left():
    config = tiny.train_config(tiny.model_config(remat="full"), batch=1)
    found = {"parameters": 10, "optimizer": 20}
    assert advice(config, (1, 1, 1), found, 29)[-1].startswith("more devices: the state alone")
    assert advice(config, (1, 1, 1), found, 31)[-1].startswith("shorter sequences")


# Llama's shapes on 256 devices


def llama(*shape, batch, mesh):
    model = ModelConfig(128256, *shape, context_length=4096, rope_theta=500_000.0, remat="full")
    head = HeadConfig(rank=4, factors="lowrank", factor_width=64)
    return TrainConfig(model, head, DataConfig(seq_len=4096, batch_size=batch), mesh=MeshConfig(*mesh))


BIG = {
    "8B": (llama(4096, 14336, 32, 32, 8, batch=256, mesh=(4, 32, 2)), 8e9),
    "70B": (llama(8192, 28672, 80, 64, 8, batch=128, mesh=(4, 8, 8)), 70e9),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("8B", "70B")])
def test_a_large_model_is_compiled_for_256_devices_here(name):
    config, least = BIG[name]
    found = forecast(config, devices=256)
    count, size = sum(found["parameters"].values()), found["bytes"]
    assert least < count < 1.15 * least
    split = config.mesh.fsdp * config.mesh.tensor
    # The head's maps are not split over tensor, and norms not at all.
    assert count * 4 / split <= size["parameters"] < 1.05 * count * 4 / split
    assert 2 * size["parameters"] <= size["optimizer"] <= 2 * size["parameters"] + 16
    assert found["unknown_loops"] == 0 and found["collectives"]["all-gather"]["count"] > config.model.num_layers
    # No device's state is there, let alone the model.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * 2**30


# Lowered for other machines

# The embedding's gradient. A CPU has one more for the targets' logits, which others compare with all columns.
SCATTERS = 1
PLATFORMS = {"tpu": ("TPU v5 lite", "tpu"), "cuda": ("NVIDIA H100", "gpu")}


def abstract_mesh(shape, kind, platform):
    device = jax.sharding.AbstractDevice(kind, None, platform)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, abstract_device=device)


@pytest.fixture(params=[("tpu", (1, 1, 1)), ("tpu", (2, 2, 2)), ("cuda", (1, 1, 1)), ("cuda", (2, 2, 2))])
def elsewhere(request):
    """A platform, with a mesh of such devices in scope."""
    name, shape = request.param
    mesh = abstract_mesh(shape, *PLATFORMS[name])
    with jax.sharding.use_abstract_mesh(mesh):
        yield name, mesh


def lowered_step(mesh, platform):
    step, state, batch = abstract_step(tiny.train_config(tiny.model_config(dtype="bfloat16")), mesh)
    return step.trace(state, batch).lower(lowering_platforms=(platform,)).as_text()


def test_the_train_step_lowers_for_other_platforms(elsewhere):
    platform, mesh = elsewhere
    text = lowered_step(mesh, platform)
    assert "stablehlo.while" in text and "bf16" in text
    assert text.count('"stablehlo.scatter"') == SCATTERS


def test_a_step_is_traced_for_the_platform_of_its_mesh():
    mesh = abstract_mesh((1, 1, 1), "cpu", "cpu")
    with jax.sharding.use_abstract_mesh(mesh):
        assert lowered_step(mesh, "cpu").count('"stablehlo.scatter"') == SCATTERS + 1


@pytest.mark.parametrize("temperature", ["greedy", "coupled"])
def test_the_decode_loop_lowers_for_other_platforms(elsewhere, temperature):
    platform, mesh = elsewhere
    config = tiny.train_config(tiny.model_config(dtype="bfloat16"))
    rows = jax.NamedSharding(mesh, RULES.rows_B)

    def each(dtype, *shape):
        return jax.ShapeDtypeStruct((4, *shape), dtype, sharding=rows)

    plan = Plan(3, temperature, 48)
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    sampling = Sampling(each(jnp.float32), each(jnp.int32), each(jnp.float32), each(key))
    limits, stops = Limits(each(jnp.int32), each(jnp.int32)), jax.ShapeDtypeStruct((1,), jnp.int32)
    model = jax.eval_shape(lambda: for_decoding(build_model(config, jax.random.key(0))))
    begin = functools.partial(prefill, plan)
    state = jax.eval_shape(begin, model, each(jnp.int32, 16), each(jnp.int32), limits, sampling, stops)
    assert state.cache[0][0].dtype == jnp.bfloat16  # a CPU's is float32
    most = jax.ShapeDtypeStruct((), jnp.int32)
    text = run.trace(plan, model, state, sampling, stops, most).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text and "bf16" in text


# The command


EXPERIMENT = """
from mtp_jax import DataConfig, HeadConfig, MeshConfig, ModelConfig, TrainConfig

CONFIG = TrainConfig(
    ModelConfig(264, d_model=16, d_ff=32, num_layers=1, num_heads=4, context_length=128, dtype="float32"),
    HeadConfig(window=3, rank=2),
    DataConfig("text", "nowhere/*.txt", batch_size=8, seq_len=16),
    mesh=MeshConfig(fsdp=2),
)
"""


@pytest.fixture
def experiment(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(EXPERIMENT)
    return file


@pytest.fixture
def refused(experiment, capsys):
    """Calls the doctor with options that it refuses, and returns what it says."""

    def call(*options, status=2):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor", str(experiment), *map(str, options)])
        assert stopped.value.code == status
        return capsys.readouterr().err

    return call


def test_the_doctor_reports_on_a_machine_that_is_not_here(experiment, capsys):
    argv = [
        "--devices",
        "4",
        "--mesh.fsdp",
        "2",
        "--mesh.tensor",
        "2",
        "--accelerator",
        "v5e",
        "--data.tokenizer",
        "hf:nowhere.json",
    ]
    cli.main(["doctor", str(experiment), *argv])
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert "XLA for CPUs, for 4 x cpu" in output
    assert re.search(r"^fits +v5e \(0\.0 of 16 GiB\)$", output, re.MULTILINE)
    assert "hf:nowhere.json is not here" in output
    for row in found["shardings"]:
        assert re.search(rf"^{re.escape(row['name'])} .* {row['bytes'] / 2**20:,.2f} *$", output, re.MULTILINE)
    for kind, counted in found["collectives"].items():
        assert re.search(rf"^{kind} +{counted['count']:,} a step", output, re.MULTILINE)


def test_the_doctor_refuses_what_does_not_fit_together(refused, monkeypatch):
    assert "needs a multiple of 3 devices and there are 256" in refused("--devices", 256, "--mesh.fsdp", 3)
    assert "divide the part" in refused("--devices", 256)
    assert "did you mean 'h100'?" in refused("--accelerator", "h10")
    assert "--devices is 0" in refused("--devices", 0)
    assert "The topology is '16x16'" in refused("--topology", "16x16")
    assert "--devices is 4 and --topology is v5e:2x4; give one of them" in refused(
        "--topology", "v5e:2x4", "--devices", 4
    )


def test_a_topology_without_its_compiler_is_refused(monkeypatch):
    from mtp_jax.train import forecast as module

    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ForecastError, match="pip install 'mtp_jax"):
        module._slice("v5e:16x16")


@pytest.mark.slow
def test_a_topology_is_compiled_for_by_its_own_compiler():
    pytest.importorskip("libtpu")
    config = tiny.train_config(tiny.model_config(vocab_size=264, dtype="bfloat16"), mesh=MeshConfig(2, 2, 2))
    found = forecast(config, topology="v5e:2x4")
    assert (found["backend"], found["device"], found["memory"]) == ("tpu", "TPU v5 lite", 16 * 2**30)
    assert found["fits"] and found["collectives"]["all-gather"]["count"] > 0
    # Here JAX by itself makes no mesh of 2 x 2 x 2: the slice has axes of 2 and 4.
    assert forecast(config, topology="v6e:2x4")["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    large = dataclasses.replace(BIG["8B"][0], mesh=MeshConfig(1, 4, 1))
    with pytest.raises(
        ForecastError, match=r"(?s)The step does not fit: .*15\.75G.*What helps:\n  --grad-accumulation"
    ):
        forecast(large, topology="v5e:2x2")
    with pytest.raises(ConfigError, match="no topology v5e:3x5"):
        forecast(config, topology="v5e:3x5")
