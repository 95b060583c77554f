"""A head on a base: the base stays as it is, costs nothing, is not stored again, and is the one that it was."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mtp_jax
from mtp_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mtp_jax.model.config import ModelConfig
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.loading import load
from mtp_jax.state import split
from mtp_jax.train.costs import costs
from mtp_jax.train.loggers import read_metrics
from mtp_jax.train.loop import train
from mtp_jax.train.step import make_trainer
from mtp_jax.train.trained import merge, partition
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
    """The config of a head on the trunk, which says nothing of the model."""
    config, run_dir = trunk
    values = dict(head=tiny.head_config(target="ntp", rank=2), base=run_dir, model=ModelConfig(), steps=4)
    return dataclasses.replace(config, **{**values, **changes})


def parameters(run_dir, step="latest", weights="params"):
    return flatten_dict(jax.device_get(split(load(run_dir, step, weights=weights).model)[1]))


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def heads(trunk, tmp_path_factory):
    """A run of four steps on the trunk, of which two are kept, with AdamW that decays and an average."""
    run_dir = tmp_path_factory.mktemp("heads") / "run"
    train(on_trunk(trunk, checkpoint_every=2, ema_decay=0.9), run_dir)
    return run_dir


def test_the_base_stays_bit_for_bit_and_the_head_learns(trunk, heads):
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


def test_a_run_on_a_base_goes_on_as_if_it_had_not_stopped(trunk, heads, tmp_path):
    config = on_trunk(trunk, checkpoint_every=2, ema_decay=0.9)
    train(dataclasses.replace(config, steps=2, optimizer=config.optimizer), tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    at_once, resumed = parameters(heads), parameters(tmp_path / "run")
    assert all(same(at_once[path], resumed[path]) for path in at_once if path[0] != "head")
    assert {path: leaf.shape for path, leaf in at_once.items()} == {path: leaf.shape for path, leaf in resumed.items()}
    whole = dataclasses.replace(config, base="", model=trunk[0].model)
    with pytest.raises(ConfigError, match=r"--resume: base is '' .*a run begins once"):
        train(whole, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_model_that_begins_with_another_goes_on_learning(trunk, tmp_path):
    config = on_trunk(trunk, base="", init_from=trunk[1], model=trunk[0].model, steps=1)
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
        base="x",
    )
    with tiny.mesh():
        state = jax.eval_shape(make_trainer(config).init)
    trained, fixed = partition(state.params)
    assert merge(trained, fixed) == state.params and state.whole == {**state.base, **state.params}
    assert {path[-1] for path in flatten_dict(trained)} == {"map_DRWD", "gate_DR"}
    assert "trunk" in state.base and "head" not in state.base


@pytest.mark.parametrize(
    "factors", ["shared", *(pytest.param(f, marks=pytest.mark.slow) for f in ("full", "lowrank", "lora"))]
)
def test_nothing_goes_back_through_a_base(factors):
    """Matrix products in the text of the compiled step: one in a loop counts once."""
    jax.config.update("jax_disable_most_optimizations", False)
    found = {}
    model = tiny.model_config(num_layers=1)
    for base in ("", "x"):
        head = tiny.head_config(factors=factors, target="ntp", balance="none")
        config = tiny.train_config(model, head, base=base)
        with tiny.mesh():
            trainer = make_trainer(config)
            state = jax.eval_shape(trainer.init)
            batch = tiny.make_batch(config)
            text = trainer.step.lower(trainer.init(), batch).compile().as_text()
        found[base] = text, costs(config, state.whole), len(jax.tree.leaves(state.opt_state))
    whole, frozen = found[""], found["x"]
    # Seven matrices and two products of attention, each with two gradients, are the trunk's.
    dots = [len(re.findall(r" dot\(", text)) for text, *_ in (whole, frozen)]
    assert dots[0] - dots[1] >= 2 * 9
    assert frozen[1].trunk_flops == whole[1].trunk_flops / 3 and frozen[1].head_flops < whole[1].head_flops
    assert frozen[1].step_ratio < whole[1].step_ratio
    assert frozen[2] < whole[2]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": tiny.model_config(vocab_size=258, d_ff=48)}, "base: model.d_ff is 48 and the run in {} has 32"),
        ({"model": tiny.model_config(vocab_size=258, rope_theta=5e5)}, "model.rope_theta is 500000.0"),
        ({"model": ModelConfig(tie_embeddings=True)}, "model.tie_embeddings is True and the run in {} has False"),
        (
            {"base": "", "init_from": "{}", "model": tiny.model_config(vocab_size=258, tie_embeddings=True)},
            "init_from: model.tie_embeddings is True and the run in {} has False; one table would have to stand for "
            "two. Give the run's own value.",
        ),
        (
            {"base": "", "init_from": "{}", "model": tiny.model_config(vocab_size=258, d_ff=48)},
            "init_from: model.d_ff is 48 and the run in {} has 32; a trunk is taken as it is",
        ),
        ({"base": "nowhere"}, "nowhere is not a run directory"),
    ],
)
def test_a_run_without_the_parameters_is_refused(trunk, tmp_path, changes, words):
    changes = {name: trunk[1] if value == "{}" else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=re.escape(words.format(trunk[1]))):
        train(on_trunk(trunk, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("factors", ["full", "shared"])
def test_a_run_without_a_next_token_table_is_refused(trunk, tmp_path, factors):
    """It has none, or one that only its factors go through."""
    mixed = dataclasses.replace(trunk[0], head=tiny.head_config(rank=2, window=2, factors=factors), steps=1)
    train(mixed, tmp_path / "mixed")
    begun = on_trunk(trunk, base="", init_from=str(tmp_path / "mixed"), model=trunk[0].model)
    said = (
        r"init_from: unembed_VD is \[258, 16\] here and the run in .*mixed has none that gives the next "
        r"token\. Begin from a run with the same trunk, and with head\.target ntp, or rank 1 and full factors\."
    )
    with pytest.raises(ConfigError, match=said):
        train(begun, tmp_path / "run")
    config = on_trunk(trunk, base=str(tmp_path / "mixed"))
    with pytest.raises(ConfigError, match=r"base: the run in .*mixed has no table that gives the next token"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with Checkpoints(tmp_path / "mixed") as checkpoints:
        assert checkpoints.steps() == [1]


@pytest.mark.slow
def test_one_table_may_stand_for_two(trunk, tmp_path):
    """A head that is not tied may begin from a run that is."""
    tied = dataclasses.replace(trunk[0].model, tie_embeddings=True)
    source = dataclasses.replace(trunk[0], model=tied, head=tiny.head_config(target="ntp", rank=2), steps=1)
    train(source, tmp_path / "tied")
    begun = on_trunk(trunk, base="", init_from=str(tmp_path / "tied"), model=trunk[0].model, steps=1)
    begun = dataclasses.replace(begun, optimizer=OptimizerConfig(learning_rate=0.0, warmup_steps=0))
    train(begun, tmp_path / "run")
    (before, after), table = (parameters(tmp_path / name) for name in ("tied", "run")), ("unembed_VD",)
    assert ("embed_VD",) not in before
    assert same(after["embed_VD",], before[table]) and same(after[table], before[table])


@pytest.fixture(scope="module")
def apart(trunk, tmp_path_factory):
    """A run whose embeddings are tied and whose head has a table of its own for the next token."""
    tied = dataclasses.replace(trunk[0].model, tie_embeddings=True)
    head = tiny.head_config(rank=1, window=2, factors="full", circuit="independent")
    path = tmp_path_factory.mktemp("apart") / "run"
    train(dataclasses.replace(trunk[0], model=tied, head=head, steps=1), path)
    return tied, path


@pytest.mark.slow
def test_a_tied_table_that_is_the_embedding_alone_stays_what_it_is(trunk, apart, tmp_path):
    tied, source = apart
    head = tiny.head_config(rank=1, window=2, factors="shared")
    config = on_trunk(trunk, model=tied, head=head, base=str(source), steps=1)
    train(config, tmp_path / "run")
    tables = [np.asarray(mtp_jax.load(path).model.unembed_VD[...]) for path in (source, tmp_path / "run")]
    np.testing.assert_array_equal(*tables)


def test_a_tied_table_that_is_the_embedding_alone_gives_no_next_token(trunk, apart, tmp_path):
    tied, source = apart
    with pytest.raises(ConfigError, match=r"unembed_VD is .* has none that gives the next token"):
        train(on_trunk(trunk, base="", model=tied, init_from=str(source), steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"base: .* has no table that gives the next token"):
        train(on_trunk(trunk, base=str(source), steps=1), tmp_path / "run")


def test_a_checkpoint_holds_the_head_alone(trunk, heads):
    """And the optimizer's state of it: two moments and an average, in float32."""
    folder = heads / "checkpoints" / "4"
    stored = {name: flatten_dict(tree) for name, tree in saved(folder).items()}
    assert stored["params"].keys() == stored["ema"].keys() and {path[0] for path in stored["params"]} == {"head"}
    size = sum(np.prod(shape) * 4 for shape in stored["params"].values())
    arrays = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and "meta" not in file.parts)
    assert 4 * size < arrays < 4 * size + 2**17
    config = load(heads).config
    assert config.base == trunk[1] and config.model == dataclasses.replace(trunk[0].model, num_tokens=257)


def saved(folder):
    """The shapes of what a checkpoint has, by name."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    return {
        name: jax.tree.map(lambda a: a.shape, dict(handler.metadata(folder / name).tree)) for name in ("params", "ema")
    }


def test_a_base_that_was_moved_is_found_where_it_is_said_to_be(trunk, heads, tmp_path):
    """And another one is refused, as is none."""
    moved, other, run = tmp_path / "moved", tmp_path / "other", tmp_path / "run"
    shutil.copytree(trunk[1], tmp_path / "here")
    train(on_trunk(trunk, base=str(tmp_path / "here"), steps=1), run)
    (tmp_path / "here").rename(moved)
    with pytest.raises(ConfigError, match=r"run is a head on the model in .*here: .*Say where it is with --base DIR"):
        load(run)
    found, plain = load(run, base=moved), load(trunk[1])
    assert same(found.model.embed_VD[...], plain.model.embed_VD[...])
    train(dataclasses.replace(trunk[0], seed=1), other)
    with pytest.raises(ConfigError, match=r"is a head on a model with sha256 \w{12}, and the one in .*other has"):
        load(run, base=other)
    with pytest.raises(ConfigError, match="has no base, and one is given"):
        load(moved, base=other)
    with pytest.raises(ConfigError, match=r"--resume: the base .*other has sha256"):
        train(on_trunk(trunk, base=str(other), steps=2), run, resume=True)
    with pytest.raises(ConfigError, match=r"run is a head on .*here itself. Give that one"):
        train(on_trunk(trunk, base=str(run)), tmp_path / "third")


@pytest.mark.parametrize("weights", ["params", "ema"])
def test_what_only_decodes_reads_base_and_head_in_the_compute_dtype(heads, weights):
    prompts, options = [[1, 2, 3]], dict(max_new_tokens=8, temperature=0.0)
    whole, alone = load(heads, weights=weights), load(heads, weights=weights, decoding_only=True)
    a, b = (run.generate_tokens(prompts, **options) for run in (whole, alone))
    np.testing.assert_array_equal(a.tokens[0], b.tokens[0])


def test_training_reports_no_loss_of_what_does_not_change(trunk, heads):
    """The model's own next token costs a product with its table in every step, and tells nothing new: evaluations
    alone have it."""
    rows = read_metrics(heads)
    assert all(("loss_first_token" in row) == (row["kind"] == "eval") for row in rows)
