"""Expected acceptance while a head is trained: on texts that its base wrote once, before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtp_jax.config import TrainConfig
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.prompts import some_prompts
from mtp_jax.data.store import Store
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.expectation import Expectation, expectation, hidden_states
from mtp_jax.decode.generate import generate
from mtp_jax.language_model import LanguageModel
from mtp_jax.mesh import on_mesh
from mtp_jax.runs.base import Base
from mtp_jax.state import TrainState
from mtp_jax.train.step import Trainer, make_trainer

PROMPTS, PROMPT_TOKENS, TEXT_TOKENS, NEW_TOKENS = 16, 256, 32, 64  # at most


NOTHING_EXPECTED = (
    "evaluations say nothing of tokens per forward, and best is that of the lowest loss: they need one process, "
    "eval_temperatures, a window above 1, target ntp and held-out prompts that fit; mtp-jax eval RUN may have them"
)


@dataclass(frozen=True)
class Texts:
    """What a base wrote at one temperature, and its `hidden_states`. The first `count` are different texts."""

    config: DecodeConfig
    prompts: list[np.ndarray]
    texts: list[np.ndarray]
    states: Any
    count: int

    def expected(self, model: LanguageModel) -> Expectation:
        """What drafting with the head of `model` would count."""
        return expectation(model, self.prompts, self.texts, self.config, self.states).first(self.count)


def write_texts(
    model: LanguageModel, store: Store | Mixture, tokenizer: Tokenizer, temperatures: tuple[float, ...], devices: int
) -> list[Texts]:
    """Let `model` go on behind held-out prompts, once for each temperature, without drafts.

    Args:
      model: the base, with its trunk, and with the head whose window is drafted; the mesh in scope.
      store: prompts are what comes before an answer, or the beginnings of documents.
      tokenizer: says what ends a text.
      temperatures: of sampling.
      devices: data x fsdp devices, which divide the prompts.
    """
    context = model.config.context_length
    prompts = some_prompts(store, PROMPTS, min(PROMPT_TOKENS if store.masked else TEXT_TOKENS, context // 2))
    if not prompts:
        return []
    count = len(prompts)
    prompts += prompts[:1] * (-count % devices)
    new = min(NEW_TOKENS, context - max(map(len, prompts)))
    decoder, found = for_decoding(model), []
    for temperature in temperatures:
        config = DecodeConfig(new, temperature, stop_tokens=tokenizer.stop_tokens)
        texts = generate(decoder, prompts, **{**vars(config), "k": 0}).tokens
        found.append(Texts(config, prompts, texts, hidden_states(model, prompts, texts), count))
    return found


def base_texts(
    config: TrainConfig,
    base: Base,
    trainer: Trainer,
    state: TrainState,
    store: Store | Mixture,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> list[Texts]:
    """What the base writes at the `eval_temperatures`. Its trunk is read for that where training does without."""
    params = state.whole
    if "trunk" not in params:
        whole = make_trainer(config)
        params = {**base.params(on_mesh(jax.eval_shape(whole.init).base, mesh)), **state.params}
        trainer = whole
    model = nnx.merge(trainer.graph, params)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return write_texts(model, store, tokenizer, config.eval_temperatures, devices)


def expected_metrics(graph: nnx.GraphDef, params: Any, texts: list[Texts]) -> dict[str, float]:
    """Expected tokens per forward and acceptance by offset at each temperature, by name; and `expected_tokens`, the
    mean over temperatures, by which the best checkpoint is chosen."""
    model, found = nnx.merge(graph, params), {}
    for one in texts:
        counts, at = one.expected(model), f"_at_{one.config.temperature:g}"
        found[f"expected_tokens{at}"] = counts.tokens_per_forward
        found |= {f"expected_acceptance{at}_{s}": rate for s, rate in enumerate(counts.acceptance, 1)}
    if texts:
        found["expected_tokens"] = float(
            np.mean([found[name] for name in found if name.startswith("expected_tokens_")])
        )
    return found
