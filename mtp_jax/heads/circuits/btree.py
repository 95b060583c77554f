"""Circuit of a binary tree: the component may change from half to half of the window."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array

from mtp_jax.heads.circuits.transitions import Transitions, down


class BTree(Transitions):
    """A binary tree of components: each node halves its offsets, and a half of more than one has a component of its
    own, drawn given that of the node above. What is far apart hangs together by few steps.

    The root's component is the gate's. The left half is the larger one.
    """

    @staticmethod
    def matrices(offsets: int) -> int:
        """One for each node of more than one offset, but the root."""
        return max(0, offsets - 2)

    @staticmethod
    def start(unfolded: tuple[Array, Array]) -> tuple[Any, Array]:
        """The weights of the first offset. Carried along with what was unfolded: for each node on the way from the root
        to the next offset, what its component says of the offsets below that are known; None of none."""
        nothing = (None,) * len(_above(BTree._leaves(unfolded), 0))
        return (unfolded, nothing), BTree._weights(unfolded, nothing, 0)

    @staticmethod
    def advance(carry: Any, score_R: Array, offset: int) -> tuple[Any, Array]:
        """Tell the node above, and the nodes above that as halves end; then go down to the next offset."""
        unfolded, said = carry
        leaves = BTree._leaves(unfolded)
        above, said = _above(leaves, offset - 1), [*said]
        said[-1] = _plus(score_R, said[-1])
        while len(said) > 1 and above[-1][1] == offset:
            log_T_RR, below_R = BTree._matrix(unfolded, above.pop()), said.pop()
            said[-1] = _plus(jax.nn.logsumexp(log_T_RR + below_R[..., None, :], axis=-1), said[-1])
        said += [None] * (len(_above(leaves, offset)) - len(said))
        return (unfolded, tuple(said)), BTree._weights(unfolded, said, offset)

    @staticmethod
    def _leaves(unfolded: tuple[Array, Array]) -> int:
        return unfolded[1].shape[-3] + 2

    @staticmethod
    def _matrix(unfolded: tuple[Array, Array], node: tuple[int, int]) -> Array:
        index = _nodes(BTree._leaves(unfolded)).index(node) - 1
        return unfolded[1][..., index, :, :]

    @staticmethod
    def _weights(unfolded: tuple[Array, Array], said: Any, leaf: int) -> Array:
        """The posterior of the component above a leaf; of the root, where no leaf is left."""
        log_alpha_R = _heard(unfolded[0], said[0])
        for node, said_R in zip(_above(BTree._leaves(unfolded), leaf)[1:], said[1:], strict=True):
            log_alpha_R = _heard(down(log_alpha_R, BTree._matrix(unfolded, node)), said_R)
        return log_alpha_R


def _plus(a: Array, b: Array | None) -> Array:
    return a if b is None else a + b


def _heard(log_alpha_R: Array, said_R: Array | None) -> Array:
    """Bayes."""
    return log_alpha_R if said_R is None else jax.nn.log_softmax(log_alpha_R + said_R, axis=-1)


@functools.cache
def _nodes(leaves: int) -> tuple[tuple[int, int], ...]:
    """The nodes of a tree over so many leaves that have more than one, in preorder: (first, behind the last)."""

    def below(first: int, end: int) -> tuple[tuple[int, int], ...]:
        middle = (first + end + 1) // 2
        return ((first, end), *below(first, middle), *below(middle, end)) if end - first > 1 else ()

    return below(0, leaves)


def _above(leaves: int, leaf: int) -> list[tuple[int, int]]:
    """The nodes from the root to the one above a leaf."""
    return [(first, end) for first, end in _nodes(leaves) if first <= leaf < end]
