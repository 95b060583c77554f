"""Export of a run: a directory that `transformers` and what reads its files load, with the law that decoding keeps."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from mtp_jax.data.tokenizers.conventions import FILE as CONVENTIONS
from mtp_jax.heads.config import HeadConfig
from mtp_jax.interop import hf
from mtp_jax.interop.weights import names, tensors, theirs, to_theirs
from mtp_jax.language_model import LanguageModel
from mtp_jax.model.config import ModelConfig
from mtp_jax.model.transformer import Trunk
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.runs.paths import children, full_path
from mtp_jax.state import split
from mtp_jax.validate import require

SHARD_BYTES = 5 * 10**9
CARD = """# {name}

Written by `mtp-jax export` from step {step} of `{run}`{base}. The files here are the model without its head: they give
the law that decoding with the head keeps. {head}
"""


def check_exportable(model: ModelConfig, head: HeadConfig) -> None:
    """Raise `ConfigError` unless the target's logits are one table times the hidden state of a trunk that is known."""
    require(
        head.target == "ntp" or head.rank == 1,
        f"head.target is {head.target} and head.rank is {head.rank}: the target is a mixture of {head.rank} softmaxes, "
        "and a Llama has one table. Export a model with head.target ntp, or with head.rank 1.",
    )
    hf.to_hf(model)


def exported_config(model: ModelConfig, head: HeadConfig) -> dict[str, Any]:
    """The `config.json` of Hugging Face. Raises `ConfigError` as `check_exportable`."""
    check_exportable(model, head)
    return {**hf.to_hf(model), "tie_word_embeddings": model.tie_embeddings and head.target == "ntp"}


def state_dict(model: LanguageModel) -> Iterator[tuple[str, np.ndarray]]:
    """The weights by their names at Hugging Face, one after another, in the dtype that they are kept in; rows of ids
    that no tokenizer has are left out. The mesh of `model` is in scope, its layers stacked as training has them.

    Raises `ConfigError` as `check_exportable`.
    """
    return ((one.name, one.fetch()) for one in _tensors(model))


def export_run(run: LoadedRun, run_dir: epath.PathLike, out: epath.PathLike) -> epath.Path:
    """Write a model into a new directory, and return its path: config, safetensors, tokenizer, a model card.

    One weight of one layer is in memory at a time, beside the model.

    Raises `ConfigError` as `check_exportable`, and where `out` has something in it.
    """
    directory = full_path(out)
    require(not children(directory), f"{directory} exists and is not empty; give another --out, or delete it.")
    config = exported_config(run.config.model, run.config.head)
    partial = directory.parent / f".{directory.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    kept, end = run.tokenizer.conventions, run.tokenizer.end_of_document
    ends = list(kept.stops or (end,))
    ids = {"bos_token_id": kept.bos, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    files = {hf.CONFIG: {**config, **ids}, "generation_config.json": ids}
    if kept.special:
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **kept.special,
            "add_bos_token": kept.bos is not None,
            **({"chat_template": kept.template} if kept.template else {}),
        }
    for file, values in files.items():
        (partial / file).write_text(json.dumps(values, indent=2) + "\n")
    for file, content in run.tokenizer.files().items():
        if file not in (*files, CONVENTIONS):
            (partial / file).write_bytes(content)
    with jax.set_mesh(run.mesh):
        dtype = jnp.dtype(run.config.model.param_dtype)
        shards, index = _shards(_tensors(run.model), dtype.itemsize), {}
        for number, shard in enumerate(shards, 1):
            file = hf.WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            hf.write_tensors(partial / file, dtype.name, shard)
            index |= {one.name: file for one in shard}
    if len(shards) > 1:
        (partial / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n")
    head = run.config.head
    source = (run.meta.get("imported") or run.meta.get("base", {}).get("source", {})).get("source")
    base = f", which began with `{source or run.config.init_from}`" if source or run.config.init_from else ""
    said = (
        "It has none."
        if head.kind == "none"
        else (f"Its head (`{head.kind}`, W = {head.window}) is in that run directory, and is read by `mtp_jax.load`.")
    )
    (partial / "README.md").write_text(
        CARD.format(name=directory.name, step=run.step, run=run_dir, base=base, head=said)
    )
    if directory.exists():
        directory.rmdir()
    return partial.replace(directory)


def _tensors(model: LanguageModel) -> list[hf.Tensor]:
    """All that is exported, none of it fetched yet."""
    config, head = model.config, model.head.config
    check_exportable(config, head)
    require(isinstance(model.trunk, Trunk), "The model is laid out for decoding. Load it without decoding_only=True.")
    params, dtype = split(model)[1], jnp.dtype(config.param_dtype)
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)  # type: ignore[assignment]

    def fetch(path: tuple[str, ...], at: int | slice) -> np.ndarray:
        # What is cut on its device goes with it: of a whole array JAX would keep the copy.
        return to_theirs(np.asarray(flat[path][at]).astype(dtype, copy=False), path)

    found = []
    for path, weight in names(params, config, "hf").items():
        if path == ("unembed_VD",) and head.target != "ntp" and not config.tie_embeddings:
            continue
        shape, parts = theirs(flat[path].shape, path), tensors(weight, config, "hf")
        shape = (config.known, *shape[1:]) if path[-1].endswith("_VD") else shape
        for layer, name in enumerate(parts):
            at = layer if "blocks" in path else slice(shape[0])
            found.append(hf.Tensor(name, shape, functools.partial(fetch, path, at)))
    if head.target != "ntp":
        shape = (config.known, config.d_model)
        found.append(hf.Tensor("lm_head.weight", shape, lambda: _table(model)[: config.known].astype(dtype)))
    return found


def _shards(weights: list[hf.Tensor], itemsize: int) -> list[list[hf.Tensor]]:
    """Weights that go into one file, in their order."""
    shards, size = [[]], 0
    for one in weights:
        nbytes = math.prod(one.shape) * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += nbytes
    return shards


def _table(model: LanguageModel) -> np.ndarray:
    """The table `[V, D]` of a head whose first offset is one product."""
    # Whatever the factors are, with one component logits are linear: those of the unit vectors are the table.
    unit_1DD, none_1D = jnp.eye(model.config.d_model)[None], jnp.zeros((1, model.config.d_model), jnp.int32)
    logits = jax.jit(lambda model, *seen: model.head.logits(model.seen(*seen), stop=1)[0])
    return np.asarray(logits(model, unit_1DD, none_1D))[0, :, 0].T  # of [1, D, R, V]
