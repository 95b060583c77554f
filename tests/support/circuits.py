"""Circuits as they are defined: every assignment of components to the nodes of a circuit, and its weight."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np


def parents(circuit: str, offsets: int) -> tuple[list[int], list[int]]:
    """(the node above each node, -1 above the root, and the node above each offset). The matrix of a node but the root
    is that of its number, less 1."""
    if circuit in ("independent", "cpd"):
        return [-1], [0] * offsets
    if circuit == "hmm":
        return list(range(-1, offsets - 1)), list(range(offsets))
    nodes: list[int] = []
    leaves: list[int] = []

    def grow(above: int, count: int) -> None:
        if count == 1:
            leaves.append(above)
            return
        nodes.append(above)
        own = len(nodes) - 1
        grow(own, count - count // 2)
        grow(own, count // 2)

    grow(-1, offsets)
    return nodes, leaves


def assignments(circuit: str, log_w: Any, log_T: Any, offsets: int) -> tuple[Any, np.ndarray]:
    """The log-weights of all assignments, `[.., A]`, and the component of each offset in them, `[A, W]`, from the
    weights `[.., R]` of the root and the matrices `[.., M, R, R]`."""
    nodes, leaves = parents(circuit, offsets)
    weights, components = [], []
    for values in itertools.product(range(log_w.shape[-1]), repeat=len(nodes)):
        steps = [log_T[..., node - 1, values[above], values[node]] for node, above in enumerate(nodes[1:], 1)]
        weights.append(sum(steps, start=log_w[..., values[0]]))
        components.append([values[node] for node in leaves])
    stack = np.stack if isinstance(log_w, np.ndarray) else jnp.stack
    return stack(weights, axis=-1), np.array(components)


def prefixes(circuit: str, log_w: Any, log_T: Any, logp_RW: Any) -> Any:
    """log q(x_1 .. x_s) of each s, `[.., W]`, from log p_rs(x_s), `[.., R, W]`: a sum over all assignments."""
    offsets = logp_RW.shape[-1]
    weights, components_AW = assignments(circuit, log_w, log_T, offsets)
    found = []
    for s in range(1, offsets + 1):
        scores = sum(logp_RW[..., components_AW[:, i], i] for i in range(s))
        joint = jnp.broadcast_to(weights, scores.shape) + scores
        most = jnp.max(joint, axis=-1, keepdims=True)
        found.append(jnp.log(jnp.sum(jnp.exp(joint - most), axis=-1)) + most[..., 0])
    return jnp.stack(found, axis=-1)
