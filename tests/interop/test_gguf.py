"""GGUF files, written here by the gguf package: the same model as its Hugging Face directory."""

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.interop.importing import import_run
from mtp_jax.interop.weights import WEIGHTS
from mtp_jax.state import split
from mtp_jax.validate import ConfigError
from support.pretrained import CONFIG, FAMILIES, D, F, H, K, L, N, write

gguf = pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")
pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")


def write_gguf(path, weights, *, kind="llama", pre="smollm", quantised=None, more=None, tensors=None):
    """A file with these weights; rotary pairs interleaved for `llama`, as its converter does."""
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_key_length(H)
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|end|>", "<s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    for name, value in (more or {}).items():
        writer.add_string(name, value)
    names = {}
    for weight in WEIGHTS:
        for i in range(L):
            names[weight.hf.format(i)] = weight.gguf.format(i)
    for name, array in weights.items():
        theirs = names[name]
        if kind == "llama" and (".attn_q." in theirs or ".attn_k." in theirs):
            heads = array.shape[0] // H
            array = array.reshape(heads, 2, H // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(theirs, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "family"), [("llama", "llama"), ("llama", "tied"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_both_ways_in_give_the_same_model(tmp_path, kind, family):
    directory, _, weights = write(tmp_path / "source", **FAMILIES[family])
    file = write_gguf(tmp_path / "model.gguf", weights, kind=kind)
    runs = [mtp_jax.load(import_run(str(of), tmp_path / name)) for of, name in ((directory, "a"), (file, "b"))]
    jax.tree.map(np.testing.assert_array_equal, *(split(run.model)[1] for run in runs))
    assert runs[0].config.model == runs[1].config.model
    text = "def f(x):\n    return 12 + x"
    assert runs[0].tokenizer.encode(text)[-3:].tolist() == runs[1].tokenizer.encode(text)[-3:].tolist()
    kept = runs[1].tokenizer.conventions
    assert (kept.bos, kept.stops) == (258, (257,)) and runs[1].encode("x")[0] == 258
    assert runs[1].encode(kept.render([{"role": "user", "content": "x"}]), special=True).tolist()[0] == 258


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_digits_are_cut_as_the_models_pre_tokenizer_does(tmp_path, pre):
    _, _, weights = write(tmp_path / "source")
    file = write_gguf(tmp_path / "model.gguf", weights, pre=pre)
    run = mtp_jax.load(import_run(str(file), tmp_path / "run"))
    pieces = run.tokenizer._tok.pre_tokenizer.pre_tokenize_str("it's 12345 ab")
    numbers = [text for text, _ in pieces if text.strip("\u0120").isdigit()]
    assert numbers == {"llama-bpe": ["123", "45"], "qwen2": list("12345"), "smollm": list("12345")}[pre]


def test_llamas_scaling_is_read_from_its_tensor(tmp_path):
    from mtp_jax.model.config import ModelConfig, RopeScaling
    from mtp_jax.model.rotary import frequencies

    _, _, weights = write(tmp_path / "source")
    plain = ModelConfig(d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, rope_theta=CONFIG["rope_theta"])
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    scaled = ModelConfig(
        d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, rope_theta=CONFIG["rope_theta"], rope_scaling=scaling
    )
    factors = (frequencies(plain) / frequencies(scaled)).astype(np.float32)
    if factors.max() < 31:  # such small heads have no wavelength that is stretched whole
        factors = np.full_like(factors, 32.0)
        with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's scaling by 32"):
            import_run(
                str(write_gguf(tmp_path / "model.gguf", weights, tensors={"rope_freqs.weight": factors})),
                tmp_path / "r",
            )
        return
    run = import_run(
        str(write_gguf(tmp_path / "m.gguf", weights, tensors={"rope_freqs.weight": factors})), tmp_path / "r"
    )
    assert mtp_jax.load(run).config.model.rope_scaling == scaling


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kind="falcon"), "general.architecture is 'falcon'; what can be imported has one of llama"),
        (dict(pre="gpt-4o"), "tokenizer.ggml.pre is 'gpt-4o'; what can be imported has one of llama-bpe"),
        (dict(more={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type is 'yarn'"),
        (dict(tensors={"blk.0.extra.weight": np.zeros(4, np.float32)}), "has the tensor 'blk.0.extra.weight'"),
    ],
)
def test_what_we_do_not_compute_is_refused_and_leaves_nothing(tmp_path, options, words):
    _, _, weights = write(tmp_path / "source")
    file = write_gguf(tmp_path / "model.gguf", weights, **options)
    with pytest.raises(ConfigError, match=words):
        import_run(str(file), tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "model.gguf"}


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    _, _, weights = write(tmp_path / "source")
    file = write_gguf(tmp_path / "model.gguf", weights)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ConfigError, match=r"model\.gguf is damaged or cut short"):
        import_run(str(file), tmp_path / "run")
    with pytest.raises(ConfigError, match="There is no file"):
        import_run(str(tmp_path / "none.gguf"), tmp_path / "run")
