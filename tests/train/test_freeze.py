"""A head on a frozen trunk: what is frozen stays bit for bit, costs nothing, and comes from a run that has it."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mtp_jax
from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.loading import load
from mtp_jax.state import split
from mtp_jax.train.costs import costs
from mtp_jax.train.freeze import is_frozen, merge, partition
from mtp_jax.train.loop import train
from mtp_jax.train.step import make_trainer
from mtp_jax.validate import ConfigError
from support import tiny
from support.compilation import quick

PLAIN = tiny.head_config(circuit="independent", rank=1, window=1, balance="none")


@pytest.fixture(autouse=True)
def quick_compilation():
    """What is looked at here are parameters; faster code would take longer to compile."""
    with quick():
        yield


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """The config and the directory of a run with a next-token loss alone."""
    root = tmp_path_factory.mktemp("trunk")
    data = tiny.text_data(root)
    config = TrainConfig(
        tiny.model_config(vocab_size=258),
        PLAIN,
        data,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        MeshConfig(1, 1, 1) if jax.device_count() == 1 else MeshConfig(2, 2, 2),
        steps=2,
        eval_batches=1,
    )
    train(config, root / "run")
    return config, str(root / "run")


def on_trunk(trunk, **changes):
    """The config of a head on the frozen trunk."""
    config, run_dir = trunk
    values = dict(head=tiny.head_config(target="ntp", rank=2), init_from=run_dir, freeze="trunk", steps=4)
    return dataclasses.replace(config, **{**values, **changes})


def parameters(run_dir, step="latest", weights="params"):
    return flatten_dict(jax.device_get(split(load(run_dir, step, weights=weights).model)[1]))


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def heads(trunk, tmp_path_factory):
    """A run of four steps on the frozen trunk, of which two are kept, with AdamW that decays and an average."""
    run_dir = tmp_path_factory.mktemp("heads") / "run"
    train(on_trunk(trunk, checkpoint_every=2, ema_decay=0.9), run_dir)
    return run_dir


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(trunk, heads):
    before, early, late = parameters(trunk[1]), parameters(heads, 2), parameters(heads)
    average = parameters(heads, weights="ema")
    for path, leaf in late.items():
        assert same(leaf, average[path]) == same(leaf, early[path]) == (path[0] != "head"), path
        # A trunk of rank 1 has its next-token table among the factors.
        table = before["head", "factors", "u_DRWV"][:, 0, 0].T
        assert path[0] == "head" or same(leaf, table if path == ("unembed_VD",) else before[path]), path


def test_the_law_that_is_preserved_is_that_of_the_trunk(trunk, heads):
    tokens = np.arange(1, 13)[None]
    laws = []
    for run in (load(trunk[1]), load(heads, 2), load(heads), load(heads, weights="ema")):
        with jax.set_mesh(run.mesh):
            laws.append(np.asarray(run.model.target(run.model.see(tokens))[0]))
    # The trunk's own law comes from another parameter, in another product.
    np.testing.assert_allclose(laws[0], laws[1], atol=1e-5)
    assert same(laws[1], laws[2]) and same(laws[2], laws[3])


def test_a_frozen_run_goes_on_as_if_it_had_not_stopped(trunk, heads, tmp_path):
    config = on_trunk(trunk, checkpoint_every=2, ema_decay=0.9)
    train(dataclasses.replace(config, steps=2, optimizer=config.optimizer), tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    at_once, resumed = parameters(heads), parameters(tmp_path / "run")
    frozen = [path for path in at_once if is_frozen(config, path)]
    assert frozen and all(same(at_once[path], resumed[path]) for path in frozen)
    assert {path: leaf.shape for path, leaf in at_once.items()} == {path: leaf.shape for path, leaf in resumed.items()}
    for changes in ({"freeze": "none"}, {"init_from": "elsewhere"}):
        with pytest.raises(ConfigError, match=f"--resume: {next(iter(changes))} is .*a run begins once"):
            train(dataclasses.replace(config, **changes), tmp_path / "run", resume=True)


def test_without_freezing_the_trunk_goes_on_learning(trunk, tmp_path):
    config = on_trunk(trunk, freeze="none", steps=1)
    train(config, tmp_path / "run")
    before, after = parameters(trunk[1]), parameters(tmp_path / "run")
    rate = config.optimizer.learning_rate
    moved = np.abs(after["embed_VD",] - before["embed_VD",]).max()
    assert 0 < moved <= 1.1 * rate  # one step of AdamW from where the other run ended


@pytest.mark.parametrize("target", ["ntp", "marginal"])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_put_together_again(target, tied):
    config = tiny.train_config(
        tiny.model_config(tie_embeddings=tied),
        tiny.head_config(target=target, factors="shared"),
        freeze="trunk",
        init_from="x",
    )
    with tiny.mesh():
        params = jax.eval_shape(make_trainer(config).init).params
    trained, frozen = partition(config, params)
    assert merge(trained, frozen) == params
    names = {path[-1] for path in flatten_dict(trained)}
    assert names == {"map_DRWD", "gate_DR"}


@pytest.mark.parametrize(
    "factors", ["full", "shared", *(pytest.param(f, marks=pytest.mark.slow) for f in ("lowrank", "lora"))]
)
def test_nothing_goes_back_through_a_frozen_trunk(factors):
    """Matrix products in the text of the compiled step: one in a loop counts once."""
    jax.config.update("jax_disable_most_optimizations", False)
    found = {}
    model = tiny.model_config(num_layers=1)
    for freeze in ("none", "trunk"):
        head = tiny.head_config(factors=factors, target="ntp", balance="none")
        config = tiny.train_config(model, head, freeze=freeze, init_from="x")
        with tiny.mesh():
            trainer = make_trainer(config)
            state = jax.eval_shape(trainer.init)
            batch = tiny.make_batch(config)
            text = trainer.step.lower(trainer.init(), batch).compile().as_text()
        found[freeze] = text, costs(config, state.params), len(jax.tree.leaves(state.opt_state))
    whole, frozen = found["none"], found["trunk"]
    # Seven matrices and two products of attention, each with two gradients, are the trunk's.
    dots = [len(re.findall(r" dot\(", text)) for text, *_ in (whole, frozen)]
    assert dots[0] - dots[1] >= 2 * 9
    assert frozen[1].trunk_flops == whole[1].trunk_flops / 3 and frozen[1].head_flops < whole[1].head_flops
    assert frozen[1].step_ratio < whole[1].step_ratio
    assert frozen[2] < whole[2]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": tiny.model_config(vocab_size=258, d_ff=48)}, "model.d_ff is 48 and the run in {} has 32"),
        ({"model": tiny.model_config(vocab_size=258, rope_theta=5e5)}, "model.rope_theta is 500000.0"),
        (
            {"model": tiny.model_config(vocab_size=258, tie_embeddings=True)},
            "init_from: model.tie_embeddings is True and the run in {} has False; one table would have to stand for "
            "two. Give the run's own value.",
        ),
        ({"init_from": "nowhere"}, "nowhere is not a run directory"),
    ],
)
def test_a_run_without_the_parameters_is_refused(trunk, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words.format(trunk[1]))):
        train(on_trunk(trunk, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("factors", [pytest.param("full", marks=pytest.mark.slow), "shared"])
def test_a_run_without_a_next_token_table_is_refused(trunk, tmp_path, factors):
    """It has none, or one that only its factors go through."""
    mixed = dataclasses.replace(trunk[0], head=tiny.head_config(rank=2, window=2, factors=factors), steps=1)
    train(mixed, tmp_path / "mixed")
    config = on_trunk(trunk, init_from=str(tmp_path / "mixed"))
    said = (
        r"init_from: unembed_VD is \[258, 16\] here and the run in .*mixed has none that gives the next "
        r"token\. Begin from a run with the same trunk, and with head\.target ntp, or rank 1 and full factors\."
    )
    with pytest.raises(ConfigError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with Checkpoints(tmp_path / "mixed") as checkpoints:
        assert checkpoints.steps() == [1]


def test_one_table_may_stand_for_two(trunk, tmp_path):
    """A head that is not tied may begin from a run that is."""
    tied = dataclasses.replace(trunk[0].model, tie_embeddings=True)
    source = dataclasses.replace(trunk[0], model=tied, head=tiny.head_config(target="ntp", rank=2), steps=1)
    train(source, tmp_path / "tied")
    train(on_trunk(trunk, init_from=str(tmp_path / "tied"), steps=1), tmp_path / "run")
    (before, after), table = (parameters(tmp_path / name) for name in ("tied", "run")), ("unembed_VD",)
    assert ("embed_VD",) not in before
    assert same(after["embed_VD",], before[table]) and same(after[table], before[table])


def test_a_trunk_that_nothing_trained_is_not_frozen():
    with pytest.raises(ConfigError, match="freeze is trunk and init_from is empty"):
        mtp_jax.TrainConfig(freeze="trunk")


@pytest.fixture(scope="module")
def apart(trunk, tmp_path_factory):
    """A run whose embeddings are tied and whose head has a table of its own for the next token."""
    tied = dataclasses.replace(trunk[0].model, tie_embeddings=True)
    head = tiny.head_config(rank=1, window=2, factors="full", circuit="independent")
    path = tmp_path_factory.mktemp("apart") / "run"
    train(dataclasses.replace(trunk[0], model=tied, head=head, steps=1), path)
    return tied, path


def test_a_tied_table_that_is_the_embedding_alone_stays_what_it_is(trunk, apart, tmp_path):
    tied, source = apart
    head = tiny.head_config(rank=1, window=2, factors="shared")
    config = on_trunk(trunk, model=tied, head=head, init_from=str(source), steps=1, freeze="trunk")
    train(config, tmp_path / "run")
    tables = [np.asarray(mtp_jax.load(path).model.unembed_VD[...]) for path in (source, tmp_path / "run")]
    np.testing.assert_array_equal(*tables)


def test_a_tied_table_that_is_the_embedding_alone_gives_no_next_token(trunk, apart, tmp_path):
    tied, source = apart
    config = on_trunk(trunk, model=tied, init_from=str(source), steps=1)
    with pytest.raises(ConfigError, match=r"unembed_VD is .* has none that gives the next token"):
        train(config, tmp_path / "run")
