"""`mtp-jax eval RUN`: held-out loss by offset, and how many tokens a forward will give."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mtp_jax.commands import RunOptions, console, parse, print_table, use_compilation_cache
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.heads.config import HeadConfig
from mtp_jax.validate import require


@dataclass(frozen=True)
class Eval(RunOptions):
    """Evaluate a checkpoint on held-out documents: their loss, and the tokens per forward to expect of drafting (of
    the `token` verifier, on texts that the model itself writes behind their beginnings). Prints tables, and as the last
    line one JSON object."""

    batches: int | None = None
    """So many batches, spread over all that is held out; all of them by default."""
    temperatures: tuple[float, ...] = (0.0, 0.7)
    """Where tokens per forward are expected. Nowhere: --temperatures and no number."""
    draft_temperatures: tuple[float, ...] = ()
    """Drafts are sampled at these shares of a temperature above 0 (1 0.8 0.6 0.4, say), each in its turn, in place of
    the run's `head.draft_temperature`. Gates are about the first."""
    k: int | None = None
    """Drafts per forward: all that the head has by default."""
    prompts: int = 16
    """Beginnings of held-out documents, at most, whose continuations are looked at."""
    prompt_tokens: int = 32
    """Tokens of each of them, at most: half of the context, and less than each document has. Conversations are answered
    whole."""
    new_tokens: int = 64
    """Tokens of each continuation, at most: a text ends at a stop token, or where the context does."""
    gates: bool = False
    """Also look whether the head may be believed: its law before the first step, a negative control, the cached states
    it learnt from, decoding beside what is expected, and greedy texts with and without drafts. The exit status is 1 if
    one fails."""


def main(args: list[str]) -> None:
    """The command, with the arguments behind its name."""
    options = parse(Eval, args, "eval")
    require(options.batches is None or options.batches >= 1, f"--batches is {options.batches}; it must be at least 1.")
    for name, least in (("k", 1), ("prompts", 1), ("prompt_tokens", 1), ("new_tokens", 2)):
        value = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        require(value is None or value >= least, f"{flag} is {value}; it must be at least {least}.")
    # Refused here, and not after the losses.
    for temperature in options.temperatures:
        DecodeConfig(options.new_tokens, temperature)
    for temperature in options.draft_temperatures:
        HeadConfig(draft_temperature=temperature)
    require(
        not options.draft_temperatures or any(options.temperatures),
        f"--draft-temperatures is {options.draft_temperatures} and --temperatures {options.temperatures}; only where "
        "texts are sampled do drafts have a temperature. Give --temperatures one above 0.",
    )
    use_compilation_cache()
    from mtp_jax.data.prompts import some_prompts
    from mtp_jax.train.evaluate import evaluate_run, expected_of_run, store_of
    from mtp_jax.train.loggers import series

    run = options.load(draft_temperature=next(iter(options.draft_temperatures), None))
    window, context = run.config.head.window, run.config.model.context_length
    k = window - 1 if options.k is None else options.k
    require(not options.gates or window > 1, "--gates: the head's window is 1, so it drafts nothing. Leave it out.")
    require(k < window or window == 1, f"--k is {k} and the head's window is {window}; it must lie in 1..{window - 1}.")
    store = store_of(run)
    metrics: dict[str, Any] = dict(evaluate_run(run, options.batches, store))
    losses = {f"offset {s}": metrics[f"loss_offset_{s}"] for s in range(1, window + 1)}
    losses |= {"first token": metrics["loss_first_token"], "joint": metrics["joint_loss"]}
    title = f"Held-out loss of step {run.step}, nats per token"
    print_table(title, losses, [[f"{loss:.4f}" for loss in losses.values()]])
    if shares := series(metrics, "gate_share_"):
        console().print(
            f"components: {metrics['gate_effective']:.2f} effective of {len(shares)}, "
            f"shares {' '.join(f'{share:.2f}' for share in shares)}, gate entropy {metrics['gate_entropy']:.3f} nats",
            highlight=False,
        )
    longest = context // 2 if store.masked else min(options.prompt_tokens, context // 2)
    prompts = some_prompts(store, options.prompts, longest) if window > 1 else []
    require(
        not options.gates or bool(prompts),
        f"--gates: no held-out prompt of at most {longest} tokens, behind which texts could be written. Hold out more "
        "(data.valid_fraction).",
    )
    new = min(options.new_tokens, context - max(map(len, prompts), default=0))
    if prompts and options.temperatures:
        found = []
        for temperature in options.temperatures:
            drafts = options.draft_temperatures if temperature else ()
            found += expected_of_run(run, prompts, temperature, k, new, drafts)
        metrics["expected"] = found
        _print_expected(found, k)
    passed = True
    if options.gates:
        from mtp_jax.train.gates import gates

        looked = []
        for gate in gates(run, store, prompts, options.temperatures, k, new):
            sign = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "[dim]no need[/]"}[gate.passed]
            console().print(f"gate {gate.name}: {sign}: {gate.found}", highlight=False)
            looked.append(dataclasses.asdict(gate))
            passed = passed and gate.passed is not False
        metrics["gates"] = looked
    print(json.dumps({"run": options.run, "step": run.step, **metrics}))
    if not passed:
        raise SystemExit(1)


def _print_expected(found: list[dict[str, Any]], k: int) -> None:
    """A row for each temperature of texts and of drafts."""
    title = f"Expected of drafting {k}, verifier token, on {found[0]['prompts']} texts of the model's own"
    header = [
        "temperature",
        "draft temperature",
        "tokens per forward",
        *(f"accepted {s}" for s in range(1, k + 1)),
        "overlap 1",
    ]
    rows = [
        [f"{row['temperature']:g}", f"{row['draft_temperature']:g}" if row["temperature"] else "-",
         *(f"{n:.3f}" for n in (row["tokens_per_forward"], *row["acceptance"])),
         f"{row['overlap'][0]:.3f}"]
        for row in found
    ]  # fmt: skip
    print_table(title, header, rows)
