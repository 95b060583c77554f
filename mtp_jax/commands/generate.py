"""`mtp-jax generate RUN`: continue text and see which tokens were accepted drafts."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtp_jax.commands import DraftingOptions, parse, use_compilation_cache
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.validate import ConfigError, require, unescape

if TYPE_CHECKING:
    from rich.console import Console

    from mtp_jax.runs.loading import LoadedRun


@dataclass(frozen=True)
class Generate(DraftingOptions):
    """Continue text with a trained model. Accepted drafts are green; the target's own tokens are plain."""

    prompt: str = ""
    """The text to continue."""
    prompt_file: str = ""
    """A file with the text to continue; - is the standard input."""
    chat: bool = False
    """The text is what a user says to a model that has a chat template: it is answered."""
    system: str = ""
    """With --chat: what the model is told before."""
    held_out: int = 0
    """Continue this many held-out documents instead, from their first `prompt-tokens` tokens."""
    out: str = ""
    """Also leave what is printed as a page, or as a picture where the name ends with .svg; of held-out documents it is
    completions.html in the run directory by default."""
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
    k: int | Literal["auto"] | None = None
    """Drafts per forward, 0 to W-1; W-1 by default. auto: what is fastest for this model here, measured once and
    remembered. In float32 the text does not depend on it."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are cut off; \\n is a newline."""
    color: Literal["auto", "always", "never"] = "auto"


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Generate, args, "generate")
    require(
        [bool(options.prompt), bool(options.prompt_file), options.held_out > 0].count(True) == 1,
        f"--prompt is {options.prompt!r}, --prompt-file {options.prompt_file!r} and --held-out {options.held_out}; "
        "give one of them, such as --prompt 'def main():' or --held-out 3.",
    )
    require(
        not (options.chat and options.held_out) and (options.chat or not options.system),
        f"--chat is {options.chat}, --system {options.system!r} and --held-out {options.held_out}; --system goes with "
        "--chat, and --chat with --prompt or --prompt-file.",
    )
    use_compilation_cache()
    import jax
    from rich.console import Console
    from rich.markup import escape

    from mtp_jax.data.preparation import prepare
    from mtp_jax.data.prompts import held_out_prompts
    from mtp_jax.decode.spans import picture, visible
    from mtp_jax.decode.text import stop_bytes
    from mtp_jax.decode.tune import tuned
    from mtp_jax.runs.layout import read_config, run_tokenizer
    from mtp_jax.runs.paths import check_writable, full_path, given_path, write_page

    page = given_path(options.out) if options.out else full_path(options.run) / "completions.html"
    if keeps := bool(options.held_out or options.out):
        check_writable(page, "Give another place with --out.")
    stops = stop_bytes([unescape(stop) for stop in options.stop])
    config = read_config(options.run)
    tokenizer = run_tokenizer(options.run, config)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "k")
    decode = DecodeConfig(**{name: getattr(options, name) for name in names}, stop_tokens=tokenizer.stop_tokens)
    if not options.held_out:
        text = options.prompt or _read(options.prompt_file)
        if options.chat:
            system = [{"role": "system", "content": options.system}] if options.system else []
            text = tokenizer.conventions.render([*system, {"role": "user", "content": text}])
        prompts = [("", tokenizer.encode_prompt(text, special=options.chat))]
    else:
        require(options.prompt_tokens >= 1, f"--prompt-tokens is {options.prompt_tokens}; it must be at least 1.")
        store = prepare(config.data, tokenizer=tokenizer, reading=True)
        prompts = held_out_prompts(store, options.held_out, options.prompt_tokens, options.seed)
    decode.check(config.model, config.head, [tokens for _, tokens in prompts])

    forced = {"auto": None, "always": True, "never": False}[options.color]
    # What is asked for is given, whatever $TERM and $NO_COLOR say.
    colors: dict[str, Any] = {"color_system": "standard", "no_color": False} if forced else {}
    console = Console(force_terminal=forced, **colors, highlight=False, emoji=False, soft_wrap=True, record=keeps)
    run = options.load(decoding_only=True)
    with jax.set_mesh(run.mesh):
        decode = tuned(run.decoder, [prompts[0][1]], decode)
    for index, (name, tokens) in enumerate(prompts):
        if name:
            title = f"{name}, continued at temperature {options.temperature:g}"
            console.rule(escape(title), characters="-")
        _complete(run, tokens, dataclasses.replace(decode, row=index), stops, console)
    if keeps:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, picture(console, options.run) if page.suffix == ".svg" else console.export_html())
        console.print(f"The same in colour: {visible(str(page))}", style="dim", markup=False)


def _read(file: str) -> str:
    """The text of a file, or of the standard input."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompt-file is {file!r}, which cannot be read ({error.strerror}).") from error
    return data.decode("utf-8", "surrogateescape")


def _complete(run: LoadedRun, prompt: Any, decode: DecodeConfig, stops: list[bytes], console: Console) -> None:
    """Print one completion as it comes, then its counts."""
    import jax

    from mtp_jax.decode.generate import stream
    from mtp_jax.decode.spans import Spans, print_span

    with jax.set_mesh(run.mesh):
        spans = Spans(run.tokenizer, prompt, stream(run.decoder, prompt, decode), stops, decode.k)
        for span in spans:
            print_span(console, span)
    console.print()
    console.print(spans.summary, style="dim", markup=False)
