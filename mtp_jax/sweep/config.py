"""Sweep of an experiment file: runs that differ in a few fields, and what is measured of each.

Importing this module imports neither JAX nor Flax.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from mtp_jax.config import TrainConfig
from mtp_jax.validate import at_least, require, typed

CASE, SEED, COSTS = "case", "seed", "costs"


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured of every run of a sweep, alike.

    The checkpoints are those at equal steps (of the run that has the fewest), at equal training FLOPs and at equal
    wall-clock of training as the whole run of the reference, and after each of `lengths`, which names fractions of the
    steps.
    Losses are over `held_out_sequences` sequences of all held-out documents. Acceptance is over `prompts` stretches of
    them, `prompt_tokens` long, each continued by `new_tokens` in batches of `batch_size`: of every checkpoint at the
    first of `temperatures` with each k in 1..W-1, and at the end with W-1 drafts at the other temperatures too. By
    default that is 10,000 verification steps of a window of 4 even where all drafts are accepted.
    With a `suite`, a file of prompts by category as `mtp-jax bench decode --suite` takes it, the runs are heads on a
    base with target `ntp`. Acceptance is then expected, without decoding, on texts that the base writes behind
    `prompts` of each category: of every checkpoint at every temperature with each k.
    `ks` are the numbers of drafts that are measured, beside W-1; none for all.
    Training steps of one run of those that differ in their seed alone and of next-token models are timed in turn, in
    one process, for `rounds` rounds, and so are iterations of decoding one prompt at the first temperature (with a
    suite at each), with each k: speeds are what an iteration gives over what it takes. Heads with target `ntp` decode
    one after the other, each beside k = 0, which is the same for all on one trunk: its time is the clock. Heads that
    are trained from a base's cached hidden states are timed as they are, with no next-token model beside them.
    """

    held_out_sequences: int = 48
    prompts: int = 160
    prompt_tokens: int = 96
    new_tokens: int = 256
    batch_size: int = 40
    temperatures: tuple[float, ...] = (0.7, 0.0, 1.0)
    rounds: int = 40
    suite: str = ""
    ks: tuple[int, ...] = ()
    lengths: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        typed(self)
        at_least(self, 1, "held_out_sequences", "prompts", "prompt_tokens", "batch_size", "rounds")
        at_least(self, 2, "new_tokens")
        require(
            bool(self.temperatures) and min(self.temperatures) >= 0,
            f"MeasureConfig.temperatures is {self.temperatures}; give one or more, each at least 0.",
        )
        require(
            self.prompts % self.batch_size == 0,
            f"MeasureConfig.prompts is {self.prompts} and batch_size {self.batch_size}; it must divide them.",
        )
        require(
            min(self.ks, default=1) >= 1,
            f"MeasureConfig.ks is {self.ks}; give numbers of drafts, each at least 1, or none for all.",
        )
        for name, fraction in self.lengths.items():
            require(0 < fraction <= 1, f"MeasureConfig.lengths has {name} at {fraction}; it must lie in (0, 1].")


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: how it differs from the base, its config, and the name of the run that it is compared with.

    `shape` is the first of the runs that differ from it in their seed alone: its costs are those of all of them.
    """

    name: str
    changes: Mapping[str, Any]
    config: TrainConfig
    reference: str
    shape: str

    @property
    def whole(self) -> bool:
        """Whether it is the run of its shape whose costs are measured."""
        return self.name == self.shape


@dataclass(frozen=True)
class Sweep:
    """The runs of one question: `base` with every combination of a case and of a value for each field of the grid.

    `grid`: dotted fields of `TrainConfig` and the values of each, as in {"head.rank": (1, 4), "seed": (0, 1, 2)}. A
    `seed` is that of the batches too.
    `cases`: named changes of several fields together, as in {"none": {"head.balance": "none"}, ...}.
    `reference`: the changes by which a run becomes the one that it is compared with, as in {"head.rank": 1}.
    `first`: runs that the others begin from, by name: a variant's `base` or `init_from` is one of these names, or a
    directory.

    Raises:
      ConfigError: a field or a value that there is not, or a reference that is no run of the sweep.
    """

    base: TrainConfig
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    cases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    first: Mapping[str, TrainConfig] = field(default_factory=dict)
    measure: MeasureConfig = MeasureConfig()

    def __post_init__(self) -> None:
        clash = self.first.keys() & {*self.variants, COSTS}
        require(not clash, f"Sweep.first has the names {sorted(clash)}, which the sweep has for others; rename them.")

        for name, variant in self.variants.items() if self.measure.suite else ():
            config = variant.config
            require(
                bool(config.base) and config.head.target == "ntp" and config.head.window > 1,
                f"MeasureConfig.suite is {self.measure.suite!r}, and the run {name!r} has base {config.base!r}, "
                f"head.target {config.head.target} and head.window {config.head.window}: what is expected on a base's "
                "texts is of heads on a base, with target ntp, that draft. Leave suite out, or change the run.",
            )

    @property
    def fields(self) -> list[str]:
        """What varies, in the order of the names."""
        return [CASE] * bool(self.cases) + list(self.grid)

    @functools.cached_property
    def variants(self) -> dict[str, Variant]:
        """The runs by name, in order; those that differ in the seed alone are apart, so that one seed of all ends
        before the next."""
        values = [list(self.cases)] * bool(self.cases) + [list(of) for of in self.grid.values()]
        chosen = [dict(zip(self.fields, combination, strict=True)) for combination in itertools.product(*values)]
        chosen.sort(key=lambda choice: self.grid[SEED].index(choice[SEED]) if SEED in choice else 0)  # stable
        names = {self._name(choice): choice for choice in chosen}
        found = {}
        for name, choice in names.items():
            reference = self._name({**choice, **self.reference})
            require(
                set(self.reference) <= set(self.fields) and reference in names,
                f"Sweep.reference is {dict(self.reference)}, which makes {reference!r} of the run {name!r}; it must "
                f"change some of {', '.join(self.fields)} to values of the sweep.",
            )
            changes = {**choice, **(self.cases[choice[CASE]] if self.cases else {})}
            values = {field: value for field, value in changes.items() if field != CASE}
            if SEED in choice:
                values.setdefault("data.seed", choice[SEED])
            config = with_fields(self.base, values)
            shape = self._name({**choice, **({SEED: self.grid[SEED][0]} if SEED in choice else {})})
            found[name] = Variant(name, changes, config, reference, shape)
        return found

    def _name(self, choice: Mapping[str, Any]) -> str:
        short = [name.rpartition(".")[2] for name in choice]
        labels = [name if short.count(last) > 1 else last for name, last in zip(choice, short, strict=True)]
        parts = zip(choice, labels, choice.values(), strict=True)
        return ",".join(str(value) if name == CASE else f"{label}={value}" for name, label, value in parts)


@dataclass(frozen=True)
class NamedSweep:
    """A sweep of an experiment file: `file`@`size`. `title` is the first line of the file's docstring."""

    file: str
    size: str
    title: str
    sweep: Sweep

    @property
    def key(self) -> str:
        """What names it on the command line."""
        return f"{self.file}@{self.size}"

    @property
    def name(self) -> str:
        """The name of its file."""
        return Path(self.file).stem

    @property
    def directory(self) -> Path:
        """Where its runs go by themselves."""
        return Path("runs", self.name, self.size)

    @property
    def runs(self) -> list[str]:
        """The names of all that is run, in order: what others begin from, the costs of a step, and the variants."""
        return [*self.sweep.first, COSTS, *self.sweep.variants]

    def config(self, run: str, directory: str | os.PathLike[str] | None = None) -> TrainConfig:
        """The config of a run (of the costs, the base). What it begins from is in `directory`, if it is the sweep's."""
        first = {**self.sweep.first, COSTS: self.sweep.base}
        found = first[run] if run in first else self.sweep.variants[run].config
        if found.begins_from in self.sweep.first:
            name = "base" if found.base else "init_from"
            there = str(epath.Path(directory or self.directory) / found.begins_from)
            found = dataclasses.replace(found, **{name: there})
        return found


def with_fields(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with dotted fields changed, all at once. Raises `ConfigError` on one that there is not."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    names = [f.name for f in dataclasses.fields(config)]
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        near = difflib.get_close_matches(head, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}."
        require(head in names, f"{type(config).__name__} has no field {head!r}; {hint}")
        if rest:
            require(
                dataclasses.is_dataclass(getattr(config, head)),
                f"{type(config).__name__}.{head} has no fields, and {name!r} names one. Give {head!r}.",
            )
            nested.setdefault(head, {})[rest] = value
        else:
            own[name] = value
    own |= {head: with_fields(getattr(config, head), inner) for head, inner in nested.items()}
    return dataclasses.replace(config, **own)
