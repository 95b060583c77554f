"""Blocks of quantised weights as ggml's C code reads them, each 32 or 256 numbers along a row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(blocks: np.ndarray, at: int) -> np.ndarray:
    """The low ones are the first half."""
    bytes_ = blocks[:, at : at + 16].astype(np.int32)
    return np.concatenate([bytes_ & 15, bytes_ >> 4], 1)


def fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    word = np.ascontiguousarray(blocks[:, at : at + 4]).view(np.uint32)
    return ((word >> np.arange(32, dtype=np.uint32)) & 1).astype(np.int32) << 4


def q8_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * blocks[:, 2:].view(np.int8)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * (nibbles(blocks, 2) - 8)


def q4_1(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * nibbles(blocks, 4) + half(blocks, 2)


def q5_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * ((nibbles(blocks, 6) | fifth_bits(blocks, 2)) - 16)


def q5_1(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * (nibbles(blocks, 8) | fifth_bits(blocks, 4)) + half(blocks, 2)


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """8 parts of 32, with a scale and a least value of 6 bits each."""
    d, least, packed = half(blocks, 0), half(blocks, 2), blocks[:, 4:16].astype(np.int32)
    parts = []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[:, j] & 63, packed[:, j + 4] & 63
        else:
            scale = (packed[:, j + 4] & 15) | ((packed[:, j - 4] >> 6) << 4)
            minimum = (packed[:, j + 4] >> 4) | ((packed[:, j] >> 6) << 4)
        values = blocks[:, 16 + 32 * (j // 2) : 48 + 32 * (j // 2)].astype(np.int32)
        values = values >> 4 if j % 2 else values & 15
        parts.append(d * scale[:, None] * values - least * minimum[:, None])
    return np.concatenate(parts, 1)


def q6_k(blocks: np.ndarray) -> np.ndarray:
    """Two halves of 128, each 4 parts of 32, with a scale for every 16."""
    scales, d, parts = blocks[:, 192:208].view(np.int8).astype(np.int32), half(blocks, 208), []
    for n in range(2):
        low, high = blocks[:, 64 * n : 64 * n + 64], blocks[:, 128 + 32 * n : 160 + 32 * n].astype(np.int32)
        for j in range(4):
            values = low[:, 32 * (j % 2) : 32 * (j % 2) + 32].astype(np.int32)
            values = (values >> 4 if j >= 2 else values & 15) | ((high >> (2 * j) & 3) << 4)
            scale = scales[:, 8 * n + 2 * j : 8 * n + 2 * j + 2].repeat(16, 1)
            parts.append(d * scale * (values - 32))
    return np.concatenate(parts, 1)


# The type: its numbers in a block, its bytes, how they are read.
TYPES: dict[str, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    "Q8_0": (32, 34, q8_0),
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1),
    "Q4_K": (256, 144, q4_k),
    "Q6_K": (256, 210, q6_k),
}
SCALES = {"Q4_K": (0, 2), "Q6_K": (208,)}  # where the blocks that `random_blocks` makes have theirs


def read(raw: np.ndarray, kind: str) -> np.ndarray:
    """The matrix that rows of blocks stand for, in float32."""
    _, size, found = TYPES[kind]
    return found(np.ascontiguousarray(raw).reshape(-1, size)).astype(np.float32).reshape(len(raw), -1)


def random_blocks(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    """Rows of blocks of any bits, with small scales."""
    count, size, _ = TYPES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] // count, size)).astype(np.uint8)
    for at in SCALES[kind]:
        raw[..., at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
    return raw.reshape(shape[0], -1)
