"""Values of config fields as people give them: each becomes plain Python, or is refused by its name."""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from mtp_jax import DataConfig, HeadConfig, MeasureConfig, ModelConfig, OptimizerConfig, TrainConfig
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.validate import ConfigError, to_dict

MODULES = [m.name for m in pkgutil.walk_packages(mtp_jax.__path__, "mtp_jax.") if not m.name.endswith("__main__")]


def config_classes():
    """Every dataclass of the package whose values come from a file or a person."""
    found = {}
    for name in MODULES:
        if "config" in name or name in ("mtp_jax.distributed", "mtp_jax.commands.data"):
            for value in vars(importlib.import_module(name)).values():
                if dataclasses.is_dataclass(value) and value.__module__ == name and hasattr(value, "__post_init__"):
                    found[value.__name__] = value
    return [cls for name, cls in sorted(found.items()) if name.endswith(("Config", "Scaling", "Distributed"))]


def scalars():
    """Every field of every config whose default is a number, a truth value or a string."""
    for cls in config_classes():
        needed = {"max_new_tokens": 4} if cls is DecodeConfig else {}
        made = cls(**needed)
        for field in dataclasses.fields(cls):
            value = getattr(made, field.name)
            if type(value) in (int, float, bool) or (type(value) is str and not value):
                yield pytest.param(cls, field.name, value, needed, id=f"{cls.__name__}.{field.name}")


@pytest.mark.parametrize(("cls", "name", "value", "needed"), list(scalars()))
def test_every_scalar_may_come_from_numpy_or_jax(cls, name, value, needed):
    """And is Python's own afterwards, which JSON takes."""
    alike = {
        int: [np.int64, np.int32, np.float64, np.array, jnp.int32, float],
        float: [np.float64, np.array, jnp.float32],
        bool: [np.bool_, np.array, jnp.asarray],
        str: [np.str_, np.array],
    }
    for kind in alike[type(value)]:
        found = getattr(cls(**{**needed, name: kind(value)}), name)
        assert type(found) in (type(value), float) and found == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
        )
        json.dumps(found)


@pytest.mark.parametrize(("cls", "name", "value", "needed"), list(scalars()))
def test_every_field_refuses_what_is_of_another_kind_by_its_name(cls, name, value, needed):
    for other in (
        b"bytes",
        {"a": 1},
        object(),
        jnp.zeros((2, 2)),
        *([] if isinstance(value, str) else ["3", "\ud83d"]),
    ):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{name} is "):
            cls(**{**needed, name: other})


def test_there_are_many_of_them():
    assert len(config_classes()) >= 12 and len(list(scalars())) > 80


@pytest.mark.parametrize("value", [True, np.True_, 2.5, float("nan"), float("inf"), None, [2], "2"])
def test_a_number_of_steps_is_an_integer(value):
    with pytest.raises(ConfigError, match=r"TrainConfig\.steps is .*; it must be an integer"):
        TrainConfig(steps=value)


def test_what_is_exact_is_taken():
    assert TrainConfig(steps=1e3).steps == 1000 and type(TrainConfig(steps=1e3).steps) is int
    assert DataConfig(cache_dir=Path("/a/b")).cache_dir == "/a/b"
    assert MeasureConfig(temperatures=[0.7, np.float32(0)]).temperatures == (pytest.approx(0.7), 0.0)
    assert OptimizerConfig(learning_rate=np.float32(1e-3)).learning_rate == pytest.approx(1e-3)
    assert DecodeConfig(np.array([3, 4]), seed=jnp.arange(2)).max_new_tokens == (3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate="3e-4"), r"learning_rate is '3e-4'; it must be a number"),
        (lambda: ModelConfig(dtype="float16"), r"dtype is 'float16'; it must be one of 'float32', 'bfloat16'"),
        (lambda: ModelConfig(qk_norm=1), r"qk_norm is 1; it must be True or False"),
        (lambda: TrainConfig(model=HeadConfig()), r"TrainConfig\.model is HeadConfig.*; it must be a ModelConfig"),
        (lambda: MeasureConfig(temperatures="0.7"), r"temperatures is '0.7'; it must be a sequence of which each is a"),
        (lambda: MeasureConfig(lengths=[1, 2]), r"MeasureConfig\.lengths is \[1, 2\]"),
    ],
)
def test_what_is_not_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_config_of_foreign_values_is_the_one_of_plain_values():
    foreign = TrainConfig(steps=np.int64(700), ema_decay=np.float64(0.5), model=ModelConfig(d_model=jnp.int32(64)))
    plain = TrainConfig(steps=700, ema_decay=0.5, model=ModelConfig(d_model=64))
    assert json.dumps(to_dict(foreign)) == json.dumps(to_dict(plain)) and hash(foreign.model) == hash(plain.model)
