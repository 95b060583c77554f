"""`mtp-jax generate RUN`: continue text and see which tokens were accepted drafts."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mtp_jax.commands import parse, use_compilation_cache
from mtp_jax.config import require

if TYPE_CHECKING:
    from rich.console import Console

    from mtp_jax.checkpoint import LoadedRun

DRAFT = "bold green"


@dataclass(frozen=True)
class Generate:
    """Continue text with a trained model. Accepted drafts are green; the target's own tokens are plain."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    prompt: str | None = None
    """The text to continue."""
    held_out: int = 0
    """Continue this many held-out documents instead, from their first `prompt-tokens` tokens."""
    prompt_tokens: int = 96
    """Length of the held-out prompts."""
    max_new_tokens: int = 256
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this mass."""
    seed: int = 0
    k: int | None = None
    """Drafts per forward, 0 to W-1; W-1 by default. The text does not depend on it."""
    step: int | None = None
    """Which checkpoint; the latest by default."""
    color: Literal["auto", "always", "never"] = "auto"


def main(args: list[str]) -> None:
    """See the module."""
    options = parse(Generate, args, "generate")
    require(
        (options.prompt is None) == (options.held_out > 0),
        f"--prompt is {options.prompt!r} and --held-out is {options.held_out}; give one of them, "
        "such as --prompt 'def main():' or --held-out 3.",
    )
    use_compilation_cache()
    from rich.console import Console

    from mtp_jax.bench import held_out_prompts
    from mtp_jax.checkpoint import load
    from mtp_jax.data import prepare

    forced = {"auto": None, "always": True, "never": False}[options.color]
    # What is asked for is given, whatever $TERM and $NO_COLOR say.
    colors: dict[str, Any] = {"color_system": "standard", "no_color": False} if forced else {}
    console = Console(force_terminal=forced, **colors, highlight=False, soft_wrap=True, record=options.held_out > 0)
    run = load(options.run, options.step)
    if options.prompt is not None:
        _complete(run, run.tokenizer.encode(options.prompt), options, console)
        return
    prompts = held_out_prompts(prepare(run.config.data), options.held_out, options.prompt_tokens, options.seed)
    for index, (name, tokens) in enumerate(prompts):
        console.rule(f"{name}, continued at temperature {options.temperature:g}", characters="-")
        _complete(run, tokens, options, console, options.seed + index)
    page = f"{options.run}/completions.html"
    console.save_html(page)
    console.print(f"The same in colour: {page}", style="dim")


def _complete(run: LoadedRun, prompt: Any, options: Generate, console: Console, seed: int | None = None) -> None:
    """Print one completion as it comes, then its counts."""
    import jax

    from mtp_jax.decode.generate import stream

    end = run.tokenizer.end_of_document
    console.print(run.tokenizer.decode(prompt), style="dim", end="", markup=False)
    # Half a character at the end of one forward is finished by the next.
    text = codecs.getincrementaldecoder("utf-8")("replace")
    forwards, emitted, drafts = -1, 0, 0
    with jax.set_mesh(run.mesh):
        for tokens, accepted in stream(
            run.decoder,
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed if seed is None else seed,
            k=options.k,
            stop_tokens=(end,),
        ):
            forwards, emitted, drafts = forwards + 1, emitted + len(tokens), drafts + accepted
            for part, style in ((tokens[:accepted], DRAFT), (tokens[accepted:], None)):
                console.print(text.decode(run.tokenizer.decode_bytes(part)), style=style, end="", markup=False)
    console.print()
    per_forward = (emitted - 1) / max(1, forwards)
    console.print(
        f"[{emitted} tokens, {drafts} of them accepted drafts; {forwards} forwards after prefill, "
        f"{per_forward:.2f} tokens per forward]",
        style="dim",
        markup=False,
    )
