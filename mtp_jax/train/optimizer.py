"""Optimizer: clipping, AdamW or Muon by Optax, schedules, and steps that are skipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from mtp_jax.config import OptimizerConfig
from mtp_jax.parameters import STACKS, row

SETTLED = 20  # steps after which the gradient's mean norm is known


def dimension_numbers(params: Any) -> Any:
    """For every parameter its `MuonDimensionNumbers`, or None where it is not a matrix.

    Raises:
      KeyError: a parameter has no row in `mtp_jax.parameters`.
    """

    def of(path: tuple[Any, ...], _: Array) -> MuonDimensionNumbers | None:
        names = [key.key for key in path]
        found, stacked = row(names[-1]), int(any(name in STACKS for name in names))
        if not found.matrix:
            return None
        return MuonDimensionNumbers(*(tuple(axis + stacked for axis in axes) for axes in (found.inputs, found.outputs)))

    return jax.tree_util.tree_map_with_path(of, params)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: linear warm-up, then `config.schedule` to the end of the run."""
    peak, warmup, final = config.learning_rate, config.warmup_steps, config.final_lr_fraction
    after = max(1, steps - warmup)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, after, alpha=final)
    elif config.schedule == "wsd":
        decay = max(1, min(after, round(config.decay_fraction * steps)))
        end = optax.linear_schedule(peak, peak * final, decay)
        main = optax.join_schedules([optax.constant_schedule(peak), end], [after - decay])
    else:
        main = optax.constant_schedule(peak)
    # Step 0 learns too: the ramp is 1/(n+1), 2/(n+1), ..
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW or Muon. `params` may be arrays or their shapes."""
    schedule = make_schedule(config, steps)
    if config.name == "muon":
        update = muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.eps,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=dimension_numbers(params),
            consistent_rms=0.2,  # updates as large as Adam's, so one learning rate serves both (arXiv 2502.16982)
        )
    else:
        decayed = jax.tree_util.tree_map_with_path(lambda path, _: row(path[-1].key).matrix, params)
        update = optax.adamw(
            schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decayed
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    update = optax.chain(clip, update)
    return skipping(update, config.skip_above) if config.skip_limit else update


class SkipState(NamedTuple):
    """The wrapped state; the running mean of the gradient's norm, and over how many steps; steps skipped in a row."""

    inner: Any
    norm: Array
    steps: Array
    skipped: Array


def skipping(inner: optax.GradientTransformation, above: float = 0.0) -> optax.GradientTransformation:
    """`inner` for steps whose gradient is finite and, if `above` is not 0, not longer than `above` times the running
    mean (from step `SETTLED` on): the others change nothing but the count of steps `skipped` in a row."""

    def init(params: Any) -> SkipState:
        zero = jnp.zeros((), jnp.int32)
        return SkipState(inner.init(params), jnp.zeros((), jnp.float32), zero, zero)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates)
        good = jnp.isfinite(norm)
        if above:
            good &= (norm <= above * state.norm) | (state.steps < SETTLED)
        updates, new = inner.update(updates, state.inner, params)
        # The mean over the first steps, exponential after them.
        mean = state.norm + jnp.maximum(1 / SETTLED, 1 / (state.steps + 1)) * (norm - state.norm)
        made = SkipState(new, mean, state.steps + 1, jnp.zeros_like(state.skipped))
        left = state._replace(skipped=state.skipped + 1)
        updates = jax.tree.map(lambda a: jnp.where(good, a, jnp.zeros_like(a)), updates)
        return updates, jax.tree.map(lambda a, b: jnp.where(good, a, b), made, left)

    return optax.GradientTransformation(init, update)
