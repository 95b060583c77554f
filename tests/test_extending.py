"""Extensions: a factor, a circuit, a verifier and a source from outside the package, each a class and a line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mtp_jax
from mtp_jax import HeadConfig, generate
from mtp_jax.data.config import DataConfig
from mtp_jax.data.sources import SOURCES
from mtp_jax.data.sources.base import Part
from mtp_jax.decode.verify import VERIFIERS
from mtp_jax.decode.verify.coupled import Coupled
from mtp_jax.heads.circuits import CIRCUITS, CPD
from mtp_jax.heads.factors import FACTORS, Factors, Flops
from mtp_jax.model.layers import product
from mtp_jax.parameters import PARAMETERS, Parameter, init_weight
from mtp_jax.train.loop import train
from support import tiny


class Diagonal(Factors):
    """U diag(a_rs) h: a factor through the model's table whose own part is a vector."""

    THROUGH_TABLE = True
    STACKED = {"scale_DRW": 2}  # noqa: RUF012

    def __init__(self, head, model, *, rngs):
        self.scale_DRW = init_weight(rngs, "scale_DRW", (model.d_model, head.rank, head.window), model.d_model**0.5)

    @staticmethod
    def logits(tables, x_BTD):
        parts = tables["scale_DRW"]
        scale_DRW = jnp.concatenate(parts, axis=2) if isinstance(parts, list) else parts
        rows_BTRWD = x_BTD[:, :, None, None] * jnp.moveaxis(scale_DRW, 0, -1)[None, None].astype(x_BTD.dtype)
        return product("btrwd,vd->btrwv", rows_BTRWD, tables["unembed_VD"])

    @staticmethod
    def flops(head, model):
        forward = 2 * head.rank * head.window * model.d_model * model.vocab_size
        return Flops(forward, states=forward, table=0)


class Forgetful(CPD):
    """A mixture that forgets half of what a token tells of the component."""

    @staticmethod
    def advance(carry, score_R, offset):
        log_alpha_R = jax.nn.log_softmax(carry + 0.5 * score_R, axis=-1)
        return log_alpha_R, log_alpha_R


class Counting:
    """A source of documents that are numbers."""

    def __init__(self, config):
        pass

    def fingerprint(self):
        return {"counting": 40}

    def parts(self, data_dir):
        return [Part("numbers")]

    def read(self, part, data_dir):
        for i in range(40):
            yield f"{i}", f"{i} and {i + 1} and {i + 2}. ".encode() * 12


@pytest.fixture
def registered(monkeypatch):
    """One line each; a factor's parameter has one too."""
    monkeypatch.setitem(FACTORS, "diagonal", Diagonal)
    monkeypatch.setitem(PARAMETERS, "scale_DRW", Parameter(P("fsdp", None, None), (0,), (1, 2), matrix=False))
    monkeypatch.setitem(CIRCUITS, "forgetful", Forgetful)
    monkeypatch.setitem(VERIFIERS, "mine", Coupled())
    monkeypatch.setitem(SOURCES, "counting", Counting)


def test_a_run_of_what_is_not_in_the_package(registered, tmp_path):
    """It trains, is saved, loaded, and decodes losslessly."""
    head = HeadConfig(window=3, rank=2, circuit="forgetful", factors="diagonal")
    data = DataConfig("counting", seq_len=16, batch_size=8, cache_dir=str(tmp_path / "cache"), valid_fraction=0.3)
    config = tiny.train_config(tiny.model_config(vocab_size=258), head, steps=2)
    metrics = train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert np.isfinite(metrics["loss"])
    run = mtp_jax.load(tmp_path / "run")
    with jax.set_mesh(run.mesh):
        plain, drafted = (
            generate(run.decoder, [[49, 32]], max_new_tokens=12, temperature=0.8, verifier="mine", k=k) for k in (0, 2)
        )
    np.testing.assert_array_equal(plain.tokens, drafted.tokens)
