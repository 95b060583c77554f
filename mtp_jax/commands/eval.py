"""`mtp-jax eval RUN`: held-out loss by offset."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mtp_jax.commands import RunOptions, console, parse, print_table, use_compilation_cache
from mtp_jax.validate import require


@dataclass(frozen=True)
class Eval(RunOptions):
    """Evaluate a checkpoint on held-out documents. Prints a table, and as the last line one JSON object."""

    batches: int | None = None
    """The first so many batches; all of them by default."""


def main(args: list[str]) -> None:
    options = parse(Eval, args, "eval")
    require(options.batches is None or options.batches >= 1, f"--batches is {options.batches}; it must be at least 1.")
    use_compilation_cache()
    from mtp_jax.train.evaluate import evaluate_run
    from mtp_jax.train.loggers import series

    run = options.load()
    metrics = evaluate_run(run, options.batches)
    window = run.config.head.window
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
    print(json.dumps({"run": options.run, "step": run.step, **metrics}))
