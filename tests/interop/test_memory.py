"""Memory of a pretrained model on its way in and out: little more than the model itself."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from support.memory import measured
from support.pretrained import CONFIG, write_tokenizer

pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
from safetensors.numpy import save_file

if not Path("/proc/self/status").exists():
    pytest.skip("memory is read from /proc", allow_module_level=True)

# Each of the three stacked matrices of the feed-forward layers is 3/10 of the model.
D, F, N, H, L, V = 1024, 7680, 8, 64, 4, 259
SHAPES = {
    "self_attn.q_proj.weight": (N * H, D), "self_attn.k_proj.weight": (N * H, D),
    "self_attn.v_proj.weight": (N * H, D), "self_attn.o_proj.weight": (D, N * H),
    "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F),
    "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
}  # fmt: skip
IMPORT = """
jax.default_backend = lambda: "gpu"  # to Orbax this is a machine with a GPU
found["run"] = str(mtp_jax.interop.importing.import_run(*sys.argv[1:]))
"""
LOAD = """
mesh = mtp_jax.config.MeshConfig(*map(int, sys.argv[2:]))
run = mtp_jax.load(sys.argv[1], mesh=mesh)
found["held"] = held() - begun
split = [leaf.addressable_shards for leaf in jax.tree.leaves(run.model) if leaf.ndim > 2]
found["parts"] = min(len({str(shard.index) for shard in shards}) for shards in split)
"""
EXPORT = """
run = mtp_jax.load(sys.argv[1])
found["held"] = held() - begun
seen.clear()
mtp_jax.interop.exporting.export_run(run, *sys.argv[1:])
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The bytes of a model's parameters, and what its import says."""
    root = tmp_path_factory.mktemp("large")
    source = root / "source"
    source.mkdir()
    changes = dict(hidden_size=D, intermediate_size=F, num_attention_heads=N, num_key_value_heads=N, head_dim=H)
    (source / "config.json").write_text(json.dumps({**CONFIG, **changes, "num_hidden_layers": L}))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    write_tokenizer(source)
    named = {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in SHAPES.items()}
    named |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    weights = {name: np.full(shape, 0.01, ml_dtypes.bfloat16) for name, shape in named.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    del weights
    return size, measured(IMPORT, source, root / "run")


def test_an_import_holds_the_model_and_one_parameter(imported):
    size, found = imported
    assert found["peak"] < 1.5 * size


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 2, 4)])
def test_each_device_loads_its_part(imported, mesh):
    size, found = imported
    loaded = measured(LOAD, found["run"], *mesh, devices=8)
    assert loaded["parts"] == 8
    assert 0.9 * size < loaded["held"] < 1.6 * size and loaded["peak"] < loaded["held"] + 0.75 * size


def test_an_export_holds_one_weight_of_one_layer(imported, tmp_path):
    size, found = imported
    exported = measured(EXPORT, found["run"], tmp_path / "out")
    assert exported["peak"] < exported["held"] + 0.4 * size
