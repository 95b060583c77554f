"""Greedy decoding by Hugging Face `transformers`, of the same weights, next to ours: plain, and with drafts that it
looks up in the prompt."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax.bench.config import BenchConfig
from mtp_jax.config import TrainConfig
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.generate import generate
from mtp_jax.interop.exporting import check_exportable, exported_config, state_dict
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.validate import require

PACKAGES = ("torch", "transformers")
MODES: dict[str, dict[str, Any]] = {"transformers": {}, "transformers, prompt lookup": {"prompt_lookup_num_tokens": 5}}
"""What it can do with no other model at hand: options of its `generate` by name."""
Decode = Callable[[np.ndarray], np.ndarray]


def check(run: TrainConfig) -> None:
    """Raise `ConfigError` unless the packages are installed and the run's model is one that it has."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    require(
        not missing,
        f"compare is hf and {' and '.join(missing)} is not installed; `pip install {' '.join(PACKAGES)}`, or leave "
        "--compare out.",
    )
    check_exportable(run.model, run.head)


def bench_hf(
    run: LoadedRun,
    models: Mapping[str, Decoder],
    prompts: Sequence[np.ndarray],
    k: int,
    config: BenchConfig,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Greedy decoding of every prompt by both, in every dtype, one prompt at a time; the mesh is in scope.

    Whole calls are timed: prefill too, and what each does around it. Within a dtype the decoders take turns, prompt by
    prompt.

    Args:
      run: whose weights they are.
      models: ours by dtype.
      prompts: token ids.
      k: drafts per forward of ours, beside 0.
      config: how many tokens, and how often.
      progress: told what is done.

    Returns:
      `rows` with `name`, `k` (None for theirs), `dtype`, `tokens_per_second` and `rows_that_differ`, the prompts that
      plain decoding of theirs in that dtype continues differently; `ratio`, the fastest of ours over the fastest of
      theirs; and what `transformers` ran on.
    """
    import torch  # type: ignore[import-not-found]

    def of_dtype(dtype: str) -> list[dict[str, Any]]:
        """When it returns, the memory of both models is free."""
        theirs, decoder = load_theirs(run, dtype), models[dtype]

        def ours(prompt: np.ndarray, k: int) -> np.ndarray:
            return generate(decoder, [prompt], max_new_tokens=config.new_tokens, k=k).tokens[0]

        decoders: dict[tuple[str, int | None], Decode] = {
            (name, None): functools.partial(theirs, new_tokens=config.new_tokens, **options)
            for name, options in MODES.items()
        }
        decoders |= {("mtp_jax", each): functools.partial(ours, k=each) for each in sorted({0, k})}
        say = lambda done: progress(f"beside transformers in {dtype}: {done}")  # noqa: E731
        timed = compare([*decoders.values()], prompts, config.repetitions, say)
        return [{"name": name, "k": k, "dtype": dtype, **row} for (name, k), row in zip(decoders, timed, strict=True)]

    rows = [row for dtype in models for row in of_dtype(dtype)]
    best = (max(row["tokens_per_second"] for row in rows if (row["k"] is None) == other) for other in (False, True))
    ours_best, theirs_best = best
    return {
        "rows": rows,
        "ratio": ours_best / theirs_best,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def compare(
    decoders: Sequence[Decode], prompts: Sequence[np.ndarray], repetitions: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time decoders on every prompt, one after the other, and count the prompts that they continue differently from the
    first."""
    tokens = [[decode(prompt) for prompt in prompts] for decode in decoders]  # warm from here on
    seconds = np.zeros((repetitions, len(decoders)))
    for repetition in range(repetitions):
        for index, prompt in enumerate(prompts):
            for column, decode in enumerate(decoders):
                begun = time.perf_counter()
                decode(prompt)
                seconds[repetition, column] += time.perf_counter() - begun
            progress(f"prompt {index + 1} of {len(prompts)}, repetition {repetition + 1}")
    return [
        {
            "tokens_per_second": float(sum(map(len, texts)) / time_of_all),
            "rows_that_differ": sum(not np.array_equal(*pair) for pair in zip(texts, tokens[0], strict=True)),
        }
        for texts, time_of_all in zip(tokens, np.median(seconds, axis=0), strict=True)
    ]


def load_theirs(run: LoadedRun, dtype: str) -> Callable[..., np.ndarray]:
    """The run as a model of `transformers` that computes in `dtype`: a function of a prompt, a number of new tokens and
    more options of its `generate` that gives those."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    values = exported_config(run.config.model, run.config.head)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, eos_token_id=None, bos_token_id=None)
    # Not by `to`, which would round the frequencies of the positions too.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    weights = {name: torch.tensor(np.float32(weight)) for name, weight in state_dict(run.model)}
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict(weights | tied)
    model = model.to(_device()).eval()

    def decode(prompt: np.ndarray, new_tokens: int, **options: Any) -> np.ndarray:
        ids = torch.tensor(np.asarray(prompt, np.int64)[None], device=_device())
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
        return out[0, len(prompt) :].cpu().numpy()

    return decode


def _device() -> str:
    import torch  # type: ignore[import-not-found]

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
