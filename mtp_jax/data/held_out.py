"""Held-out split: which documents training does not read, or which end of each where there are too few."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from mtp_jax.validate import require


def is_held_out(document: bytes, valid_fraction: float) -> bool:
    """Whether a document is held out: the hash of its content, as a number in [0, 1), lies below `valid_fraction`.

    It depends on nothing else, so copies of a document lie on one side, one stays there when others come and go, and a
    larger fraction holds out all that a smaller one does.
    """
    return _place(document) < valid_fraction * 2**64


def _place(document: bytes) -> int:
    """The beginning of the hash, in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


def require_both(documents: Iterable[bytes], valid_fraction: float) -> None:
    """Refuse documents of which the hash leaves one side without any. Reads until both have some; where none can be
    read there is nothing to divide.

    Raises `ConfigError` with a fraction that leaves some on both.
    """
    places = []
    for document in filter(None, documents):
        places.append(_place(document))
        if min(places) < valid_fraction * 2**64 <= max(places):
            return
    if not places:
        return
    least, most = min(places) / 2**64, max(places) / 2**64
    # The next larger fraction of three digits, where one lies between.
    near = next((f for f in (round(least + 10.0**-n, n) for n in range(2, 9)) if least < f <= most), None)
    side = "held out" if least >= valid_fraction else "left for training"
    require(
        False,
        f"By the hash of their content none of the {len(places):,} documents is {side} at DataConfig.valid_fraction "
        f"{valid_fraction:g}. " + (f"Set it to {near:g}, or give more documents." if near else "Give more documents."),
    )


def is_one_sided(documents: Iterable[bytes], valid_fraction: float) -> bool:
    """Whether the hash leaves one side without documents, as it must where there is one. Reads until both have some."""
    found = set()
    for text in filter(None, documents):
        found.add(is_held_out(text, valid_fraction))
        if len(found) == 2:
            return False
    return True


def divided(name: str, text: bytes, valid_fraction: float, inside: bool) -> Iterator[tuple[str, str, bytes]]:
    """A document as (split, name, text): on one side by its hash, or cut in two if the split falls `inside` of it.

    What is held out of `name` is called `name@cut` by the byte where it begins.
    """
    cut = _cut(text, valid_fraction) if inside else 0
    if cut:
        yield "train", name, text[:cut]
        yield "valid", f"{name}@{cut}", text[cut:]
    else:
        yield "valid" if is_held_out(text, valid_fraction) else "train", name, text


def _cut(text: bytes, valid_fraction: float) -> int:
    """Where the last `valid_fraction` of the bytes begins: at the nearest end of a line; 0 if a side would be empty.

    Neither side loses more than half of its share to a line: a longer one is cut between characters.
    """
    cut = len(text) - round(valid_fraction * len(text))
    if not 0 < cut < len(text):
        return 0
    ends = (text.rfind(b"\n", 0, cut) + 1, text.find(b"\n", cut) + 1)
    least, most = cut / 2, (len(text) + cut) / 2
    if near := [end for end in ends if least <= end <= most]:
        return min(near, key=lambda end: abs(end - cut))
    while cut and text[cut] & 0xC0 == 0x80:  # inside of a character of UTF-8
        cut -= 1
    return cut
