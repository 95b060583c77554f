"""Plain decoding by Hugging Face `transformers`, of the same weights, next to ours with k = 0."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax.bench.config import BenchConfig
from mtp_jax.config import TrainConfig
from mtp_jax.decode.generate import generate
from mtp_jax.interop.exporting import check_exportable, exported_config, state_dict
from mtp_jax.runs.loading import LoadedRun
from mtp_jax.validate import require

PACKAGES = ("torch", "transformers")
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
    run: LoadedRun, prompts: Sequence[np.ndarray], config: BenchConfig, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Greedy decoding of every prompt by both, in the config's dtype, one prompt at a time; the mesh is in scope.

    Whole calls are timed: prefill too, and what each does around it.

    Returns:
      `tokens_per_second` of `ours` and `hf`, their `ratio`, `rows_that_differ`, and what `transformers` ran on.
    """
    theirs = load_theirs(run)

    def hf(prompt: np.ndarray) -> np.ndarray:
        return theirs(prompt, config.new_tokens)

    def ours(prompt: np.ndarray) -> np.ndarray:
        return generate(run.decoder, [prompt], max_new_tokens=config.new_tokens, k=0).tokens[0]

    import torch  # type: ignore[import-not-found]

    return {
        **compare({"ours": ours, "hf": hf}, prompts, config.repetitions, progress),
        "dtype": run.config.model.dtype,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def compare(
    decoders: dict[str, Decode], prompts: Sequence[np.ndarray], repetitions: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time two decoders on every prompt, one after the other, and count the prompts that they continue differently."""
    tokens = {name: [decode(prompt) for prompt in prompts] for name, decode in decoders.items()}  # warm from here on
    seconds = np.zeros((repetitions, len(decoders)))
    for repetition in range(repetitions):
        for index, prompt in enumerate(prompts):
            for column, decode in enumerate(decoders.values()):
                begun = time.perf_counter()
                decode(prompt)
                seconds[repetition, column] += time.perf_counter() - begun
            progress(f"{' and '.join(decoders)}: prompt {index + 1} of {len(prompts)}, repetition {repetition + 1}")
    first, second = tokens.values()
    median = dict(zip(decoders, np.median(seconds, axis=0), strict=True))
    rates = {name: float(sum(map(len, tokens[name])) / median[name]) for name in decoders}
    ours, theirs = rates.values()
    differ = sum(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    return {"tokens_per_second": rates, "ratio": ours / theirs, "rows_that_differ": differ}


def load_theirs(run: LoadedRun) -> Callable[[np.ndarray, int], np.ndarray]:
    """The run as a model of `transformers`: a function of a prompt and a number of new tokens that gives those."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    values = exported_config(run.config.model, run.config.head)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, eos_token_id=None, bos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = {name: torch.tensor(np.float32(weight)) for name, weight in state_dict(run.model)}
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict(weights | tied)
    model = model.to(_device(), getattr(torch, run.config.model.dtype)).eval()

    def decode(prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        ids = torch.tensor(np.asarray(prompt, np.int64)[None], device=_device())
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return out[0, len(prompt) :].cpu().numpy()

    return decode


def _device() -> str:
    import torch  # type: ignore[import-not-found]

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
