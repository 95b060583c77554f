"""A run that is loaded to generate and nothing else: the same text, and one copy of the model, in the compute dtype."""

import dataclasses

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax.config import MeshConfig
from mtp_jax.decode.decoder import Decoder
from mtp_jax.interop.exporting import export_run
from mtp_jax.mesh import make_mesh
from mtp_jax.runs.layout import write_config
from mtp_jax.runs.writer import CheckpointWriter
from mtp_jax.state import TrainState, split
from mtp_jax.validate import ConfigError
from support import tiny

OPTIONS = dict(max_new_tokens=12, temperature=0.9, seed=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run in float32 that computes in bfloat16, its target the model's own law."""
    path = tmp_path_factory.mktemp("runs") / "run"
    config = tiny.train_config(tiny.model_config(vocab_size=264, dtype="bfloat16"), tiny.head_config(target="ntp"))
    config = dataclasses.replace(config.with_tokenizer(257), ema_decay=0.5)
    with tiny.mesh(), CheckpointWriter(path, 1) as checkpoints:
        params = split(tiny.make_model(config))[1]
        other = jax.tree.map(lambda a: -a if a.dtype == "float32" else a, params)
        write_config(checkpoints.run_dir, config)
        checkpoints.save(TrainState(jax.numpy.asarray(1), params, {}, other), config, {}, "")
    return path


@pytest.mark.parametrize("weights", ["params", "ema"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(1, 2, 2)])
def test_it_generates_the_same_text(path, mesh, weights):
    mesh = mesh and make_mesh(mesh, jax.devices()[:4])
    whole, narrow = (mtp_jax.load(path, mesh=mesh, weights=weights, decoding_only=only) for only in (False, True))
    assert narrow.generate(["The 1st", "x"], **OPTIONS) == whole.generate(["The 1st", "x"], **OPTIONS)
    # What `whole` makes for itself, to the last bit.
    for a, b in zip(jax.tree.leaves(whole.decoder), jax.tree.leaves(narrow.model), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.sharding == b.sharding


def test_its_model_is_its_decoder(path):
    run = mtp_jax.load(path, decoding_only=True)
    assert isinstance(run.model, Decoder) and run.decoder is run.model
    layers = jax.tree.leaves(run.model.trunk.blocks)
    assert {str(leaf.dtype) for leaf in layers if leaf.ndim > 1} == {"bfloat16"}


def test_what_it_cannot_do_is_refused(path, tmp_path):
    run = mtp_jax.load(path, decoding_only=True)
    with jax.set_mesh(run.mesh), pytest.raises(ConfigError, match="Load the run without decoding_only=True"):
        run.model.see(run.encode("x")[None])
    with pytest.raises(ConfigError, match="Load it without decoding_only=True"):
        export_run(run, path, tmp_path / "out")


def test_the_command_loads_for_decoding_alone(path, monkeypatch, capsys):
    from mtp_jax import cli
    from mtp_jax.runs import loading

    asked, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **k: asked.append(k) or load(*a, **k))
    how = ["--draft-temperature", "0.4", "--max-new-tokens", "4", "--color", "never"]
    cli.main(["generate", str(path), "--prompt", "The", *how])
    assert asked[0]["decoding_only"] and asked[0]["draft_temperature"] == 0.4 and "The" in capsys.readouterr().out
