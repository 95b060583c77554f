"""Load balancing: both forms are smallest when the components' mean weights are equal."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array


def balance_loss(form: Literal["squared", "switch"], log_w_BTR: Array, weight_BT: Array) -> Array:
    """A penalty on the mean gate over the positions of this micro-batch.

    `squared`: sum_r (mean w_r - 1/R)^2 (arXiv 2410.17765). `switch`: R sum_r f_r mean w_r, where f_r is the fraction
    of positions whose largest weight is r (arXiv 2101.03961, eq. 4); f is a constant for the gradient.

    Args:
      log_w_BTR: log weights of the components.
      weight_BT: weight of each position; they sum to 1 over the optimizer batch.

    Returns:
      the penalty times this micro-batch's share of the weights, so that micro-batches add up to a mean.
    """
    rank = log_w_BTR.shape[-1]
    share = jnp.sum(weight_BT)
    mean_R = jnp.sum(weight_BT[..., None] * jnp.exp(log_w_BTR), axis=(0, 1)) / jnp.maximum(share, 1e-30)
    if form == "squared":
        return share * jnp.sum(jnp.square(mean_R - 1.0 / rank))
    first_BTR = jax.nn.one_hot(jnp.argmax(log_w_BTR, axis=-1), rank, dtype=log_w_BTR.dtype)
    fraction_R = jnp.sum(weight_BT[..., None] * first_BTR, axis=(0, 1)) / jnp.maximum(share, 1e-30)
    return share * rank * jnp.sum(fraction_R * mean_R)
