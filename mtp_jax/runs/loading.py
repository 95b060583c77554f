"""Loading of a run: the trained model of a run directory, wherever it was trained."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from mtp_jax.arrays import random_key
from mtp_jax.config import MeshConfig, TrainConfig
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.data.tokenizers.conventions import Messages
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import Decoder, dtypes_for_decoding, for_decoding
from mtp_jax.decode.decoding import Generation
from mtp_jax.decode.generate import generate, stream
from mtp_jax.decode.spans import Spans
from mtp_jax.decode.text import check_text, continue_text, prompt_texts, stop_bytes
from mtp_jax.decode.tune import tuned
from mtp_jax.language_model import LanguageModel
from mtp_jax.mesh import make_mesh, on_mesh
from mtp_jax.runs.base import base_of
from mtp_jax.runs.checkpoints import Checkpoints, Step
from mtp_jax.runs.layout import read_config, run_tokenizer, to_config
from mtp_jax.state import build_model, split
from mtp_jax.validate import require


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to use. `model` wants `mesh` in scope (`with jax.set_mesh(run.mesh): ...`)."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: TrainConfig
    mesh: Mesh
    step: int
    meta: dict[str, Any]
    _laid_out: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def decoder(self) -> Decoder:
        """The model laid out for decoding, anew where `model` was changed since."""
        weights, structure = jax.tree.flatten(self.model)
        for decoder, of, like in self._laid_out:
            if like == structure and all(a is b for a, b in zip(of, weights, strict=True)):
                return decoder
        self._laid_out.clear()  # the memory of the old one is free for the new one
        with jax.set_mesh(self.mesh):
            decoder = for_decoding(self.model)
        self._laid_out[:] = [(decoder, weights, structure)]
        return decoder

    def generate(
        self, prompts: str | list[str], *, stop: str | Sequence[str] | None = (), **options: Any
    ) -> str | list[str]:
        """Continue text, up to the end of a document or the first of the strings `stop`, which is cut off.

        Options are those of `mtp_jax.generate`.
        """
        texts = [prompts] if isinstance(prompts, str) else prompt_texts(prompts)
        config = DecodeConfig.of(options, stop_tokens=self.stop_tokens)
        with jax.set_mesh(self.mesh):
            out = continue_text(self.decoder, self.tokenizer, texts, config, stop)
        return out[0] if isinstance(prompts, str) else out

    def generate_tokens(self, prompts: list[Any], **options: Any) -> Generation:
        """Continue token ids. Options are those of `mtp_jax.generate`."""
        with jax.set_mesh(self.mesh):
            return generate(self.decoder, prompts, **{**options, "stop_tokens": self._stops(options)})

    def _stops(self, options: dict[str, Any]) -> Any:
        given = options.get("stop_tokens")
        return self.stop_tokens if given is None else given

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer, those of a pretrained model or the end of a document."""
        return self.tokenizer.stop_tokens

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of a prompt, as `generate` makes them: with what the model wants in front. `special`: special tokens
        in it stand for themselves; without it text never becomes one."""
        return self.tokenizer.encode_prompt(text, special=special)

    def chat(self, messages: Messages, **options: Any) -> str:
        """The assistant's answer to a conversation: a list of {"role": ..., "content": ...}.

        Options are those of `mtp_jax.generate`; it goes on for `max_new_tokens`, if given, or up to its end or that of
        the context.

        Raises `ConfigError` if the model has no chat template, or it does not render the messages.
        """
        prompt = self.conversation(messages)
        out = self.generate_tokens([prompt], **self._up_to_the_context(prompt, options))
        return self.tokenizer.decode(out.tokens[0])

    def conversation(self, messages: Messages) -> np.ndarray:
        """The ids of a conversation, up to where the assistant's answer begins.

        Raises `ConfigError` as `chat`, and if they fill the context.
        """
        ids, context = self.encode(self.tokenizer.conventions.render(messages), special=True), self.config.model
        require(
            len(ids) < context.context_length,
            f"The conversation has {len(ids)} tokens, and the context holds {context.context_length}.",
        )
        return ids

    def stream(self, prompt: str | Messages, *, stop: str | Sequence[str] | None = (), **options: Any) -> Spans:
        """Continue a text, or answer a conversation, as it comes: each span is a piece of the prompt, of the target's
        own text or of accepted drafts.

            for span in run.stream("Once upon a time", max_new_tokens=64):
                print(span.text, end="")  # span.kind is prompt, target or draft

        Arguments and errors as in `generate` and `chat`.
        """
        if isinstance(prompt, str):
            check_text("The prompt", prompt)
            ids = self.encode(prompt)
        else:
            ids = self.conversation(prompt)
            options = self._up_to_the_context(ids, options)
        config = DecodeConfig.of(options, stop_tokens=self.stop_tokens)
        config.check(self.config.model, self.config.head, [ids])
        with jax.set_mesh(self.mesh):
            config = tuned(self.decoder, [ids], config)
        return Spans(self.tokenizer, ids, self._forwards(ids, config), stop_bytes(stop), config.k)

    def _up_to_the_context(self, ids: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
        """The options of an answer, which ends where the context does if not before."""
        left, given = self.config.model.context_length - len(ids), options.get("max_new_tokens")
        more = isinstance(given, numbers.Integral) and int(given) > left
        return options | {"max_new_tokens": left} if given is None or more else options

    def _forwards(self, ids: np.ndarray, config: DecodeConfig) -> Iterator[tuple[np.ndarray, int]]:
        parts = stream(self.decoder, ids, config)
        while True:
            with jax.set_mesh(self.mesh):  # and not while the caller looks at what came
                part = next(parts, None)
            if part is None:
                return
            yield part


def load(
    run_dir: epath.PathLike,
    step: Step = "latest",
    mesh: MeshConfig | Mesh | None = None,
    weights: Literal["params", "ema"] = "params",
    *,
    decoding_only: bool = False,
    base: epath.PathLike | None = None,
    draft_temperature: float | None = None,
) -> LoadedRun:
    """Reload a run wherever it was trained: no config, mesh or knowledge of its origin is needed.

    Args:
      run_dir: a directory that `mtp-jax train` wrote, local or in an object store.
      step: which checkpoint: a step that is kept, "latest", or "best": of the lowest held-out loss, or on a base
        of the most expected tokens per forward.
      mesh: where to put it: a mesh, or a config over all devices; one device by default.
      weights: the parameters, or "ema", their average over the last steps, where the run kept it.
      decoding_only: the run will only generate. Its model is then laid out for that, in the compute dtype, and there is
        no other copy: less memory, and nothing to train, evaluate or export.
      base: where the run's base is, if that was moved: the run in which the model is that its head was trained on.
      draft_temperature: in place of that of the run's `HeadConfig`.

    Raises:
      ConfigError: it is not a run directory, or the mesh does not fit; or its base is not there, or is another model.
      CheckpointError: it has no such step or weights, or what is to be read is damaged: the message names the file
        and the last good step.
    """
    read_config(run_dir)
    if mesh is None:
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    elif isinstance(mesh, MeshConfig):
        mesh = make_mesh(mesh)
    with Checkpoints(run_dir) as checkpoints, jax.set_mesh(mesh):
        meta = checkpoints.meta(step)
        config = to_config(meta["config"], f"The config of step {meta['step']} in {run_dir}")
        config.check_widths((mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]))
        tokenizer = run_tokenizer(run_dir, config)
        require(
            tokenizer.to_json() == meta["tokenizer"],
            f"{run_dir} was trained with the tokenizer {meta['tokenizer']} and {config.data.tokenizer!r} is now "
            f"{tokenizer.to_json()}.",
        )
        config = config.with_tokenizer(tokenizer.vocab_size)
        if draft_temperature is not None:
            head = dataclasses.replace(config.head, draft_temperature=draft_temperature)
            config = dataclasses.replace(config, head=head)
        require(base is None or bool(config.base), f"{run_dir} has no base, and one is given: {base}. Leave it out.")
        build = functools.partial(build_model, config, random_key(0))
        graph = nnx.graphdef(jax.eval_shape(build))
        target = jax.eval_shape(jax.jit(lambda: split(build())[1]))
        if decoding_only:
            target = dtypes_for_decoding(target, config.model.dtype)
        target, params = on_mesh(target, mesh), {}
        if config.base:
            own = {"head": target.pop("head")}
            params = base_of(meta, run_dir, base).params(target, cast=decoding_only)
            target = own
        params |= checkpoints.restore_params(target, meta["step"], weights, cast=decoding_only)
        model = nnx.merge(graph, params)
        model = for_decoding(model, keep=False) if decoding_only else model
    return LoadedRun(model, tokenizer, config, mesh, meta["step"], meta)
