"""Configs as JSON and back: every field survives, and is in the example that says so."""

import json
from dataclasses import fields, is_dataclass

import pytest

from mtp_jax.config import MeshConfig, OptimizerConfig, ProfileConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.heads.config import HeadConfig
from mtp_jax.model.config import ModelConfig, RopeScaling
from mtp_jax.validate import ConfigError, differences, from_dict, to_dict


def test_every_field_survives_json():
    """Every field differs from its default, so one that is dropped is noticed."""
    config = TrainConfig(
        ModelConfig(
            vocab_size=512,
            d_model=64,
            d_ff=96,
            num_tokens=300,
            num_layers=3,
            num_heads=8,
            num_kv_heads=4,
            head_dim=10,
            context_length=333,
            rope_theta=5e5,
            rope_scaling=RopeScaling(4.0, 2.0, 6.0, 4096),
            qkv_bias=True,
            qk_norm=True,
            tie_embeddings=True,
            norm_eps=1e-6,
            dtype="float32",
            param_dtype="bfloat16",
            remat="dots",
        ),
        HeadConfig(
            "other",
            3,
            "independent",
            1,
            2,
            "shared",
            5,
            "ntp",
            0.5,
            0.9,
            1e-3,
            "switch",
            0.2,
            0.1,
            1.0,
            6,
            "block",
            0.5,
            0.1,
            0.2,
            0.3,
            0.4,
            0.7,
            0.6,
            encoder_layers=2,
            taps=(1, 3),
        ),
        DataConfig(
            "text", "*.txt", "<|end|>", "text", "", "train", 0.3, "/cache", "tok.json", "<|end|>", 17, 6, 5, max_bad=0.2
        ),
        OptimizerConfig("muon", 2e-3, "wsd", 7, 0.3, 0.2, 0.05, 0.8, 0.99, 1e-7, 0.9, 0.5, 3, 2.0),
        MeshConfig(2, 3, -1),
        ProfileConfig("3:5"),
        steps=77,
        grad_accumulation=3,
        eval_every=9,
        eval_batches=4,
        eval_temperatures=(0.5,),
        checkpoint_every=11,
        keep_checkpoints=5,
        log_every=3,
        log_to=("wandb",),
        ema_decay=0.9,
        base="runs/trunk",
        seed=8,
    )
    assert_no_default(config)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    default = TrainConfig()
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(default)))) == default
    assert from_dict(TrainConfig, {}) == default
    # And the two differ in all that they hold.
    differing = {name: (here, there) for name, here, there in differences(config, default)}
    alone = {"init_from", "model.attention", "data.field", "data.dataset", "data.split", "head.loss_fraction"}
    alone |= {"head.attention", "head.per_offset"}
    assert (
        differing.keys() | alone == {name for name, _ in leaves(to_dict(config))}
        and list(differences(config, config)) == []
    )
    assert differing["model.rope_scaling.factor"] == (4.0, 1.0) and differing["seed"] == (8, 0)


def leaves(values, prefix=""):
    for name, value in values.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


# Fields that do not go with other values than another field's default.
ALONE = {"init_from", "attention", "per_offset", "field", "dataset", "split", "loss_fraction"}


def assert_no_default(config):
    default = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        assert field.name in ALONE or value != getattr(default, field.name), (
            f"{type(config).__name__}.{field.name} is its default"
        )
        if is_dataclass(value):
            assert_no_default(value)


def test_from_dict_checks_what_it_reads():
    values = to_dict(TrainConfig())
    values["data"]["batch_size"] = 10
    values["grad_accumulation"] = 4
    with pytest.raises(ConfigError, match="batch_size is 10"):
        from_dict(TrainConfig, values)
