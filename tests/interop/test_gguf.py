"""GGUF files, written here by the gguf package: the same model as its Hugging Face directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import mtp_jax
from mtp_jax.interop import gguf as reading
from mtp_jax.interop.exporting import export_run
from mtp_jax.interop.importing import import_run
from mtp_jax.model.config import ModelConfig, RopeScaling
from mtp_jax.model.rotary import frequencies
from mtp_jax.state import split
from mtp_jax.validate import ConfigError
from support import ggml
from support.gguf_files import write_gguf
from support.llama import reference
from support.pretrained import FAMILIES, law, write

gguf = pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")
pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")

KINDS = [("llama", "llama"), ("llama", "tied"), ("llama", "linear"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
TOKENS_BT = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
# As wide as blocks are.
WIDE = dict(hidden_size=32, intermediate_size=64, head_dim=8)
WIDER = dict(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)


def imported(source, run):
    return mtp_jax.load(import_run(str(source), run))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, split(a.model)[1], split(b.model)[1])
    assert a.config.model == b.config.model


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_both_ways_in_give_the_same_model(tmp_path, kind, family):
    directory, _, weights = write(tmp_path / "source", **FAMILIES[family])
    file = write_gguf(tmp_path / "model.gguf", weights, kind=kind, more=LINEAR if family == "linear" else {})
    ours, theirs = imported(file, tmp_path / "a"), imported(directory, tmp_path / "b")
    same(ours, theirs)
    text = "def f(x):\n    return 12 + x"
    assert ours.encode(text).tolist() == theirs.encode(text).tolist()
    kept = ours.tokenizer.conventions
    assert (kept.bos, kept.stops) == (258, (257,)) and ours.encode("x")[0] == 258


def test_the_template_comes_along(tmp_path):
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    _, _, weights = write(tmp_path / "source")
    run = imported(write_gguf(tmp_path / "model.gguf", weights), tmp_path / "run")
    text = run.tokenizer.conventions.render([{"role": "user", "content": "x"}])
    assert run.encode(text, special=True).tolist() == [258, *run.tokenizer.encode("x"), 257]


def test_others_who_read_an_export_begin_with_bos_too(tmp_path):
    _, _, weights = write(tmp_path / "source")
    more = {"tokenizer.ggml.padding_token_id": 2**32 - 1}  # none, as some converters write it
    run = imported(write_gguf(tmp_path / "model.gguf", weights, more=more), tmp_path / "run")
    out = export_run(run, tmp_path / "run", tmp_path / "out")
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("ab").ids == run.encode("ab").tolist()
    again = imported(out, tmp_path / "again")
    same(run, again)
    ours, theirs = run.tokenizer.conventions, again.tokenizer.conventions
    assert ours == theirs and ours.bos == 258


def test_pairs_that_are_left_side_by_side_are_seen(tmp_path, monkeypatch):
    _, config, weights = write(tmp_path / "source")
    file = write_gguf(tmp_path / "model.gguf", weights)
    logits_BTV = reference(config, weights, TOKENS_BT)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    np.testing.assert_allclose(law(imported(file, tmp_path / "a"), TOKENS_BT), logp_BTV, atol=2e-5)
    monkeypatch.setattr(reading, "INTERLEAVED", ())
    assert np.abs(law(imported(file, tmp_path / "b"), TOKENS_BT) - logp_BTV).max() > 0.2


@pytest.mark.parametrize("kind", ggml.TYPES)
def test_quantised_weights_are_what_ggml_reads(tmp_path, kind):
    directory, config, weights = write(tmp_path / "source", **(WIDER if kind.endswith("K") else WIDE))
    of = gguf.GGMLQuantizationType[kind]

    def blocks(array, _):
        return ggml.random_blocks(array.shape, kind) if kind.endswith("K") else gguf.quants.quantize(array, of)

    file = write_gguf(tmp_path / "model.gguf", weights, config=config, quantised=of, blocks=blocks)
    # Pairs are put in order after reading: rows of blocks move, and `random_blocks` are the same rows for any array.
    found = {}
    for name, weight in weights.items():
        found[name] = ggml.read(blocks(weight, of), kind) if weight.ndim == 2 else weight
        if kind.endswith("K") and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(weight) // config["head_dim"]
            found[name] = found[name].reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    directory, *_ = write(tmp_path / "read", weights=found, **config)
    ours = imported(file, tmp_path / "a")
    assert ours.config.model.param_dtype == "float32"
    same(ours, imported(directory, tmp_path / "b"))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")])
def test_what_is_not_quantised_keeps_its_dtype(tmp_path, kind, dtype):
    """Vectors are float32 in such a file."""
    _, config, weights = write(tmp_path / "source", **FAMILIES["qwen2"])
    of = gguf.GGMLQuantizationType[kind]
    exact = {name: weight.astype(jnp.dtype(dtype)).astype(np.float32) for name, weight in weights.items()}
    run = imported(write_gguf(tmp_path / "a.gguf", exact, kind="qwen2", quantised=of), tmp_path / "a")
    assert run.config.model.param_dtype == dtype and run.model.unembed_VD[...].dtype == dtype
    directory, *_ = write(tmp_path / "exact", dtype, weights=exact, **config)
    same(run, imported(directory, tmp_path / "b"))
    # Biases that this dtype does not hold are not rounded.
    finer = exact | {name: weight for name, weight in weights.items() if weight.ndim == 1}
    run = imported(write_gguf(tmp_path / "b.gguf", finer, kind="qwen2", quantised=of), tmp_path / "c")
    directory, *_ = write(tmp_path / "finer", weights=finer, **config)
    same(run, imported(directory, tmp_path / "d"))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llamas_scaling_is_read_from_its_tensor(tmp_path, factor):
    changes = dict(head_dim=16, rope_theta=5e5, max_position_embeddings=131072)
    rope = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= {"original_max_position_embeddings": 8192}
    directory, config, weights = write(tmp_path / "source", **changes, rope_scaling=rope)
    plain = ModelConfig(head_dim=16, rope_theta=5e5)
    scaled = ModelConfig(head_dim=16, rope_theta=5e5, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192))
    tensors = {"rope_freqs.weight": frequencies(plain) / frequencies(scaled)}
    file = write_gguf(tmp_path / "model.gguf", weights, config=config, tensors=tensors)
    same(imported(file, tmp_path / "a"), imported(directory, tmp_path / "b"))
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
    file = write_gguf(tmp_path / "other.gguf", weights, config=config, tensors=tensors)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's scaling by 8"):
        imported(file, tmp_path / "c")


REFUSED = {
    "another family": (dict(kind="falcon"), "general.architecture is 'falcon'; what can be imported has one of llama"),
    "another scaling": (dict(more={"llama.rope.scaling.type": "yarn"}), "llama.rope.scaling.type is 'yarn'"),
    "experts": (dict(more={"llama.expert_count": 8}), "llama.expert_count is 8; what can be imported has none"),
    "a window": (dict(more={"llama.attention.sliding_window": 32}), "llama.attention.sliding_window is 32"),
    "a part of the pairs": (
        dict(more={"llama.rope.dimension_count": 4}),
        r"llama\.rope\.dimension_count is 4 and heads are 6 wide",
    ),
    "more tensors": (
        dict(tensors={"blk.0.extra.weight": np.zeros(4, np.float32)}),
        "has the tensor 'blk.0.extra.weight'",
    ),
    "a part of a file": (dict(more={"split.count": 3}), r"split.count is 3; .* one file: llama-gguf-split --merge"),
    "another width": (
        dict(more={"llama.embedding_length": 32}),
        r"token_embd.weight is \[259, 16\], and the config makes it \[259, 32\]",
    ),
    "no width": (dict(without=["llama.embedding_length"]), "has no llama.embedding_length"),
    "no tokens": (dict(without=["tokenizer.ggml.tokens"]), "has no tokenizer.ggml.tokens"),
    "no end": (dict(without=["tokenizer.ggml.eos_token_id"]), "has no tokenizer.ggml.eos_token_id"),
    "an end that is none": (
        dict(more={"tokenizer.ggml.eos_token_id": 999}),
        "eos_token_id is 999 and there are 259 tokens",
    ),
    "another tokenizer": (dict(more={"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model is 'bert'"),
    "another pre-tokenizer": (
        dict(more={"tokenizer.ggml.pre": "gpt-4o"}),
        "tokenizer.ggml.pre is 'gpt-4o'; what can be imported has one of llama-bpe",
    ),
    "no pre-tokenizer": (dict(without=["tokenizer.ggml.pre"]), "tokenizer.ggml.pre is None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_do_not_compute_is_refused_and_leaves_nothing(tmp_path, name):
    options, words = REFUSED[name]
    _, _, weights = write(tmp_path / "source")
    file = write_gguf(tmp_path / "model.gguf", weights, **options)
    with pytest.raises(ConfigError, match=words):
        import_run(str(file), tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "model.gguf"}


def test_a_file_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path):
    _, _, weights = write(tmp_path / "source")
    file = write_gguf(tmp_path / "model.gguf", weights)
    whole = file.read_bytes()
    header = whole.index(b"token_embd.weight")
    lengths = [0, 3, 4, 8, 24, 30, *range(40, header, 601), header, header + 30, len(whole) // 2, len(whole) - 500]
    for length in lengths:
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"model\.gguf is damaged or cut short \(.*\)\. Get it again"):
            import_run(str(file), tmp_path / "run")
    file.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(ConfigError, match=r"model\.gguf is damaged or cut short \(GGUF magic invalid\)"):
        import_run(str(file), tmp_path / "run")
    with pytest.raises(ConfigError, match="There is no file"):
        import_run(str(tmp_path / "none.gguf"), tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "model.gguf"}
