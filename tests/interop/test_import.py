"""Import of pretrained models: what comes in computes what its files say, and anything else is refused by name."""

import dataclasses
import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest

import mtp_jax
from mtp_jax import DataConfig, HeadConfig, TrainConfig
from mtp_jax.interop import exporting
from mtp_jax.interop.exporting import export_run
from mtp_jax.interop.importing import import_run
from mtp_jax.interop.weights import read_params
from mtp_jax.mesh import on_mesh
from mtp_jax.runs.base import open_base
from mtp_jax.state import build_model, split
from mtp_jax.validate import ConfigError
from support import tiny
from support.llama import reference
from support.pretrained import FAMILIES, TEMPLATE, V, law, stories, write

pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")
from safetensors.numpy import load_file, save_file

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


@pytest.fixture
def source(tmp_path):
    """Writes a Hugging Face directory and returns it with its config and weights."""
    return functools.partial(write, tmp_path / "source")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_its_files_say(source, tmp_path, name):
    directory, config, weights = source(**FAMILIES[name])
    run = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    scaling = config["rope_scaling"] and {"rope_type": "linear", **config["rope_scaling"]}
    logits_BTV = reference({**config, "rope_scaling": scaling}, weights, TOKENS_BT)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    np.testing.assert_allclose(law(run, TOKENS_BT), logp_BTV, atol=2e-5)
    assert run.config.model.num_tokens == V and run.config.model.vocab_size == 320


def test_what_it_computes_in_can_be_said(source, tmp_path):
    """The parameters are the same, and so a head on the one stands on the other; it computes as its base does."""
    directory, _, _ = source(np.float32)
    bases = {dtype: import_run(str(directory), tmp_path / str(dtype), dtype=dtype) for dtype in (None, "bfloat16")}
    plain, other = (open_base(str(base)) for base in bases.values())
    assert plain.sha256 == other.sha256
    assert (plain.config.model.dtype, other.config.model.dtype) == ("float32", "bfloat16")
    assert other.config.model.param_dtype == "float32"
    head = HeadConfig(kind="sequential", window=2, target="ntp")
    config = TrainConfig(head=head, data=DataConfig(seq_len=32))
    assert other.resolve(config).model.dtype == "bfloat16"


KEPT = [(name, "float32") for name in FAMILIES]
KEPT += [(name, dtype) for name in ("tied", "qwen2", "qwen3") for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize(("name", "dtype"), KEPT)
def test_an_import_of_the_export_is_the_identity(source, tmp_path, name, dtype):
    directory, _, weights = source(getattr(ml_dtypes, dtype, None) or np.dtype(dtype), **FAMILIES[name])
    first = mtp_jax.load(import_run(str(directory), tmp_path / "first"))
    assert first.config.model.param_dtype == dtype and first.model.unembed_VD[...].dtype == dtype
    assert first.config.model.dtype == ("bfloat16" if dtype == "bfloat16" else "float32"), "what it computes in"
    export_run(first, tmp_path / "first", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        assert found[key].dtype == weight.dtype
        np.testing.assert_array_equal(found[key], weight)
    second = mtp_jax.load(import_run(str(tmp_path / "out"), tmp_path / "second"))
    jax.tree.map(np.testing.assert_array_equal, split(first.model)[1], split(second.model)[1])
    assert first.tokenizer.to_json() == second.tokenizer.to_json()
    assert first.config.model == second.config.model and first.config.head == second.config.head


def test_an_export_in_several_files_is_read_by_its_index(source, tmp_path, monkeypatch):
    directory, _, weights = source(**FAMILIES["qwen2"])
    first = mtp_jax.load(import_run(str(directory), tmp_path / "first"))
    monkeypatch.setattr(exporting, "SHARD_BYTES", 8_000)
    out = export_run(first, tmp_path / "first", tmp_path / "out")
    listed = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert listed.keys() == weights.keys() and sorted(set(listed.values())) == files and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    second = mtp_jax.load(import_run(str(out), tmp_path / "second"))
    jax.tree.map(np.testing.assert_array_equal, split(first.model)[1], split(second.model)[1])


def test_rows_that_no_token_has_are_not_exported(source, tmp_path):
    directory, _, weights = source(vocab_size=300, tie_word_embeddings=True)
    first = mtp_jax.load(import_run(str(directory), tmp_path / "first"))
    out = export_run(first, tmp_path / "first", tmp_path / "out")
    found = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found, weights["model.embed_tokens.weight"][:V])
    second = mtp_jax.load(import_run(str(out), tmp_path / "second"))
    np.testing.assert_array_equal(law(second, TOKENS_BT), law(first, TOKENS_BT))
    again = export_run(second, tmp_path / "second", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_nothing_is_rounded_where_dtypes_are_mixed(tmp_path):
    """Parameters have the dtype of the matrices, unless a bias is finer; norms are float32."""
    _, config, weights = write(tmp_path / "plain", **FAMILIES["qwen2"])
    half = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items() if weight.ndim == 2}
    norms = {name: weight for name, weight in weights.items() if "norm" in name}
    biases = {name: weight for name, weight in weights.items() if name.endswith(".bias")}
    rounded = {name: bias.astype(ml_dtypes.bfloat16).astype("float32") for name, bias in biases.items()}
    finer = half | {"lm_head.weight": weights["lm_head.weight"]}
    cases = {"bfloat16": half | norms | rounded, "biases": half | norms | biases, "matrices": finer | norms | rounded}
    for name, mixed in cases.items():
        directory, *_ = write(tmp_path / name, **config)
        save_file(mixed, directory / "model.safetensors")
        run = mtp_jax.load(import_run(str(directory), tmp_path / f"{name}.run"))
        assert run.config.model.param_dtype == ("bfloat16" if name == "bfloat16" else "float32")
        exact = {name: weight.astype("float32") for name, weight in mixed.items()}
        directory, *_ = write(tmp_path / f"{name}.exact", weights=exact, **config)
        whole = mtp_jax.load(import_run(str(directory), tmp_path / f"{name}.whole"))
        ours, theirs = split(run.model)[1], split(whole.model)[1]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("float32"), b), ours, theirs)


def test_a_model_of_the_hub_is_fetched_once_and_at_its_revision(source, tmp_path, monkeypatch):
    hub, utils = pytest.importorskip("huggingface_hub"), pytest.importorskip("huggingface_hub.utils")
    directory, *_ = source()
    files = [*(path.name for path in directory.iterdir()), "consolidated.safetensors", "pytorch_model.bin", "run.py"]

    def fetch(source, *, revision, allow_patterns, ignore_patterns):
        assert (source, revision) == ("some/model", "v2")
        chosen = set(utils.filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert chosen == set(files[:-3])
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    found = mtp_jax.load(import_run("some/model", tmp_path / "run", revision="v2"))
    assert found.meta["imported"]["source"] == "some/model" and found.meta["imported"]["revision"] == "v2"
    whole = mtp_jax.load(import_run(str(directory), tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, split(whole.model)[1], split(found.model)[1])


def test_several_files_are_read_by_their_index(source, tmp_path):
    directory, _, weights = source()
    whole = mtp_jax.load(import_run(str(directory), tmp_path / "whole"))
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: weights[name] for name in chosen}, directory / file)
    listed = {name: file for file, chosen in parts.items() for name in chosen}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    found = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, split(whole.model)[1], split(found.model)[1])


def test_an_export_of_several_files_comes_back(source, tmp_path, monkeypatch):
    directory, _, weights = source(ml_dtypes.bfloat16)
    run = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    monkeypatch.setattr(exporting, "SHARD_BYTES", 4000)
    export_run(run, tmp_path / "run", tmp_path / "out")
    files = sorted(tmp_path.glob("out/*.safetensors"))
    found = [load_file(file) for file in files]
    for name, weight in weights.items():
        np.testing.assert_array_equal(*(part[name] for part in found if name in part), weight)
    # A file has what fits, or one tensor that is larger.
    sizes = [[weight.nbytes for weight in part.values()] for part in found]
    assert len(files) > 3 and all(len(part) == 1 or sum(part) <= 4000 for part in sizes)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    again = mtp_jax.load(import_run(str(tmp_path / "out"), tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, split(run.model)[1], split(again.model)[1])


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_each_device_reads_its_own_part(source, tmp_path, shape):
    directory, _, weights = source(**FAMILIES["qwen2"])
    run = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    config, parts = run.config, []

    def read(name, rows, columns):
        whole = weights[name]
        piece = whole[rows, columns] if whole.ndim == 2 else whole[rows]
        parts.append((name, piece.size / whole.size))
        return piece

    with tiny.mesh(*shape) as mesh:
        target = jax.eval_shape(jax.jit(lambda: split(build_model(config, jax.random.key(0)))[1]))
        shapes = {name: weight.shape for name, weight in weights.items()}
        model = dataclasses.replace(config.model, vocab_size=V)
        found = read_params(on_mesh(target, mesh), model, shapes, read, "hf", "here")
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(split(run.model)[1]))
    split_ones = [share for name, share in parts if name.endswith("q_proj.weight")]
    assert max(split_ones) <= (1 / 4 if shape[2] == 2 else 1 / 8)


REFUSED = {
    "another family": (dict(model_type="gemma3"), "model_type is 'gemma3'; what can be imported has one of llama"),
    "experts": (dict(num_local_experts=8), "num_local_experts is 8; what can be imported has none"),
    "a window": (dict(model_type="mistral", sliding_window=32), "sliding_window is 32; .* at least max_position_embed"),
    "yarn": (
        dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
        "rope_type is 'yarn'; .* default, linear or llama3",
    ),
    "another activation": (dict(hidden_act="gelu"), "hidden_act is 'gelu'; what can be imported has 'silu'"),
    "a bias of the output": (dict(attention_bias=True), "attention_bias is True; what can be imported has False"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "another width": (
        dict(intermediate_size=32),
        r"down_proj.weight is \[16, 24\], and the config makes it \[16, 32\]",
    ),
    "fewer layers": (dict(num_hidden_layers=1), "has the tensor 'model.layers.1.input_layernorm.weight', .* 8? ?more"),
    "a bias that is not there": (dict(model_type="qwen2"), "has no tensor 'model.layers.0.self_attn.k_proj.bias'"),
    "a larger vocabulary": (
        dict(vocab_size=300),
        r"embed_tokens.weight is \[259, 16\], and the config makes it \[300, 16\]",
    ),
    "a smaller vocabulary": (dict(vocab_size=200), "the tokenizer has 259 tokens and vocab_size is 200"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_do_not_compute_is_refused_and_leaves_nothing(source, tmp_path, name):
    changes, words = REFUSED[name]
    directory, config, _ = source()
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=words):
        import_run(str(directory), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "cut short": (lambda d: cut(d / "model.safetensors"), "model.safetensors is damaged or cut short"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is not read",
    ),
    "an index of a file that is not there": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "has no b.safetensors",
    ),
    "a config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_together_are_refused(source, tmp_path, name):
    directory, *_ = source()
    damage, words = BROKEN[name]
    damage(directory)
    with pytest.raises(ConfigError, match=words):
        import_run(str(directory), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_run_that_is_there_stays(source, tmp_path):
    directory, *_ = source()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        import_run(str(directory), tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_conventions_come_with_the_model(source, tmp_path):
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    directory, *_ = source()
    run = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    kept = run.tokenizer.conventions
    assert (kept.bos, kept.stops) == (258, (256, 257)) and run.tokenizer.end_of_document == 257
    # One BOS in front of a text, and none more where there is one.
    assert run.encode("ab").tolist()[0] == 258 and len(run.encode("ab")) == 3
    assert run.encode("<s>ab", special=True).tolist() == run.encode("ab").tolist()
    assert 258 not in run.encode("<s>ab").tolist()[1:], "text never becomes a special token"
    text = kept.render([{"role": "user", "content": "hi"}])
    assert text == "<s>user: hi<|end|>assistant:"
    ids = run.encode(text, special=True).tolist()
    assert ids.count(258) == 1 and ids.count(257) == 1
    assert isinstance(run.chat([{"role": "user", "content": "hi"}], max_new_tokens=4), str)


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("", [{"role": "user", "content": "x"}], "has no chat template"),
        (TEMPLATE, [{"role": "tool", "content": "x"}], "does not render these messages: no tools here"),
        (TEMPLATE, ["hello"], "Message 0 is 'hello'; it must be a dictionary"),
        ("a\n{% for %}", [], "The chat template is wrong in line 2"),
        ("{{ ''.__class__.__mro__ }}", [], "does not render"),
        ("{{ 1 // 0 }}", [], "does not render these messages: integer division"),
        ("a\n\n{{ x | nothing }}", [], "wrong in line 3: No filter named 'nothing'"),
    ],
)
def test_a_conversation_that_cannot_be_written_is_refused(template, messages, words):
    pytest.importorskip("jinja2", reason="chat templates are jinja: pip install 'mtp_jax[hf]'")
    from mtp_jax.data.tokenizers.conventions import Conventions

    with pytest.raises(ConfigError, match=words):
        Conventions(template=template).render(messages)


def test_a_trained_llama_of_others_tells_a_story(tmp_path):
    directory = stories()
    run = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    text = run.generate("Once upon a time", max_new_tokens=96)
    assert "little girl named Lily" in text
    config, weights = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    tokens_BT = run.encode("Once upon a time" + text)[None]
    logits_BTV = reference({**config, **config["rope_parameters"], "rope_scaling": None}, weights, tokens_BT)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    np.testing.assert_allclose(law(run, tokens_BT), logp_BTV[..., :V], atol=1e-4)
    out = export_run(run, tmp_path / "run", tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(found[name], weight)
    same = split(mtp_jax.load(import_run(str(out), tmp_path / "again")).model)[1]
    jax.tree.map(np.testing.assert_array_equal, same, split(run.model)[1])
