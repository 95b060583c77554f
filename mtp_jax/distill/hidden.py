"""Cache of hidden states: what a base makes of every row of a store, computed once.

The cache is a store itself: the same documents, and `train.hidden.bin`, `[rows, T, D]`, beside them. A head that is
trained on it reads its base's vocabulary tables and never its trunk. `train.normaliser.bin`, `[rows, T]`, has the
normaliser of the base's law, for losses against it: a step would multiply with the whole table for that alone. The
cache is made aside (`.NAME.partial`), renamed when complete, and what an interruption leaves is continued.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from mtp_jax.data.placement import place
from mtp_jax.data.rows import Rows, pack
from mtp_jax.data.store import MANIFEST, SPLITS, Store
from mtp_jax.language_model import LanguageModel
from mtp_jax.runs.base import Base
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.runs.lock import one_maker
from mtp_jax.runs.paths import replace_file
from mtp_jax.validate import ConfigError, integer, require

DONE, ASKED = "done.json", "asked.json"


def cache_hidden(
    run: LoadedRun,
    base: Base,
    store: Store,
    out: str | os.PathLike[str],
    *,
    seq_len: int,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    taps: tuple[int, ...] = (),
    temperature: float | None = None,
    batch_size: int = 8,
    log: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Make a store of the hidden states of a base over the rows of `store`, and return its path.

    Args:
      run: the base's model, on one process's devices.
      base: which run that is, as `mtp_jax.runs.base.open_base` gives it.
      store: documents of the base's tokenizer.
      out: the directory to make.
      seq_len: tokens in a row (T): that of the training to come.
      dtype: of what is kept; by default what the base computes in, so that nothing is lost.
      taps: layers, counted from 1, whose outputs are kept too, for a head that reads them.
      temperature: of the law whose normaliser is kept; by default that at which the texts were sampled, or 1.
      batch_size: rows at a time.
      log: told the bytes before the first is written.
      progress: told after each batch how many rows of all are done.

    Raises:
      BusyError: another command makes it.
      ConfigError: the store has another tokenizer or is a cache itself, a row does not fit the context, `out` is there,
        there is no room, a state is not finite in that dtype, or `temperature` is not that of texts that were sampled.
    """
    model, path = run.config.model, Path(os.path.expanduser(out)).absolute()
    seq_len, batch_size = integer("seq_len", seq_len, 1), integer("batch_size", batch_size, 1)
    dtype = dtype or model.dtype
    require(not path.exists(), f"{path} exists; give another --out, or delete it.")
    require(jax.process_count() == 1, "Hidden states are cached by one process, with all of its devices.")
    require(store.hidden is None, f"{store.path} is a cache of hidden states itself; give the store that it is of.")
    require(
        store.manifest["tokenizer"] == run.tokenizer.to_json(),
        f"The store {store.path} was made with the tokenizer {store.manifest['tokenizer']} and the base has "
        f"{run.tokenizer.to_json()}. Prepare it with --base.",
    )
    require(
        seq_len <= model.context_length,
        f"seq_len is {seq_len} and the base's context_length is {model.context_length}; a row must fit.",
    )
    require(len(set(taps)) == len(taps), f"taps is {taps}, with a layer twice; name each once.")
    outside = [n for n in taps if not 1 <= n <= model.num_layers]
    require(not outside, f"taps has {outside} and the base has the layers 1..{model.num_layers}; give some of those.")
    kept: dict[str, Any] = {"seq_len": seq_len, "width": (1 + len(taps)) * model.d_model, "dtype": dtype}
    kept |= {"computed_in": model.dtype, "taps": [*taps], "temperature": _temperature(run, store, temperature)}
    with one_maker(path):
        _make(run, store, path, {**kept, "base": base.reference()}, batch_size, log, progress)
    return path


def _temperature(run: LoadedRun, store: Store, temperature: float | None) -> float | None:
    """Of the law whose normaliser is kept. None of a base whose own law goes through its head's table."""
    there = (store.sampled or {}).get("temperature")
    require(
        temperature is None or temperature > 0,
        f"temperature is {temperature}; it must be above 0: that of the law that a head is compared with.",
    )
    require(
        not temperature or temperature == (there or temperature),
        f"temperature is {temperature} and the texts in {store.path} were sampled at {there}, whose law a head learns "
        "from them. Leave it out.",
    )
    if run.config.head.target != "ntp":
        return None
    return temperature or there or 1.0


def _make(
    run: LoadedRun,
    store: Store,
    path: Path,
    kept: dict[str, Any],
    batch_size: int,
    log: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> None:
    """Make what `kept` says."""
    seq_len, dtype, width = kept["seq_len"], kept["dtype"], kept["width"]
    rows = {split: pack(getattr(store, split), seq_len) for split in SPLITS}
    for packed in rows.values():
        if packed.cut:
            log(f"{packed.losses()} Raise --seq-len, if the model's context allows it.")
    manifest = {**store.manifest, "hidden": kept}
    scratch = path.with_name(f".{path.name}.partial")
    done = _begin(scratch, store, manifest, log)
    count, kind = sum(map(len, rows.values())), np.dtype(jnp.dtype(dtype))
    row = seq_len * (width * kind.itemsize + 4 * (kept["temperature"] is not None))
    size, left = count * row, (count - sum(done.values())) * row
    free = shutil.disk_usage(scratch).free
    log(f"{count:,} rows of {seq_len} x {width} in {dtype}: {size / 1e9:.3f} GB")
    require(left < free, f"{path.parent} has {free / 1e9:.2f} GB free, and {left / 1e9:.2f} GB are needed. Make room.")
    before = 0
    with jax.set_mesh(run.mesh):
        each = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        batch_size = -(-batch_size // each) * each
        for split in SPLITS:
            shape = (len(rows[split]), seq_len)
            files = [_file(scratch / f"{split}.hidden.bin", kind, (*shape, width))]
            if kept["temperature"] is not None:
                files.append(_file(scratch / f"{split}.normaliser.bin", np.dtype(np.float32), shape))
            for first in range(done.get(split, 0), shape[0], batch_size):
                last = min(first + batch_size, shape[0])
                for file, found in zip(files, _states(run, rows[split], first, batch_size, kept), strict=True):
                    assert file is not None
                    file[first:last] = found[: last - first]
                    file.flush()
                done[split] = last
                replace_file(epath.Path(scratch / DONE), json.dumps(done))
                progress(before + last, count)
            before += shape[0]
    for file in (DONE, ASKED):
        (scratch / file).unlink(missing_ok=True)
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2))
    scratch.rename(path)


def _file(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.memmap | None:
    """A file to write to, with what is in it; None, and an empty file, where there is nothing to write."""
    if not shape[0]:
        path.touch()
        return None
    return np.memmap(path, kind, "r+" if path.exists() else "w+", shape=shape)


def _begin(scratch: Path, store: Store, manifest: dict[str, Any], log: Callable[[str], None]) -> dict[str, int]:
    """Make the directory, or go on with what is there if it is of the same; returns how many rows are done by split."""
    wanted, asked = json.dumps(manifest, indent=2), scratch / ASKED
    if asked.exists() and asked.read_text() == wanted:
        return json.loads((scratch / DONE).read_text()) if (scratch / DONE).exists() else {}
    if scratch.exists():
        log(f"{scratch} is of other states, or of an earlier version, and is made anew.")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(store.path, scratch, ignore=shutil.ignore_patterns(MANIFEST))
    asked.write_text(wanted)
    return {}


def _states(run: LoadedRun, rows: Rows, first: int, count: int, kept: dict[str, Any]) -> list[np.ndarray]:
    """The hidden states of `count` rows from `first` on, `[count, T, D]`, with taps behind each, and if it is kept the
    normaliser of the law there, `[count, T]`."""
    dtype = kept["dtype"]
    tokens_BT, pieces_BT, _ = rows.read(np.arange(first, first + count))
    batch = place({"tokens_BT": tokens_BT, "pieces_BT": pieces_BT.astype(np.int32)}, run.mesh)
    asked = dtype, (*kept["taps"],), kept["temperature"]
    *found, finite_B = _see(run.model, batch["tokens_BT"], batch["pieces_BT"], *asked)
    if not (finite_B := np.asarray(finite_B)).all():
        bad = first + int(np.argmin(finite_B))
        raise ConfigError(
            f"Row {bad} of the {rows.documents.split} split has states that are not finite in {dtype}. Keep them "
            "in bfloat16 or float32, or look at that text."
        )
    return [*map(np.asarray, found)]


def _hidden(
    model: LanguageModel,
    tokens_BT: Array,
    segments_BT: Array,
    dtype: str,
    taps: tuple[int, ...],
    temperature: float | None,
) -> tuple[Array, ...]:
    seen = model.see(tokens_BT, segments_BT, taps)
    x_BTD = jnp.concatenate([seen.x_BTD, *seen.taps], axis=-1).astype(dtype)
    finite_B = jnp.all(jnp.isfinite(x_BTD), axis=(1, 2))
    if temperature is None:
        return x_BTD, finite_B
    # Of the states as they are kept: it is they that the law is formed from. XLA may drop a pair of casts.
    kept = jnp.finfo(dtype)
    last_BTD = jax.lax.reduce_precision(seen.x_BTD.astype(jnp.float32), kept.nexp, kept.nmant)
    return x_BTD, model.normaliser(last_BTD.astype(model.config.dtype), temperature), finite_B


_see = jax.jit(_hidden, static_argnames=("dtype", "taps", "temperature"))
