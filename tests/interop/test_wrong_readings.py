"""Deliberate faults of the importer: each is far beyond what parity allows, so none of them would go unseen."""

import contextlib
import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer

import mtp_jax
from mtp_jax.interop import hf
from mtp_jax.interop.importing import import_run
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.validate import ConfigError
from support.llama import reference
from support.pretrained import FAMILIES, law, write

pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")

ALLOWED, FAR = 2e-5, 0.2
SQUARE = dict(head_dim=4)  # as many outputs of heads as the model is wide: a transposed matrix fits
TEXT = "two words"


def reading(monkeypatch, change):
    """The importer with `change(name, whole tensor)` in place of each tensor."""
    whole = hf.open_tensors

    @contextlib.contextmanager
    def opened(directory):
        with whole(directory) as (shapes, dtype, read):

            def changed(name, rows, columns):
                array = change(name, read(name, slice(None), slice(None)))
                return array[rows, columns] if array.ndim == 2 else array[rows]

            yield shapes, dtype, changed

    monkeypatch.setattr(hf, "open_tensors", opened)


def configured(monkeypatch, **changes):
    """The importer with a config that it reads wrongly."""
    whole = hf.model_config
    monkeypatch.setattr(hf, "model_config", lambda *args: dataclasses.replace(whole(*args), **changes))


def side_by_side(name, array):
    """Rotary pairs taken for neighbours."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    return array.reshape(-1, 2, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def transposed(name, array):
    return array.T if name.endswith("o_proj.weight") else array


def unbiased(name, array):
    return 0 * array if name.endswith(".bias") else array


def swapped(name, array):
    """Key heads in another order: each serves the queries of another one."""
    return np.roll(array, len(array) // 2, 0) if name.endswith("k_proj.weight") else array


def not_normed(name, array):
    return np.ones_like(array) if name.endswith("q_norm.weight") else array


def twice(monkeypatch):
    """Every text begins with BOS, whether or not it has one."""
    whole = LoadedRun.encode

    def encode(self, text, **options):
        return np.concatenate([np.array([self.tokenizer.conventions.bos], np.int32), whole(self, text, **options)])

    monkeypatch.setattr(LoadedRun, "encode", encode)


FAULTS = {
    "interleaved pairs": (SQUARE, lambda patch: reading(patch, side_by_side)),
    "a transposed output": (SQUARE, lambda patch: reading(patch, transposed)),
    "no bias": (FAMILIES["qwen2"], lambda patch: reading(patch, unbiased)),
    "key heads in another order": ({}, lambda patch: reading(patch, swapped)),
    "no norm of queries": (FAMILIES["qwen3"], lambda patch: reading(patch, not_normed)),
    "another eps": ({}, lambda patch: configured(patch, norm_eps=1e-6)),
    "another theta": ({}, lambda patch: configured(patch, rope_theta=1e4)),
    "no scaling": (FAMILIES["llama3"], lambda patch: configured(patch, rope_scaling=hf.RopeScaling())),
    "untied taken for tied": ({}, lambda patch: configured(patch, tie_embeddings=True)),
    "BOS twice": ({}, twice),
}


def difference(directory, config, weights, run_dir):
    """How far our law behind a text is from that of the files, at most, from the text's own first token on."""
    run = mtp_jax.load(import_run(str(directory), run_dir))
    # The library itself puts BOS in front of it.
    theirs_BT = np.array([Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids])
    logits_BTV = reference(config, weights, theirs_BT)[:, 1:]
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    return np.abs(law(run, run.encode(TEXT)[None])[:, -logp_BTV.shape[1] :] - logp_BTV).max()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_importer_is_seen(tmp_path, monkeypatch, name):
    changes, fault = FAULTS[name]
    # Embeddings so small that eps matters.
    directory, config, weights = write(tmp_path / "source", embedding=0.01, **changes)
    clean = difference(directory, config, weights, tmp_path / "clean")
    assert clean < ALLOWED
    fault(monkeypatch)
    found = difference(directory, config, weights, tmp_path / "run")
    assert found > FAR


@pytest.mark.parametrize(("family", "taken"), [("qwen2", "llama"), ("qwen3", "llama"), ("llama", "qwen3")])
def test_a_family_taken_for_another_is_refused_by_its_tensors(tmp_path, monkeypatch, family, taken):
    directory, *_ = write(tmp_path / "source", **FAMILIES[family])
    monkeypatch.setitem(hf.FAMILIES, family, hf.FAMILIES[taken])
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.self_attn\.(k_proj\.bias|k_norm\.weight)'"):
        import_run(str(directory), tmp_path / "run")
