"""Parity with `transformers`: models that it writes compute here what they compute there, and come back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.bench import hf
from mtp_jax.bench.config import BenchConfig
from mtp_jax.bench.session import Decoders
from mtp_jax.commands.tokenizer import train_bpe
from mtp_jax.data.tokenizers.conventions import read_conventions
from mtp_jax.interop import exporting
from mtp_jax.interop.exporting import export_run
from mtp_jax.interop.importing import import_run
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.state import split
from mtp_jax.sweep.costs import untrained
from support import tiny
from support.bpe import NASTY, TEXTS
from support.gguf_files import CONTROL, NORMAL, Vocabulary, write_gguf
from support.pretrained import CONFIG as SMALL
from support.pretrained import FAMILIES, V, in_float32, law, stories, weights_of, write_tokenizer

torch = pytest.importorskip("torch", reason="the other side is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the other side is transformers on torch")
pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")

torch.set_num_threads(1)  # so little is computed that threads only wait for each other
# Faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS_BT = np.random.default_rng(0).integers(0, 256, (2, 40)).astype(np.int32)
NEW = 24
CONFIG = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
CASES = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5))),
    "one key head": ("Llama", dict(num_key_value_heads=1)),
    "mistral": ("Mistral", dict(head_dim=12, sliding_window=None)),
    "qwen2": ("Qwen2", dict(rms_norm_eps=1e-6)),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=12, rms_norm_eps=1e-6)),
    "qwen3 tied": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    "bfloat16": ("Qwen2", dict(dtype="bfloat16")),
    "float16": ("Llama", dict(dtype="float16")),
    "several files": ("Qwen3", dict(head_dim=12, shards="20KB")),
    "more rows than tokens": ("Qwen2", dict(vocab_size=300, tie_word_embeddings=True)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model there, in float32, and here."""

    theirs: Any
    run: LoadedRun
    source: Path
    run_dir: Path


def random_model(kind, *, dtype="float32", **changes):
    """Weights that make heads attend and laws differ; vectors that are neither 0 nor 1."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**CONFIG, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(("norm" in name) + 0.15 * torch.randn_like(weight))
    return model.to(getattr(torch, dtype))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    kind, changes = CASES[request.param]
    changes = dict(changes)
    shards = changes.pop("shards", "5GB")
    model = random_model(kind, **changes)
    model.save_pretrained(folder / "source", max_shard_size=shards)
    assert (len(list((folder / "source").glob("*.safetensors"))) > 2) == (shards != "5GB")
    write_tokenizer(folder / "source", begins=False)
    run = import_run(str(folder / "source"), folder / "run")
    # Read anew: `model.float()` would keep frequencies that were rounded with the weights.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    return Case(theirs, in_float32(mtp_jax.load(run)), folder / "source", folder / "run")


def logp(model, tokens_BT=TOKENS_BT):
    """Their law over the ids that stand for something."""
    with torch.inference_mode():
        return model(torch.tensor(tokens_BT.astype(np.int64))).logits[..., :V].log_softmax(-1).numpy()


def greedy(model):
    rows = [id for id in range(V, model.config.vocab_size)]
    prompts = torch.tensor(TOKENS_BT[:, :8].astype(np.int64))
    options = dict(max_new_tokens=NEW, do_sample=False, suppress_tokens=rows or None)
    with torch.inference_mode():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    return out[:, 8:].numpy()


def test_laws_are_theirs(case):
    assert case.run.config.model.vocab_size == 320 and case.run.config.model.num_tokens == V
    np.testing.assert_allclose(law(case.run, TOKENS_BT), logp(case.theirs), atol=1e-5, rtol=0)


def test_greedy_text_is_theirs(case):
    found = case.run.generate_tokens(list(TOKENS_BT[:, :8]), max_new_tokens=NEW, stop_tokens=(), temperature=0.0)
    np.testing.assert_array_equal(np.stack(found.tokens), greedy(case.theirs))


def test_the_export_is_theirs_again(case, tmp_path, monkeypatch):
    several = len(list(case.source.glob("*.safetensors"))) > 1
    if several:
        monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    out = export_run(case.run, case.run_dir, tmp_path / "out")
    assert (len(list(out.glob("*.safetensors"))) > 2) == several
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    np.testing.assert_allclose(logp(again), logp(case.theirs), atol=1e-6, rtol=0)
    weights = dict(case.theirs.named_parameters())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, weights[name][: len(weight)]), name
    kept = json.loads((case.source / "config.json").read_text())["dtype"]
    assert json.loads((out / "config.json").read_text())["dtype"] == kept == case.run.config.model.param_dtype
    second = in_float32(mtp_jax.load(import_run(str(out), tmp_path / "run")))
    assert second.config.model == case.run.config.model
    np.testing.assert_array_equal(law(second, TOKENS_BT), law(case.run, TOKENS_BT))
    if case.theirs.config.vocab_size == V:  # rows of no token are not exported
        jax.tree.map(np.testing.assert_array_equal, split(second.model)[1], split(case.run.model)[1])
    text = "Once upon a\n\ttime 🙂"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(text)["input_ids"] == case.run.encode(text).tolist()


def test_a_trained_llama_tells_their_stories(tmp_path):
    directory = stories()
    run = mtp_jax.load(import_run(str(directory), tmp_path / "run"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for text in ("Once upon a time", "Lily and Tom", "The dog", "One day, a little"):
        ids = run.encode(text)
        assert ids.tolist() == tokenizer(text)["input_ids"]
        with torch.inference_mode():
            out = theirs.generate(torch.tensor(ids[None].astype(np.int64)), do_sample=False, max_new_tokens=64)
        found = run.generate_tokens([ids], max_new_tokens=64, temperature=0.0).tokens[0]
        assert found.tolist() == out[0, len(ids) :].tolist()
        assert run.tokenizer.decode(found) == tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("quantised", [None, "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_is_what_they_read(tmp_path, kind, quantised):
    gguf = pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    width = 128 if kind == "qwen3" else 8  # theirs takes Qwen3's own for granted
    config = {**SMALL, **FAMILIES[kind], "hidden_size": 32, "intermediate_size": 64, "head_dim": width}
    small = {name: ("norm" in name) + 0.4 * (w - ("norm" in name)) for name, w in weights_of(config).items()}
    of = quantised and gguf.GGMLQuantizationType[quantised]
    more = {f"{kind}.vocab_size": V}
    file = write_gguf(tmp_path / "model.gguf", small, config=config, kind=kind, quantised=of, more=more)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    run = mtp_jax.load(import_run(str(file), tmp_path / "run"))
    np.testing.assert_allclose(law(run, TOKENS_BT), logp(theirs.eval()), atol=1e-5, rtol=0)


def test_qwens_tokenizer_is_theirs(tmp_path):
    pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'mtp_jax[gguf]'")
    model = json.loads(train_bpe(iter(TEXTS), 480))["model"]
    ends = ["<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *ends]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(merge) for merge in model["merges"]]
    types = [CONTROL if token in ("<|endoftext|>", *ends) else NORMAL for token in tokens]
    joined, ids = [" ".join(merge) for merge in merges], dict(eos_token_id=vocab["<|im_end|>"])
    found = Vocabulary(tokens, types, joined, pre="qwen2", ids=ids)
    config = {**SMALL, **FAMILIES["qwen2"], "vocab_size": len(tokens)}
    file = write_gguf(tmp_path / "a.gguf", weights_of(config), config=config, kind="qwen2", vocabulary=found)
    ours = mtp_jax.load(import_run(str(file), tmp_path / "run")).tokenizer
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=ends)
    for text in NASTY:
        assert ours.encode_special(text).tolist() == theirs(text)["input_ids"], text


SAID = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Hé & 'hi'\n"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "Why?"},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": "{{- bos_token }}\n{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '' %}\n"
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}{{ date }}",
    "Mistral": "{%- set ns = namespace(index=0) %}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{%- continue %}{%- endif %}{%- if message.role not in ['user', 'assistant'] %}{{- raise_exception('no') }}"
    "{%- endif %}{{- ns.index }}[{{ message.content | tojson }}]{%- set ns.index = ns.index + 1 %}{%- endfor %}",
    "for training": "{% for message in messages %}\n  {% if message.role == 'assistant' %}\n{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}\n{% else %}\n{{ message.content }}\n{% endif %}\n"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_written_as_theirs(tmp_path, name):
    pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
    write_tokenizer(tmp_path)
    special = {"bos_token": "<s>", "eos_token": "<|end|>"}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": TEMPLATES[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), read_conventions(tmp_path, {}, ())
    for messages in (SAID, SAID[1:2]):
        for answer in (True, False):
            written = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            assert ours.render(messages, answer=answer) == written


def test_the_benchmark_decodes_beside_transformers():
    """Greedy texts of both are the same in float32, with its prompt lookup and with our drafts."""
    run = untrained(tiny.train_config(tiny.model_config(vocab_size=258), tiny.head_config(target="ntp")))
    prompts = [np.arange(5, dtype=np.int32), np.array([7, 8, 9, 7, 8, 9, 7, 8], np.int32)]
    with jax.set_mesh(run.mesh):
        config = BenchConfig(new_tokens=6, repetitions=1)
        found = hf.bench_hf(run, Decoders(run), prompts, 2, config, lambda _: None)
    rows = {(row["name"], row["k"], row["dtype"]): row for row in found["rows"]}
    names = [*((name, None) for name in hf.MODES), ("mtp_jax", 0), ("mtp_jax", 2)]
    assert rows.keys() == {(*name, dtype) for name in names for dtype in ("float32", "bfloat16")}
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert not any(row["rows_that_differ"] for row in rows.values() if row["dtype"] == "float32")
