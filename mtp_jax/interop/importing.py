"""Import of a pretrained model: a Hugging Face directory, a model of its hub or a GGUF file becomes a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath

from mtp_jax.arrays import random_key
from mtp_jax.config import MeshConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.data.tokenizers import HFTokenizer
from mtp_jax.data.tokenizers.conventions import read_conventions
from mtp_jax.heads.config import HeadConfig
from mtp_jax.interop import hf
from mtp_jax.interop.gguf import open_gguf
from mtp_jax.interop.pretrained import Pretrained
from mtp_jax.interop.weights import read_params
from mtp_jax.mesh import make_mesh, on_mesh
from mtp_jax.runs.base import tensors_sha256
from mtp_jax.runs.layout import TOKENIZER_DIR, write_config
from mtp_jax.runs.paths import check_writable, children, full_path, replace_file
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState, build_model, split
from mtp_jax.validate import ConfigError, require

ROWS = 64  # the vocabulary is padded to a multiple of it, which every tensor axis divides
NO_HEAD = HeadConfig(kind="none", window=1, circuit="independent", rank=1, target="ntp", balance="none")
IGNORED = (".rotary_emb.inv_freq",)  # what a config says too


def import_run(
    source: str,
    out: epath.PathLike,
    *,
    revision: str = "main",
    dtype: Literal["float32", "bfloat16"] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> epath.Path:
    """Make a run directory of a pretrained model, and return its path. It is there whole, or not at all.

    The parameters keep their dtype; what is quantised becomes float32. Tokenizer, stop tokens and chat template come
    with them.

    Args:
      source: a Hugging Face directory, the id of a model of its hub, such as "Qwen/Qwen3-0.6B", or a GGUF file.
      out: the run directory, which is not there yet.
      revision: of the hub: a branch, a tag or a commit.
      dtype: what the model computes in, and the heads that are trained on it; by default bfloat16 where the parameters
        are, else float32.
      log: told what is done.

    Raises:
      ConfigError: the model is of a kind that we do not compute, its files do not fit together, or `out` exists.
    """
    run = full_path(out)
    require(not children(run), f"{run} exists and is not empty; give another --out, or delete it.")
    check_writable(run.parent, "Give another --out.", folder=True)
    with contextlib.ExitStack() as stack:
        if source.endswith(".gguf"):
            found = open_gguf(Path(source).expanduser().absolute())
        else:
            found = stack.enter_context(_open_hf(_directory(source, revision)))
        computes = dtype or ("bfloat16" if found.dtype == "bfloat16" else "float32")
        model = dataclasses.replace(found.model, param_dtype=found.dtype, dtype=computes)
        _write(dataclasses.replace(found, model=model), source, revision, run, log)
    return run


@contextlib.contextmanager
def _open_hf(directory: Path) -> Iterator[Pretrained]:
    model = hf.model_config(hf.read_json(directory / hf.CONFIG), str(directory / hf.CONFIG))
    tokenizer = _tokenizer(directory)
    tokenizer.conventions = read_conventions(directory, tokenizer.special, tokenizer.begins())
    with hf.open_tensors(directory) as (shapes, dtype, read):
        ignored = [name for name in shapes if name.endswith(IGNORED)]
        ignored += ["lm_head.weight"] * (model.tie_embeddings and "lm_head.weight" in shapes)
        yield Pretrained(str(directory), "hf", model, tokenizer, shapes, dtype, read, ignored)


def _write(found: Pretrained, source: str, revision: str, run: epath.Path, log: Callable[[str], None]) -> None:
    """Write the run, aside first."""
    tokenizer, rows = found.tokenizer, found.model.vocab_size
    if found.ignored:
        log(f"Not used, since the config says it too: {', '.join(found.ignored)}.")
    require(
        tokenizer.vocab_size <= rows,
        f"{found.what}: the tokenizer has {tokenizer.vocab_size} tokens and vocab_size is {rows}; one of them is of "
        "another model.",
    )
    model = dataclasses.replace(found.model, vocab_size=-(-rows // ROWS) * ROWS)
    end = str(tokenizer.to_json()["end_of_document"])
    data = DataConfig(tokenizer=f"hf:{found.what}", end_of_document=end, seq_len=min(1024, model.context_length))
    config = TrainConfig(model, NO_HEAD, data).with_tokenizer(tokenizer.vocab_size)
    mesh = make_mesh(MeshConfig(1, 1, 1), _host())
    with jax.set_mesh(mesh):
        build = functools.partial(build_model, config, random_key(0))
        target = on_mesh(jax.eval_shape(jax.jit(lambda: split(build())[1])), mesh)
        shapes = {name: shape for name, shape in found.shapes.items() if name not in found.ignored}
        params = read_params(target, found.model, shapes, found.read, found.kind, found.what)
        log(f"Read {len(shapes)} tensors in {found.dtype}.")
        partial = run.parent / f".{run.name}.partial"
        if partial.exists():
            partial.rmtree()
        write_config(partial, config)
        for name, content in tokenizer.files().items():
            (partial / TOKENIZER_DIR).mkdir(exist_ok=True)
            replace_file(partial / TOKENIZER_DIR / name, content)
        state = TrainState(jnp.zeros((), jnp.int32), params, {})
        imported = {"source": source, "revision": revision, "sha256": tensors_sha256(params, found.model.vocab_size)}
        with CheckpointWriter(partial, 1, on_host=True) as checkpoints:
            checkpoints.save(state, config, {}, "", imported=imported)
    if run.exists():
        run.rmdir()
    partial.replace(run)


def _host() -> list[Any]:
    """The device that parameters go through: this machine's own memory, which a checkpoint is written from as it is."""
    try:
        return jax.local_devices(backend="cpu")[:1]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return jax.local_devices()[:1]


def _tokenizer(directory: Path) -> HFTokenizer:
    """The directory's, whose documents end as its files say, if they do."""
    require(
        (directory / hf.TOKENIZER).is_file(),
        f"{directory} has no {hf.TOKENIZER}, the only kind of tokenizer that is read. transformers writes it: "
        "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY).",
    )
    path = directory / hf.TOKENIZER_CONFIG
    end = hf.read_json(path).get("eos_token") if path.exists() else None
    try:
        return HFTokenizer.load(str(directory), end["content"] if isinstance(end, dict) else end or "")
    except ConfigError as error:
        if "DataConfig.end_of_document" not in str(error):
            raise
        raise ConfigError(f"{error} An import takes eos_token in {path} for it.") from error


def _directory(source: str, revision: str) -> Path:
    """Where the model's files are, fetched from the hub if `source` is no directory."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.absolute()
    require(
        "/" in source and not source.startswith((".", "/", "~")),
        f"There is no directory {source}, and a model of the hub has a name like Qwen/Qwen3-0.6B.",
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors", hf.INDEX, hf.CONFIG, *hf.TOKENIZER_FILES]
    twice = "consolidated*"  # what some have of the same weights by other names
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=twice))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = " $HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"The model {source} at revision {revision} cannot be fetched from the hub ({reason}).{offline} Give the "
            "path of a directory that has its files."
        ) from error
