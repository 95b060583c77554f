"""Layers: matrix products, RMSNorm, the SwiGLU feed-forward."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mtp_jax.model.config import ModelConfig
from mtp_jax.model.output_major import FEW_ROWS, JOINED, OutputMajor, few_rows
from mtp_jax.parameters import init_full, init_weight
from mtp_jax.sharding import gather, platform, shares


def product(equation: str, x: Array, w: Array | OutputMajor) -> Array:
    """`einsum(equation, x, w)` in float32, of operands in x's dtype, in both directions.

    The gradient that comes back is rounded to x's dtype like the operands, and that of `w` has all the digits of its
    float32 sum. The equation is that of a matrix product: rows and inner axes, (inner and outer axes, or outer and
    inner), to rows and outer axes, as in "btd,drwe->btrwe" and "btrwd,vd->btrwv".
    """
    return w.times(x) if isinstance(w, OutputMajor) else _product(equation, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: Array, w: Array) -> Any:
    w = w.astype(x.dtype)
    left, right = equation.split("->")[0].split(",")
    outputs_first = w.ndim == 2 and x.ndim > 2 and left[-1] == right[-1]
    few = math.prod(x.shape[:-1]) <= FEW_ROWS and not jax.sharding.get_abstract_mesh().empty
    return few_rows(x, w) if outputs_first and few else _sum32(equation, x, w)


def _sum32(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _product_backward(equation: str, residuals: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    (x, w), (inputs, output) = residuals, equation.split("->")
    if any(shares(jax.typeof(a).sharding.spec) for a in residuals):  # whole arrays on a mesh: JAX knows their shardings
        rounded = d.astype(x.dtype).astype(d.dtype)
        return jax.vjp(lambda x, w: _sum32(equation, x, w.astype(x.dtype)), x, w)[1](rounded)
    left, right = inputs.split(",")
    rows = len(set(left) & set(output))  # in front, in both of them
    inner = left[rows:]
    # As plain matrices: of a product with several contracted axes XLA may transpose a whole operand.
    x_MK = x.reshape(math.prod(x.shape[:rows]), -1)
    d_MN = d.astype(x.dtype).reshape(x_MK.shape[0], -1)
    if right.startswith(inner):
        w_KN = w.astype(x.dtype).reshape(x_MK.shape[1], -1)
        d_x, d_w = _sum32("mn,kn->mk", d_MN, w_KN), _over_rows(x_MK, d_MN)
    else:
        w_NK = w.astype(x.dtype).reshape(-1, x_MK.shape[1])
        d_x, d_w = _sum32("mn,nk->mk", d_MN, w_NK), _over_rows(d_MN, x_MK)
    return d_x.reshape(x.shape).astype(x.dtype), d_w.reshape(w.shape).astype(w.dtype)


_product.defvjp(lambda equation, x, w: (_product(equation, x, w), (x, w)), _product_backward)


def linear(x: Array, w: Array | OutputMajor) -> Array:
    """`x @ w` in x's dtype, `[B, T, inputs..]` to `[B, T, outputs..]`: ZeRO-3, in both directions.

    The weight `[inputs.., outputs..]` is taken as it is stored and travels over `fsdp` in x's dtype, once for each
    pass. Its gradient is summed over positions and devices in the weight's own dtype: a sum over many devices in
    bfloat16 would lose what the small terms add.
    """
    return w.times(x).astype(x.dtype) if isinstance(w, OutputMajor) else _linear(x, w)


def linears(x: Array, module: Any) -> tuple[Array, ...]:
    """`linear` of x by each of the weights that `module.TOGETHER` names.

    One product, and in float32, where a CPU's decoder joined them: what XLA rounds between two operations on a CPU it
    rounds one by one.
    """
    if hasattr(module, JOINED):
        return getattr(module, JOINED).times(x)
    return tuple(linear(x, getattr(module, name)[...]) for name in module.TOGETHER)


@jax.custom_vjp
def _linear(x: Array, w: Array) -> Array:
    inputs = x.ndim - 2
    x_MK, w_KN = _matrix(x), _matrix_of_weight(w, inputs, x.dtype)
    rows, outer = jax.typeof(x_MK).sharding.spec[0], jax.typeof(w_KN).sharding.spec[1]
    y_MN = _rounded("mk,kn->mn", x_MK, w_KN, P(rows, outer))
    shape = (*x.shape[:2], *w.shape[inputs:])
    return y_MN.reshape(shape, out_sharding=P(rows, None, outer, *(None,) * (len(shape) - 3)))


def _rounded(equation: str, a: Array, b: Array, out_sharding: Any) -> Array:
    """A product in its operands' dtype."""
    # XLA multiplies bfloat16 on a CPU with AMX five times as fast where it may leave the sums as they are.
    wide = jnp.float32 if platform() == "cpu" and a.dtype == jnp.bfloat16 else None
    return jnp.einsum(equation, a, b, out_sharding=out_sharding, preferred_element_type=wide).astype(a.dtype)


def _over_rows(a_MK: Array, b_MN: Array, dtype: Any = None, out_sharding: Any = None) -> Array:
    """a.T @ b, `[K, N]`, in `dtype` (by default float32 at least)."""
    dtype, equation = dtype or jnp.promote_types(a_MK.dtype, jnp.float32), "mk,mn->kn"
    if platform() == "cpu" and a_MK.dtype == jnp.bfloat16 and jax.sharding.get_abstract_mesh().size == 1:
        a_MK, b_MN, equation = _rows_last(a_MK), _rows_last(b_MN), "km,nm->kn"
    return jnp.einsum(equation, a_MK, b_MN, out_sharding=out_sharding, preferred_element_type=dtype)


def _rows_last(a_MK: Array) -> Array:
    """a.T, on one device, that lies in memory so. Of less than a flat array XLA would make a view."""
    rows, inner = jax.typeof(a_MK).sharding.spec
    flat = lax.optimization_barrier(a_MK.T.reshape(-1, out_sharding=P(None)))
    return flat.reshape(a_MK.shape[::-1], out_sharding=P(inner, rows))


def _matrix(x: Array) -> Array:
    """`[B, T, N, ..]` as `[B T, N ..]`. Shardings are said: JAX cannot tell them through axes of size 1."""
    spec = jax.typeof(x).sharding.spec
    if spec[1] is not None or "tensor" in shares(spec[:1]):
        raise ValueError(f"Activations are sharded by {spec}; rows are split by the batch axes, and time is whole.")
    return x.reshape(math.prod(x.shape[:2]), -1, out_sharding=P(spec[0], spec[2]))


def _matrix_of_weight(w: Array, inputs: int, dtype: Any) -> Array:
    whole = gather(w.astype(dtype))
    spec = jax.typeof(whole).sharding.spec
    return whole.reshape(math.prod(w.shape[:inputs]), -1, out_sharding=P(spec[0], spec[inputs]))


def _linear_backward(residuals: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    # As plain matrices: of a product with several contracted axes XLA may transpose a whole operand.
    x, w = residuals
    inputs = x.ndim - 2
    x_MK, d_MN, w_KN = _matrix(x), _matrix(d), _matrix_of_weight(w, inputs, x.dtype)
    at_x, at_w = (jax.typeof(a).sharding.spec for a in residuals)
    d_x = _rounded("mn,kn->mk", d_MN, w_KN, jax.typeof(x_MK).sharding.spec)
    d_w = _over_rows(x_MK, d_MN, w.dtype, P(at_w[0], at_w[inputs]))
    return d_x.reshape(x.shape, out_sharding=at_x), d_w.reshape(w.shape, out_sharding=at_w)


_linear.defvjp(lambda x, w: (_linear(x, w), (x, w)), _linear_backward)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis (arXiv 1910.07467), in float32, with a learned scale."""

    def __init__(self, width: int, eps: float):
        self.scale = init_full("scale", (width,), 1.0)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalise `[..., width]`; the dtype is kept."""
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (normal * scale).astype(x.dtype)


class SwiGLU(nnx.Module):
    """The gated feed-forward layer of Llama (arXiv 2002.05202)."""

    TOGETHER: ClassVar = ("w_gate_DF", "w_up_DF")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.w_gate_DF = init_weight(rngs, "w_gate_DF", (d, f))
        self.w_up_DF = init_weight(rngs, "w_up_DF", (d, f))
        self.w_down_FD = init_weight(rngs, "w_down_FD", (f, d), (2 * config.num_layers) ** -0.5)

    def __call__(self, x_BTD: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        gate_BTF, up_BTF = linears(x_BTD, self)
        return linear((jax.nn.silu(gate_BTF) * up_BTF).astype(x_BTD.dtype), self.w_down_FD[...])
