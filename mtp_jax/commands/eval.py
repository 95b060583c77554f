"""`mtp-jax eval RUN`: held-out loss by offset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mtp_jax.commands import console, parse, use_compilation_cache
from mtp_jax.validate import require


@dataclass(frozen=True)
class Eval:
    """Evaluate a checkpoint on held-out documents. Prints a table, and as the last line one JSON object."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    batches: int | None = None
    """The first so many batches; all of them by default."""
    step: int | Literal["latest", "best"] = "latest"
    """Which checkpoint; best is the one with the lowest held-out loss."""
    weights: Literal["params", "ema"] = "params"
    """The parameters, or their average over the last steps, where the run kept it (ema_decay)."""


def main(args: list[str]) -> None:
    options = parse(Eval, args, "eval")
    require(options.batches is None or options.batches >= 1, f"--batches is {options.batches}; it must be at least 1.")
    use_compilation_cache()
    from rich.table import Table

    from mtp_jax.runs.loading import load
    from mtp_jax.train.evaluate import evaluate_run

    run = load(options.run, options.step, weights=options.weights)
    metrics = evaluate_run(run, options.batches)
    window, rank = run.config.head.window, run.config.head.rank
    table = Table(title=f"Held-out loss of step {run.step}, nats per token", box=None, padding=(0, 2, 0, 0))
    for name in [f"offset {s + 1}" for s in range(window)] + ["first token", "joint"]:
        table.add_column(name, justify="right")
    losses = [metrics[f"loss_offset_{s + 1}"] for s in range(window)]
    table.add_row(*(f"{x:.4f}" for x in [*losses, metrics["loss_first_token"], metrics["joint_loss"]]))
    terminal = console()
    terminal.print(table)
    shares = " ".join(f"{metrics[f'gate_share_{r + 1}']:.2f}" for r in range(rank))
    terminal.print(
        f"components: {metrics['gate_effective']:.2f} effective of {rank}, shares {shares}, "
        f"gate entropy {metrics['gate_entropy']:.3f} nats",
        highlight=False,
    )
    print(json.dumps({"run": options.run, "step": run.step, **metrics}))
