"""`mtp-jax import` of what it cannot take: a sentence that names it, status 2, and nothing is left behind."""

import json

import numpy as np
import pytest

from support.gguf_files import write_gguf
from support.pretrained import CONFIG, FAMILIES, weights_of, write
from support.runs import contents

pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
from safetensors.numpy import load_file, save_file

INDEX, WEIGHTS, LAYER = "model.safetensors.index.json", "model.safetensors", "model.layers.0"


@pytest.fixture
def refuses(tmp_path, refused):
    """A function that imports a source, which must be refused with these words, and leave all as it was."""

    def run(source, *words):
        before = contents(tmp_path)
        message = refused("import", source, "--out", tmp_path / "runs" / "mine")
        for word in words:
            assert word in message, message
        assert message.startswith("mtp-jax: error: ") and message.endswith((".", "!"))
        assert contents(tmp_path) == before and not (tmp_path / "runs").exists()

    return run


def config(**changes):
    """A change of config.json; None takes a field out."""

    def change(directory):
        values = json.loads((directory / "config.json").read_text()) | changes
        kept = {name: value for name, value in values.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(kept))

    return change


def tensors(change):
    """A change of the weights, by name."""

    def write(directory):
        weights = load_file(directory / WEIGHTS)
        change(weights)
        save_file(weights, directory / WEIGHTS)

    return write


def split(directory):
    """Two files and their index."""
    weights = load_file(directory / WEIGHTS)
    parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, directory / file)
    (directory / WEIGHTS).unlink()
    listed = {name: file for file, names in parts.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def cut(name, left=-100):
    def change(directory):
        (directory / name).write_bytes((directory / name).read_bytes()[:left])

    return change


def text(name, content):
    return lambda directory: (directory / name).write_text(content)


def without(name):
    return lambda directory: (directory / name).unlink()


def pickled(directory):
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")


def tokenizer(**changes):
    def change(directory):
        values = json.loads((directory / "tokenizer.json").read_text())
        (directory / "tokenizer.json").write_text(json.dumps({**values, **changes}))

    return change


def larger(directory):
    values = json.loads((directory / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 259, "content": "<more>"})
    (directory / "tokenizer.json").write_text(json.dumps(values))


def endless(directory):
    """No token that is known to end a document, and no config that says which."""
    values = (directory / "tokenizer.json").read_text().replace("<|endoftext|>", "<|a|>")
    (directory / "tokenizer.json").write_text(values)
    (directory / "tokenizer_config.json").write_text("{}")


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
REFUSED = {
    # Files
    "no directory": (
        lambda d: d.rename(d.with_name("other")),
        ["There is no directory", "a name like Qwen/Qwen3-0.6B"],
    ),
    "no config": (without("config.json"), ["config.json cannot be read as JSON"]),
    "a config that is no JSON": (text("config.json", "{"), ["config.json cannot be read as JSON"]),
    "a config that is no object": (text("config.json", "[]"), ["config.json is no JSON object"]),
    "a config that is no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\0"),
        ["config.json cannot be read as JSON"],
    ),
    "no weights": (without(WEIGHTS), ["has no model.safetensors", "Get the model again"]),
    "a pickle alone": (pickled, ["pytorch_model.bin is a pickle, which is not read: it can run code"]),
    "weights cut short": (cut(WEIGHTS), ["model.safetensors is damaged or cut short"]),
    "weights of no length": (cut(WEIGHTS, 0), ["model.safetensors is damaged or cut short"]),
    "a header cut short": (cut(WEIGHTS, 60), ["model.safetensors is damaged or cut short"]),
    "a shard cut short": (lambda d: (split(d), cut("b.safetensors")(d)), ["b.safetensors is damaged or cut short"]),
    "a shard that is missing": (lambda d: (split(d), without("b.safetensors")(d)), ["has no b.safetensors"]),
    "an index of other tensors": (
        lambda d: (split(d), text(INDEX, json.dumps({"weight_map": {"a": "a.safetensors"}}))(d)),
        ["lists 'a', which is not in its file"],
    ),
    "an index that is no JSON": (lambda d: (split(d), text(INDEX, "{")(d)), [f"{INDEX} cannot be read as JSON"]),
    "an index of nothing": (lambda d: (split(d), text(INDEX, "{}")(d)), ["has no tensor 'lm_head.weight'"]),
    "no tokenizer": (without("tokenizer.json"), ["has no tokenizer.json", "save_pretrained(DIRECTORY)"]),
    "a tokenizer that is none": (text("tokenizer.json", "{}"), ["not a tokenizer.json of Hugging Face"]),
    "a larger tokenizer": (larger, ["the tokenizer has 260 tokens and vocab_size is 259", "of another model"]),
    "an end that is not there": (
        text("tokenizer_config.json", '{"eos_token": "<|eos|>"}'),
        ["'<|eos|>'", "has no such special token", "eos_token in"],
    ),
    "no end": (endless, ["tokenizer_config.json", "eos_token"]),
    "a tokenizer_config that is no JSON": (
        text("tokenizer_config.json", "{'eos_token': 1}"),
        ["tokenizer_config.json", "JSON"],
    ),
    # What is computed
    "another architecture": (config(model_type="gemma3"), ["model_type is 'gemma3'", "llama, mistral, qwen2, qwen3"]),
    "no architecture": (config(model_type=None), ["model_type is None"]),
    "experts": (config(num_local_experts=8), ["num_local_experts is 8", "has none"]),
    "experts of Qwen": (config(model_type="qwen3_moe", num_experts=8), ["model_type is 'qwen3_moe'"]),
    "a window": (
        config(model_type="mistral", sliding_window=32),
        ["sliding_window is 32", "max_position_embeddings (64)"],
    ),
    "Mistral's own window": (
        config(model_type="mistral", sliding_window=None, max_position_embeddings=8192),
        ["sliding_window is 4096", "max_position_embeddings (8192)"],
    ),
    "a window of Qwen": (
        config(model_type="qwen2", use_sliding_window=True, sliding_window=32),
        ["use_sliding_window is True", "has False"],
    ),
    "a layer with a window": (
        config(layer_types=["full_attention", "sliding_attention"]),
        ["layer_types is 'sliding_attention'", "full_attention alone"],
    ),
    "yarn": (config(rope_scaling=YARN), ["rope_scaling.rope_type is 'yarn'", "default, linear or llama3"]),
    "yarn, as releases from 5 on write it": (config(rope_parameters=YARN), ["rope_type is 'yarn'"]),
    "a scaling without a factor": (
        config(rope_scaling=dict(type="linear")),
        ["rope_scaling is linear and has no factor"],
    ),
    "a part of the pairs": (config(partial_rotary_factor=0.5), ["partial_rotary_factor is 0.5", "has 1.0"]),
    "a part of the pairs, from 5 on": (
        config(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
        ["partial_rotary_factor is 0.5", "has 1.0"],
    ),
    "another activation": (config(hidden_act="gelu"), ["hidden_act is 'gelu'", "has 'silu'"]),
    "biases of attention": (config(attention_bias=True), ["attention_bias is True", "has False"]),
    "biases of the feed-forward layer": (config(mlp_bias=True), ["mlp_bias is True", "has False"]),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantization_config", "'gptq'"]),
    "no width": (config(hidden_size=None), ["config.json", "has no hidden_size"]),
    "no context": (config(max_position_embeddings=None), ["config.json", "has no max_position_embeddings"]),
    "a width in words": (config(hidden_size="16"), ["hidden_size is '16'", "an integer of at least 1"]),
    "no heads": (config(num_attention_heads=0), ["num_attention_heads is 0", "an integer of at least 1"]),
    "heads that do not go by groups": (config(num_key_value_heads=3), ["num_heads is 4", "num_kv_heads is 3"]),
    # Tensors
    "quantised tensors": (
        tensors(lambda w: w.update({f"{LAYER}.mlp.up_proj.weight": np.zeros((24, 16), np.int8)})),
        [f"{LAYER}.mlp.up_proj.weight is I8", "F32, BF16, F16", "imported from its GGUF file"],
    ),
    "a tensor that is missing": (
        tensors(lambda w: w.pop(f"{LAYER}.mlp.up_proj.weight")),
        [f"has no tensor '{LAYER}.mlp.up_proj.weight'"],
    ),
    "no table of logits": (tensors(lambda w: w.pop("lm_head.weight")), ["has no tensor 'lm_head.weight'"]),
    "a tensor that is left over": (
        tensors(lambda w: w.update({f"{LAYER}.self_attn.o_proj.bias": np.zeros(16, np.float32)})),
        [f"has the tensor '{LAYER}.self_attn.o_proj.bias'", "no place for"],
    ),
    "fewer layers than there are": (config(num_hidden_layers=1), ["has the tensor 'model.layers.1.", "more, which"]),
    "more layers than there are": (config(num_hidden_layers=3), ["has no tensor 'model.layers.2."]),
    "another shape": (
        tensors(lambda w: w.update({f"{LAYER}.mlp.up_proj.weight": np.zeros((16, 24), np.float32)})),
        [f"{LAYER}.mlp.up_proj.weight is [16, 24]", "makes it [24, 16]"],
    ),
    "a vector of another length": (
        tensors(lambda w: w.update({"model.norm.weight": np.zeros(17, np.float32)})),
        ["model.norm.weight is [17]", "makes it [16]"],
    ),
    "fewer rows than tokens": (
        tensors(lambda w: w.update({"lm_head.weight": np.zeros((258, 16), np.float32)})),
        ["lm_head.weight is [258, 16]", "makes it [259, 16]"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_by_name(tmp_path, refuses, name):
    change, words = REFUSED[name]
    directory, *_ = write(tmp_path / "source")
    change(directory)
    refuses(directory, *words)


def test_gguf_files_are_refused_alike(tmp_path, refuses):
    pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")
    file = write_gguf(tmp_path / "model.gguf", weights_of(CONFIG))
    whole = file.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 200):
        file.write_bytes(whole[:length])
        refuses(file, "model.gguf is damaged or cut short", "Get it again")
    write_gguf(file, weights_of(CONFIG), more={"llama.expert_count": 8})
    refuses(file, "llama.expert_count is 8")
    file.unlink()
    refuses(file, "There is no file")


def test_a_model_of_the_hub_that_is_not_there_is_refused(refuses, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def none(*args, **options):
        raise LocalEntryNotFoundError("Cannot find it.\nAnd more.")

    monkeypatch.setattr(hub, "snapshot_download", none)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses("some/model", "The model some/model at revision main cannot be fetched", "$HF_HUB_OFFLINE is set")
    assert issubclass(RepositoryNotFoundError, OSError)


def test_a_template_with_an_error_is_named_by_chat(tmp_path, refused):
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    from mtp_jax.interop.importing import import_run

    directory, *_ = write(tmp_path / "source")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfo %}\n")
    run = import_run(str(directory), tmp_path / "run")
    assert "The chat template is wrong in line 3" in refused("chat", run)
    directory, *_ = write(tmp_path / "another", **FAMILIES["tied"])
    (directory / "chat_template.jinja").write_text("{{ messages[0].content.nothing() }}")
    assert "does not render these messages" in refused("chat", import_run(str(directory), tmp_path / "b"))
