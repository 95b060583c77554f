"""Collectives of a compiled program: what devices send each other, counted from its HLO text.

An instruction counts as often as it runs: one in the body of a loop as often as the loop's. XLA writes that number down
(`known_trip_count`) on CPUs and GPUs; where it does not, it is the one integer in the loop's condition, for `lax.scan`
counts from 0 up to a constant. A loop that has neither counts once, and is counted as not known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# Bytes that one of n devices sends, for each byte of its result.
_RING = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(?:%?([\w.\-]+)|\{([^}]*)\})")
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INTEGER = re.compile(r" [su]\d+\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'\bchain_id="(\w+)"')


@dataclass(frozen=True)
class Traffic:
    """The collectives of one run of a program on one device.

    `counts`: how many there are, by kind. `sent`: bytes that the device sends for them if they go around in rings.
    `unknown_loops`: loops that hold collectives and may run more often than the once that was counted.
    """

    counts: dict[str, int]
    sent: dict[str, int]
    unknown_loops: int = 0


def count_collectives(hlo: str) -> Traffic:
    """The collectives of a compiled module, given its text (`Compiled.as_text()`).

    Of a conditional all branches count. Exchanges of a device with itself do not.
    """
    computations, entry = _computations(hlo)
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", hlo.partition("\n")[0]))
    counts: dict[str, int] = dict.fromkeys(_RING, 0)
    sent, chains, unknown_loops = counts.copy(), set(), 0

    def walk(name: str, times: int) -> None:
        """Count a computation that runs so many times."""
        nonlocal unknown_loops
        for line in computations.get(name, ()):
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            shape, opcode, rest = instruction.groups()
            if opcode.removesuffix("-start") in _RING:
                chain = _CHAIN.search(rest)
                # A TPU hides an exchange behind the work of several fusions, and each of them shows it.
                if chain is None or chain[1] not in chains:
                    chains.update(chain.groups() if chain else ())
                    count(opcode, shape, rest, times, as_scatter=name.startswith("all-reduce-scatter"))
            elif opcode == "while" and (loop := _LOOP.search(rest)):
                trips, before = _trips(rest, computations.get(loop[1], [])), sum(counts.values())
                walk(loop[2], times * (trips or 1))
                unknown_loops += trips is None and sum(counts.values()) > before
            elif opcode not in ("async-update", "async-done"):  # they name what their async-start has called
                for one, several in _CALLED.findall(rest):
                    for called in [one] if one else re.findall(r"[\w.\-]+", several):
                        walk(called, times)

    def count(opcode: str, shape: str, rest: str, times: int, as_scatter: bool) -> None:
        kind, size, group = opcode.removesuffix("-start"), _result_bytes(opcode, shape), _group_size(rest, devices)
        if as_scatter:  # a TPU's fusion of a sum and of the slice of it that is kept
            kind, size = "reduce-scatter", size // group
        if group > 1:
            counts[kind] += times
            sent[kind] += times * round(size * _RING[kind](group))

    walk(entry, 1)
    used = [kind for kind in _RING if counts[kind]]
    return Traffic({kind: counts[kind] for kind in used}, {kind: sent[kind] for kind in used}, unknown_loops)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one where the program begins."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _trips(rest: str, condition: list[str]) -> int | None:
    """How often a loop runs, or None where that is not to be seen."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    bounds = _INTEGER.findall("\n".join(condition))
    return int(bounds[0]) if len(bounds) == 1 else None


def _result_bytes(opcode: str, shape: str) -> int:
    """Bytes of a collective's result; what begins one has its operands, and maybe counters, beside it."""
    sizes = [
        _itemsize(dtype) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in _ARRAY.findall(shape)
    ]
    if opcode == "all-gather-start":
        sizes = sizes[len(sizes) // 2 :]
    elif opcode == "collective-permute-start":
        sizes = sizes[1:2]
    return int(sum(sizes))


def _itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1  # a pred takes a byte


def _group_size(rest: str, devices: int) -> int:
    """How many devices take part in one exchange."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return 1 if all(a == b for a, b in re.findall(r"(\d+),(\d+)", pairs[1] + "}")) else 2
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(('[^}]*)?)\}", rest):
        axes = dict(re.findall(r"('\w+')=(\d+)", groups[1]))
        # 'axis' is a whole axis of the mesh, and 'axis':(m)n a part of it of size n.
        return math.prod(int(part or axes[axis]) for axis, part in re.findall(r"('\w+')(?::\(\d+\)(\d+))?", groups[2]))
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(groups[1].split(","))
    return devices
