"""Training step: pure functions of the train state, for one optimizer step and one evaluation batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.arrays import random_key
from mtp_jax.config import TrainConfig
from mtp_jax.state import TrainState, build_model, split
from mtp_jax.train.optimizer import make_optimizer, make_schedule
from mtp_jax.train.trained import merge, partition

Batch = dict[str, Array]
Metrics = dict[str, Array]


@dataclass(frozen=True)
class Trainer:
    """The compiled functions of a run. Build it with `make_trainer` under `jax.set_mesh`.

    `graph` is the structure of the model. `init` makes a fresh state; of a run on a base with a fresh base too, or with
    none: `init(base=False)`.
    """

    graph: nnx.GraphDef
    init: Callable[..., TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[dict[str, Any], Batch, Array], tuple[Array, Metrics]]

    def compile(self, state: TrainState, batch: Batch) -> Trainer:
        """The same with step and evaluation compiled for a state and a batch like these. Neither is touched."""
        counts_2W = target_counts([batch])
        step, evaluate = self.step.lower(state, batch), self.evaluate.lower(state.whole, batch, counts_2W)  # type: ignore[attr-defined]
        return dataclasses.replace(self, step=step.compile(), evaluate=evaluate.compile())


def make_trainer(config: TrainConfig, *, trunk: bool = True) -> Trainer:
    """Trace the model's structure and make the jitted functions of `config` for the mesh in scope. Without its `trunk`
    batches have the hidden states of a base."""
    build = functools.partial(build_model, config, trunk=trunk)
    graph = nnx.graphdef(jax.eval_shape(lambda: build(random_key(0))))

    def init_params(own: bool) -> Any:
        """The run's own parameters, or those of its base."""
        params = split(build(random_key(config.seed)))[1]
        return {name: tree for name, tree in params.items() if (not config.base or name == "head") == own}

    init_params = jax.jit(init_params, static_argnums=0)
    shapes = jax.eval_shape(lambda: init_params(True))
    optimizer = make_optimizer(config.optimizer, config.steps, partition(shapes)[0])

    def init(base: bool = True) -> TrainState:
        params = init_params(True)
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        opt_state = jax.jit(optimizer.init)(partition(params)[0])
        given = init_params(False) if base and config.base else None
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, given)

    step = jax.jit(functools.partial(train_step, config, graph, optimizer), donate_argnums=0)
    return Trainer(graph, init, step, jax.jit(functools.partial(batch_loss, graph)))


def target_counts(batches: Sequence[Batch]) -> Array:
    """Valid targets at each offset in all of `batches` together, and those of them whose law lies in the row, `[2, W]`
    in float32."""

    def counts_2W(batch: Batch) -> Array:
        each = (jnp.sum(valid_BTW, axis=(0, 1), dtype=jnp.float32) for valid_BTW in _valid(batch))
        return jnp.stack([*each])

    return sum(map(counts_2W, batches))  # type: ignore[return-value]


def _valid(batch: Batch) -> tuple[Array, Array]:
    """Which targets count, `[B, T, W]`: of the text, and for losses against the law of each, which the position before
    it has: offset s of position t that of t + s - 1."""
    valid_BTW = batch["valid_BTW"]
    time, window = valid_BTW.shape[1:]
    position_TW = jnp.arange(time, dtype=jnp.int32)[:, None] + jnp.arange(window, dtype=jnp.int32)[None]
    return valid_BTW, valid_BTW & (position_TW < time)[None]


def batch_loss(
    graph: nnx.GraphDef,
    params: dict[str, Any],
    batch: Batch,
    counts_2W: Array,
    key: Array | None = None,
    *,
    own: bool = True,
) -> tuple[Array, Metrics]:
    """The model's loss on a batch, and its sums; `counts_2W` is how many targets the means are over (`target_counts`).

    `key` is for what a head draws in training; without one the loss is exact. `own`: with that of the model's own next
    token.
    """
    model = nnx.merge(graph, params)
    weights_BTW, law_weights_BTW = (
        valid_BTW.astype(jnp.float32) / jnp.maximum(count_W, 1)[None, None]
        for valid_BTW, count_W in zip(_valid(batch), counts_2W, strict=True)
    )
    return model.loss(batch, weights_BTW, key, law_weights_BTW, own=own)


def train_step(
    config: TrainConfig, graph: nnx.GraphDef, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one global batch, read in `config.grad_accumulation` equal parts.

    Returns the new state and the metrics at the old parameters, all float32: scalars, and vectors such as `loss_offset`
    [W].
    """
    # Every target weighs the same, whichever part it is in: the counts are of the whole batch.
    counts_2W = target_counts([batch])
    trained, fixed = partition(state.params)

    def loss_of(trained: Any, *rest: Any) -> tuple[Array, Metrics]:
        # The base is a constant of the function: nothing goes back through it, and its own law does not change.
        return batch_loss(graph, state.on_base(merge(trained, fixed)), *rest, own=not config.base)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    parts = config.grad_accumulation
    key = jax.random.fold_in(random_key(config.seed), state.step)

    if parts == 1:
        (loss, aux), grads = gradient(trained, batch, counts_2W, key)
    else:

        def part(total: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
            number, batch = numbered
            new = gradient(trained, batch, counts_2W, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, new), None

        def deal(array: Array) -> Array:
            # Rows are dealt in turn, so that a part is spread over the devices as the batch is. The sharding is said:
            # JAX cannot tell it where a part is one row for each device.
            rows, *rest = jax.typeof(array).sharding.spec
            shape = (-1, parts, *array.shape[1:])
            return jnp.moveaxis(array.reshape(shape, out_sharding=P(rows, None, *rest)), 1, 0)

        dealt = jax.tree.map(deal, batch)
        first = jax.tree.map(lambda a: a[0], dealt)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, trained, first, counts_2W, key))
        ((loss, aux), grads), _ = lax.scan(part, zeros, (jnp.arange(parts, dtype=jnp.int32), dealt))

    updates, opt_state = _update(optimizer, grads, state.opt_state, trained)
    trained: Any = optax.apply_updates(trained, updates)  # type: ignore[arg-type]
    params = merge(trained, fixed)
    # Steps that are skipped do not count for the schedule.
    made = state.opt_state.steps if config.optimizer.skip_limit else state.step
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes types
        rate = make_schedule(config.optimizer, config.steps)(made)
    metrics = {"loss": loss, **aux, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
    if config.optimizer.skip_limit:
        metrics["skipped"] = opt_state.skipped
    step = state.step + 1
    ema = None
    if config.ema_decay:
        averaged, constant = partition(state.ema)  # what is not trained is its own average
        ema = merge(average(config.ema_decay, averaged, trained, step), constant)
    return TrainState(step, params, opt_state, ema, state.base), metrics


def average(decay: float, ema: Any, params: Any, step: Array) -> Any:
    """The average of the parameters after `step`, given that before it; in float32.

    At first it is the plain mean over all steps, until new parameters would weigh less than 1 - decay: from there on
    it is exponential. So what the run began with has no weight at any time.
    """
    weight = jnp.maximum(1 - decay, 1 / step.astype(jnp.float32))
    return jax.tree.map(lambda old, new: old + weight * (new.astype(jnp.float32) - old), ema, params)


def _update(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """`optimizer.update`. Muon multiplies matrices with themselves, both sides sharded: the compiler places those."""
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (params, opt_state))
    update: Any = jax.sharding.auto_axes(optimizer.update, out_sharding=specs)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes types
        return update(grads, opt_state, params)
