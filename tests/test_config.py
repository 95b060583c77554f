"""Every configuration that cannot run is refused, with the values that disagree; every other survives JSON."""

import ast
import contextlib
import functools
import importlib
import inspect
import re
import sys

import pytest

from mtp_jax import config as config_module
from mtp_jax.bench.config import BenchConfig, LossBenchConfig, TrainBenchConfig
from mtp_jax.config import MeshConfig, OptimizerConfig, ProfileConfig, TrainConfig
from mtp_jax.data.config import DataConfig
from mtp_jax.decode.config import DecodeConfig
from mtp_jax.heads.base import Head
from mtp_jax.heads.config import HeadConfig
from mtp_jax.heads.registry import check_head
from mtp_jax.heads.shortlist import Shortlist
from mtp_jax.model.config import ModelConfig, RopeScaling
from mtp_jax.validate import ConfigError, from_dict
from support import REPOSITORY


def decode(*prompts, new=8, vocab_size=32, context=16, **changes):
    config = DecodeConfig(new, **changes)
    return config.check(ModelConfig(vocab_size=vocab_size, context_length=context), HeadConfig(window=4), prompts)


def on_mesh(*shape, batch=16, parts=1, factors="full", shortlist=0, **model):
    data, head = DataConfig(batch_size=batch), HeadConfig(factors=factors, shortlist=shortlist)
    config = TrainConfig(ModelConfig(**model), head, data, grad_accumulation=parts)
    return config.check_mesh(shape)


class ToTheModel(Head):
    """A head that leaves the first token to the model."""


# What is refused, and what its message must say: the fields, the values on both sides, and a way out.
REFUSED = {
    "more tokens than rows": (
        lambda: ModelConfig(vocab_size=12, num_tokens=13),
        ["num_tokens is 13", "vocab_size is 12", "Leave it out"],
    ),
    "a tokenizer of another size": (
        lambda: TrainConfig(model=ModelConfig(num_tokens=200)).with_tokenizer(257),
        ["num_tokens is 200", "has 257", "Leave it out"],
    ),
    "a shortlist of a head that has none": (
        lambda: ToTheModel.check(HeadConfig("drafter", target="ntp", shortlist=3)),
        ["shortlist is 3", "kind is drafter", "set it to 0"],
    ),
    "narrow parameters that are trained": (
        lambda: TrainConfig(ModelConfig(param_dtype="bfloat16")),
        ["param_dtype is bfloat16", "base is empty", "float32"],
    ),
    "a window without a head": (
        lambda: check_head(HeadConfig("none", window=2, target="ntp")),
        ["window is 2", "kind is none", "set window to 1"],
    ),
    "heads_by_groups": (
        lambda: ModelConfig(num_heads=6, num_kv_heads=4),
        ["num_heads is 6", "num_kv_heads is 4", "multiple"],
    ),
    "width_by_heads": (
        lambda: ModelConfig(d_model=250, num_heads=4),
        ["d_model is 250", "num_heads is 4", "head_dim"],
    ),
    "odd_head": (lambda: ModelConfig(head_dim=7), ["head_dim is 7", "even"]),
    "odd_head_by_division": (lambda: ModelConfig(d_model=36, num_heads=4), ["head_dim is 9", "even"]),
    "no_head": (lambda: ModelConfig(head_dim=0), ["head_dim is 0", "positive"]),
    "cudnn_dtype": (lambda: ModelConfig(attention="cudnn", dtype="float32"), ["cudnn", "float32", "bfloat16"]),
    "rope_scaling": (
        lambda: RopeScaling(low_freq_factor=4.0, high_freq_factor=2.0),
        ["high_freq_factor is 2.0", "low_freq_factor is 4.0", "4 and 1"],
    ),
    "window": (lambda: HeadConfig(window=0), ["HeadConfig.window is 0", "at least 1"]),
    "rank_of_independent": (
        lambda: HeadConfig(circuit="independent", rank=4),
        ["independent", "rank is 4", "rank 1", "cpd"],
    ),
    "unknown_kind": (
        lambda: check_head(HeadConfig("mixtur")),
        ["HeadConfig.kind", "'mixtur'", "did you mean 'mixture'"],
    ),
    "unknown_circuit": (
        lambda: check_head(HeadConfig(circuit="cdp")),
        ["HeadConfig.circuit", "'cdp'", "did you mean 'cpd'"],
    ),
    "unknown_factors": (
        lambda: check_head(HeadConfig(factors="lowrnk")),
        ["HeadConfig.factors", "'lowrnk'", "lowrank"],
    ),
    "a target that a head has not": (
        lambda: ToTheModel.check(HeadConfig("drafter")),
        ["HeadConfig.target is marginal", "kind is drafter", "target to ntp"],
    ),
    "gamma_zero": (lambda: HeadConfig(gamma=0.0), ["gamma is 0.0", "(0, 1]"]),
    "gamma_above": (lambda: HeadConfig(gamma=1.5), ["gamma is 1.5", "(0, 1]"]),
    "a shortlist under tables of their own": (
        lambda: check_head(HeadConfig(factors="full", shortlist=9)),
        ["shortlist is 9", "factors is full", "shared, residual, lowrank", "shortlist to 0"],
    ),
    "a shortlist that the mesh does not divide": (
        lambda: on_mesh(1, 1, 2, factors="shared", shortlist=3),
        ["head.shortlist is 3", "tensor has 2"],
    ),
    "a shortlist for nothing": (
        lambda: HeadConfig(factors="shared", window=1, shortlist=3),
        ["HeadConfig.shortlist is 3", "window is 1", "shortlist to 0"],
    ),
    "a shortlist that is longer than the model's vocabulary": (
        lambda: Shortlist(11, ModelConfig(vocab_size=12, num_tokens=10)),
        ["HeadConfig.shortlist is 11", "vocabulary has 10 tokens"],
    ),
    "a shortlist that is longer than the vocabulary": (
        lambda: LossBenchConfig(v=10, shortlist=11),
        ["shortlist is 11", "v is 10"],
    ),
    "a head that learns nothing": (
        lambda: HeadConfig(nll_weight=0.0),
        ["HeadConfig.nll_weight is 0", "kl_weight, tv_weight, acceptance_weight, lk_weight", "one of them above 0"],
    ),
    "a law at some positions": (
        lambda: HeadConfig(target="ntp", kl_weight=0.5, loss_fraction=0.25),
        ["HeadConfig.loss_fraction is 0.25", "kl_weight is 0.5", "loss_fraction to 1"],
    ),
    "a law of the head's own": (
        lambda: check_head(HeadConfig(kl_weight=0.5, tv_weight=0.25)),
        ["HeadConfig.kl_weight is 0.5 and tv_weight is 0.25", "target is marginal", "target to ntp"],
    ),
    "a law without offsets": (
        lambda: check_head(HeadConfig("none", 1, lk_weight=0.5, target="ntp")),
        ["HeadConfig.lk_weight is 0.5", "kind is none", "kind to mixture or sequential, or lk_weight to 0"],
    ),
    "valid_fraction_zero": (lambda: DataConfig(valid_fraction=0.0), ["valid_fraction is 0.0", "(0, 1)"]),
    "valid_fraction_one": (lambda: DataConfig(valid_fraction=1.0), ["valid_fraction is 1.0", "(0, 1)"]),
    "text_without_files": (lambda: DataConfig(source="text"), ["source is text", "files is empty", "--data.source '"]),
    "jsonl_without_files": (
        lambda: DataConfig(source="jsonl"),
        ["source is jsonl", "files is empty"],
    ),
    "parquet_without_files": (lambda: DataConfig(source="parquet"), ["source is parquet", "files is empty"]),
    "store_without_files": (lambda: DataConfig(source="store"), ["source is store", "files is empty", "data/stories"]),
    "mixture_without_files": (lambda: DataConfig(source="mixture"), ["source is mixture", "files is empty", "3:data"]),
    "files_twice": (lambda: DataConfig("a/*.txt", "b/*.txt"), ["'a/*.txt'", "'b/*.txt'", "leave one of them out"]),
    "skip_above_without_limit": (lambda: OptimizerConfig(skip_above=2.0), ["skip_above is 2.0", "skip_limit is 0"]),
    "profile_backwards": (lambda: ProfileConfig("13:10"), ["ProfileConfig.steps is '13:10'", "BEGIN:END"]),
    "profile_of_one": (lambda: ProfileConfig("13"), ["ProfileConfig.steps is '13'", "BEGIN:END"]),
    "two_beginnings": (
        lambda: TrainConfig(base="a", init_from="b"),
        ["base is 'a'", "init_from is 'b'", "one of them"],
    ),
    "tfds_without_data_set": (lambda: DataConfig(source="tfds"), ["dataset is empty", "--data.dataset"]),
    "field_empty": (lambda: DataConfig(source="jsonl", files="*", field="meta."), ["field is 'meta.'", "dots"]),
    "separator_of_stdlib": (lambda: DataConfig(separator="--"), ["separator is '--'", "source is stdlib", "text"]),
    "field_of_stdlib": (lambda: DataConfig(field="code"), ["field is 'code'", "jsonl and parquet and tfds", "'text'"]),
    "dataset_of_stdlib": (lambda: DataConfig(dataset="mnist"), ["dataset is 'mnist'", "source is stdlib", "tfds"]),
    "split_of_stdlib": (lambda: DataConfig(split="test"), ["split is 'test'", "source is stdlib", "tfds"]),
    "a stop that no vocabulary has": (lambda: decode([1], stop_tokens=[99]), ["stop_tokens has 99", "0..31"]),
    "tiny_temperature": (lambda: DecodeConfig(8, 1e-7), ["DecodeConfig.temperature is 1e-07", "at least 1e-06"]),
    "top_p_zero": (lambda: DecodeConfig(8, top_p=0.0), ["DecodeConfig.top_p is 0.0", "(0, 1]"]),
    "rows": (lambda: decode([1], [2], temperature=[0.5, 1, 2]), ["temperature has 3 values", "there are 2 prompts"]),
    "top_p_above": (lambda: DecodeConfig(8, top_p=1.5), ["DecodeConfig.top_p is 1.5", "(0, 1]"]),
    "greedy_by_temperature": (
        lambda: DecodeConfig(8, 0.7, verifier="greedy"),
        ["verifier is greedy", "temperature is 0.7", "Use coupled"],
    ),
    "no_prompts": (lambda: decode(), ["no prompts", "at least one"]),
    "drafts_by_window": (lambda: decode([1], k=4), ["k is 4", "window is 4", "0..3"]),
    "negative_drafts": (lambda: decode([1], k=-1), ["k is -1", "0..3"]),
    "seed": (lambda: decode([1], [2], seed=2**32), [f"seed is {2**32}", f"0..{2**32 - 1}"]),
    "row": (lambda: decode([1], row=2**31), [f"row is {2**31}", f"0..{2**31 - 1}"]),
    "row_of_seeds": (lambda: decode([1], row=1, seed=[3]), ["row is 1 and each row has a seed of its own"]),
    "empty_prompt": (lambda: decode([1], []), ["Prompt 1 is empty"]),
    "prompt_by_context": (
        lambda: decode([1], [1] * 9),
        ["Prompt 1 has 9 tokens", "max_new_tokens is 8", "17 together", "context_length is 16"],
    ),
    "prompt_by_vocabulary": (lambda: decode([3, 32]), ["Prompt 0 has token ids 3..32", "0..31"]),
    "negative_token": (lambda: decode([-1, 3]), ["Prompt 0 has token ids -1..3", "0..31"]),
    "two_kinds_of_prompts": (
        lambda: BenchConfig(suite="a.jsonl", files="*.txt"),
        ["suite is 'a.jsonl'", "files is '*.txt'", "one of them"],
    ),
    "ks_without_0": (lambda: BenchConfig(ks=(1, 3)), ["BenchConfig.ks is (1, 3)", "0 among them"]),
    "no_temperatures": (lambda: BenchConfig(temperatures=()), ["BenchConfig.temperatures is ()", "one or more"]),
    "k_in_words": (lambda: DecodeConfig(8, k="best"), ["DecodeConfig.k is 'best'", "an integer", "'auto'"]),
    "batches_that_do_not_divide": (
        lambda: BenchConfig(prompts=24, batch_sizes=(1, 5)),
        ["batch_sizes is (1, 5)", "prompts is 24", "divide the prompts"],
    ),
    "greedy_by_name": (
        lambda: BenchConfig(verifiers=("greedy",)),
        ["verifiers is ('greedy',)", "temperature 0 always has greedy"],
    ),
    "no_ranks": (lambda: TrainBenchConfig(ranks=()), ["TrainBenchConfig.ranks is ()", "one or more"]),
    "negative_temperature": (lambda: BenchConfig(temperatures=(0.7, -0.1)), ["is (0.7, -0.1)", "at least 0"]),
    "mesh_zero": (lambda: MeshConfig(fsdp=0), ["MeshConfig.fsdp is 0", "-1"]),
    "mesh_negative": (lambda: MeshConfig(tensor=-2), ["MeshConfig.tensor is -2", "-1"]),
    "mesh_two_rests": (lambda: MeshConfig(-1, -1, 2), ["(-1, -1, 2)", "only one"]),
    "mesh_too_large": (lambda: MeshConfig(2, 2, 4).shape(8), ["(2, 2, 4)", "16 devices", "are 8"]),
    "mesh_too_small": (lambda: MeshConfig(2, 2, 1).shape(8), ["(2, 2, 1)", "4 devices", "are 8"]),
    "mesh_rest": (lambda: MeshConfig(-1, 3, 1).shape(8), ["(-1, 3, 1)", "multiple of 3", "are 8"]),
    "batch_by_parts": (
        lambda: TrainConfig(data=DataConfig(batch_size=10), grad_accumulation=4),
        ["batch_size is 10", "grad_accumulation is 4", "multiple"],
    ),
    "sequence_by_context": (
        lambda: TrainConfig(model=ModelConfig(context_length=64), data=DataConfig(seq_len=65)),
        ["seq_len is 65", "context_length is 64"],
    ),
    "warmup_by_steps": (
        lambda: TrainConfig(optimizer=OptimizerConfig(warmup_steps=11), steps=10),
        ["warmup_steps is 11", "steps is 10"],
    ),
    "a shortlist under lora": (
        lambda: check_head(HeadConfig(factors="lora", shortlist=9)),
        ["shortlist is 9", "factors is lora", "shared, residual, lowrank"],
    ),
    "modules of a mixture": (
        lambda: check_head(HeadConfig(attention=True)),
        ["attention is True", "per_offset is False", "kind is mixture", "kind to sequential"],
    ),
    "taps without an encoder that reads them": (
        lambda: HeadConfig(taps=(2,)),
        ["taps is (2,)", "encoder is none", "encoder to block"],
    ),
    "encoder layers without a block": (
        lambda: HeadConfig(encoder="token", encoder_layers=2),
        ["encoder_layers is 2", "encoder is token", "encoder to block"],
    ),
    "a tap twice": (lambda: HeadConfig(encoder="block", taps=(1, 2, 1)), ["taps is (1, 2, 1)", "a layer twice"]),
    "the tap of no layer": (lambda: HeadConfig(encoder="block", taps=(0,)), ["taps is 0", "at least 1"]),
    "tokenizer": (
        lambda: TrainConfig(model=ModelConfig(vocab_size=100)).with_tokenizer(256),
        ["vocab_size is 100", "has 256", "'bytes'"],
    ),
    "batch_by_devices": (lambda: on_mesh(2, 3, 1), ["16 sequences", "2 x 3 = 6"]),
    "part_by_devices": (
        lambda: on_mesh(4, 1, 1, parts=8),
        ["2 sequences", "batch_size 16", "grad_accumulation 8", "4 x 1 = 4"],
    ),
    "width_by_fsdp": (lambda: on_mesh(1, 8, 1, d_model=36, head_dim=8), ["d_model is 36", "fsdp has 8"]),
    "vocabulary_by_tensor": (lambda: on_mesh(1, 1, 2, vocab_size=263), ["vocab_size is 263", "tensor has 2"]),
    "groups_by_tensor": (lambda: on_mesh(1, 1, 4, num_kv_heads=2), ["num_kv_heads is 2", "tensor has 4"]),
    "feed_forward_by_tensor": (lambda: on_mesh(1, 1, 2, d_ff=705), ["d_ff is 705", "tensor has 2"]),
    "unknown_field": (lambda: from_dict(HeadConfig, {"ranks": 4}), ["HeadConfig", "'ranks'", "did you mean 'rank'"]),
    "unknown_nested_field": (
        lambda: from_dict(TrainConfig, {"model": {"num_layer": 4}}),
        ["ModelConfig", "'num_layer'", "did you mean 'num_layers'"],
    ),
    "unknown_field_like_none": (lambda: from_dict(MeshConfig, {"qqq": 1}), ["'qqq'", "data", "fsdp", "tensor"]),
}
# The least value of every other number.
LEAST = {
    RopeScaling: {"factor": 1, "original_context_length": 1},
    ModelConfig: {
        **{"vocab_size": 1, "d_model": 1, "d_ff": 1, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1},
        "context_length": 1,
    },
    HeadConfig: {
        **{"window": 1, "rank": 1, "factor_width": 1},
        **{"ntp_weight": 0, "z_weight": 0, "balance_weight": 0, "init_noise": 0},
        **{
            "draft_temperature": 0,
            "shortlist": 0,
            "nll_weight": 0,
            "kl_weight": 0,
            "tv_weight": 0,
            "acceptance_weight": 0,
            "lk_weight": 0,
        },
    },
    DataConfig: {"seq_len": 1, "batch_size": 1},
    DecodeConfig: {"max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0},
    BenchConfig: {"prompts": 1, "prompt_tokens": 1, "new_tokens": 2, "repetitions": 1},
    LossBenchConfig: dict.fromkeys(("d", "v", "window", "rank", "tokens", "factor_width", "repetitions"), 1),
    TrainBenchConfig: {"repetitions": 1},
    OptimizerConfig: {"learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "clip_norm": 0},
    TrainConfig: {
        **{"steps": 1, "grad_accumulation": 1, "eval_every": 1, "eval_batches": 1, "checkpoint_every": 1},
        **{"keep_checkpoints": 1, "log_every": 1},
    },
}
# What must change with it, so that the least value fits.
ALONG = {
    "num_heads": {"num_kv_heads": 1},
    "d_model": {"head_dim": 2},
    "steps": {"optimizer": OptimizerConfig(warmup_steps=0)},
    "nll_weight": {"kl_weight": 0.1},
}
# Fields with a fixed set of values, and one that is not in it.
CHOICES = [
    (ModelConfig, "dtype", "float16", "bfloat16"),
    (ModelConfig, "remat", "ful", "full"),
    (ModelConfig, "attention", "cuda", "cudnn"),
    (LossBenchConfig, "dtype", "float16", "bfloat16"),
    (HeadConfig, "target", "next", "ntp"),
    (HeadConfig, "balance", "sqared", "squared"),
    (OptimizerConfig, "name", "adam", "adamw"),
    (OptimizerConfig, "schedule", "linear", "cosine"),
]
# Whether 1 belongs to the interval: a mean that decays by a factor of 1 never learns anything.
FRACTIONS = {"decay_fraction": True, "final_lr_fraction": True, "beta1": False, "beta2": False, "momentum": False}
# Numbers that must be above 0.
POSITIVE = [
    *((RopeScaling, "low_freq_factor"), (ModelConfig, "rope_theta"), (ModelConfig, "norm_eps")),
    *((OptimizerConfig, "eps"), (HeadConfig, "temperature")),
]
# The modules whose refusals are all tried here.
CHECKING = (
    *("config", "model.config", "data.config", "decode.config", "bench.config"),
    *("heads.config", "heads.base", "heads.mixture", "heads.shortlist", "heads.none"),
)
# What a config cannot be made without.
GIVEN = {DecodeConfig: {"max_new_tokens": 8}}


def assert_says(message, words):
    """Every word is there, and a number as a whole number: `is 4` is not found in `is 40`."""
    missing = [word for word in words if not re.search(re.escape(word) + r"(?![\d])(?!\.\d)", message)]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", REFUSED)
def test_the_refusal_names_the_fields_and_both_values(name):
    build, words = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        build()
    assert_says(str(error.value), words)


@pytest.mark.parametrize("cls, name", [(cls, name) for cls, names in LEAST.items() for name in names])
def test_the_least_value_is_allowed_and_the_next_below_is_not(cls, name):
    least = LEAST[cls][name]
    with pytest.raises(ConfigError) as error:
        cls(**{**GIVEN.get(cls, {}), name: least - 1})
    assert_says(str(error.value), [f"{cls.__name__}.{name} is {least - 1}", f"at least {least}"])
    with pytest.raises(ConfigError):
        cls(**{**GIVEN.get(cls, {}), name: float("nan")})
    assert getattr(cls(**{**GIVEN.get(cls, {}), name: least, **ALONG.get(name, {})}), name) == least


@pytest.mark.parametrize("name, closed", FRACTIONS.items())
def test_fractions_lie_between_0_and_1(name, closed):
    for value in (-0.1, 1.1, float("nan"), *([] if closed else [1.0])):
        with pytest.raises(ConfigError) as error:
            OptimizerConfig(**{name: value})
        assert_says(str(error.value), [f"OptimizerConfig.{name} is {value}", "[0, 1]" if closed else "[0, 1)"])
    for value in (0.0, 0.999, *([1.0] if closed else [])):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("cls, name", POSITIVE)
def test_what_is_divided_by_is_positive(cls, name):
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError) as error:
            cls(**{name: value})
        assert_says(str(error.value), [f"{cls.__name__}.{name} is {value}", "must be positive"])
    assert getattr(cls(**{name: 1e-12}), name) == 1e-12


@pytest.mark.parametrize("cls, name, value, allowed", CHOICES)
def test_a_value_that_is_not_among_the_choices_is_refused(cls, name, value, allowed):
    cls(**{name: allowed})
    with pytest.raises(ConfigError) as error:
        cls(**{name: value})
    assert_says(str(error.value), [f"{cls.__name__}.{name} is", value, allowed])


def test_every_refusal_of_the_configs_is_among_these(monkeypatch):
    """A check that is added without a case here fails: the lines that refuse are compared with those in the source."""
    modules = [importlib.import_module(f"mtp_jax.{name}") for name in CHECKING]
    checks = {}
    for module in modules:
        calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
        checks |= {
            (module.__file__, call.lineno): call.end_lineno
            for call in calls
            if getattr(call.func, "id", "") == "require"
        }
    refused, require = set(), config_module.require

    def spy(ok, message):
        frame = sys._getframe(1)
        file, line = frame.f_code.co_filename, frame.f_lineno
        if not ok:
            refused.update(
                (path, first) for (path, first), last in checks.items() if path == file and first <= line <= last
            )
        require(ok, message)

    for module in modules:
        monkeypatch.setattr(module, "require", spy)
    wrong = [(ModelConfig, "d_model", 0, 1), (ModelConfig, "norm_eps", 0, 1), (OptimizerConfig, "beta1", 2, 1)]
    wrong += CHOICES
    builds = [build for build, _ in REFUSED.values()]
    for build in builds + [functools.partial(cls, **{name: value}) for cls, name, value, _ in wrong]:
        with contextlib.suppress(ConfigError):
            build()
    assert refused == set(checks) and len({file for file, _ in checks}) == len(CHECKING)


def test_what_fits_is_accepted():
    assert ModelConfig(d_model=250, num_heads=4, head_dim=64).head_width == 64
    assert ModelConfig(d_model=64, num_heads=4).head_width == 16
    for factors in ("shared", "lowrank"):
        check_head(HeadConfig(factors=factors, shortlist=9))
    check_head(HeadConfig(nll_weight=0, kl_weight=1, target="ntp", encoder="token"))
    ToTheModel.check(HeadConfig("drafter", target="ntp"))
    TrainConfig(ModelConfig(vocab_size=257)).with_tokenizer(257)
    on_mesh(2, 2, 2, batch=8, parts=2)
    on_mesh(1, 1, 2, factors="shared")
    decode([0, 31] * 4, seed=2**32 - 1)
    for k in (None, 0, 3):
        decode([0], [31] * 8, k=k, temperature=0.7, seed=2**32 - 2)


def test_the_head_that_the_page_gives_for_the_default_is_the_default():
    text = (REPOSITORY / "docs" / "concepts" / "joint-heads.md").read_text()
    (line,) = re.findall(r"^(HeadConfig\(.+\))$", text, re.MULTILINE)
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call) and not call.args and len(call.keywords) >= 5
    assert HeadConfig(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords}) == HeadConfig()


def test_the_verifier_is_greedy_only_without_temperature():
    rules = [DecodeConfig(1, temperature).rule for temperature in (0, 0.0, 0.1, 2)]
    assert rules == ["greedy", "greedy", "coupled", "coupled"]
    assert DecodeConfig(1, 0.0, verifier="coupled").rule == "coupled"


@pytest.mark.parametrize("factors", ["shared", "lowrank"])
def test_a_width_that_tensor_does_not_divide_is_accepted(factors):
    """It is split over fsdp alone (`sharding.py`)."""
    on_mesh(2, 1, 4, d_model=18, head_dim=4, num_kv_heads=4, factors=factors)  # raises nothing


@pytest.mark.parametrize(
    "sizes, devices, shape",
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 2, 4), 8, (1, 2, 4)), ((-1, 4, 2), 8, (1, 4, 2))],
)
def test_the_mesh_uses_every_device(sizes, devices, shape):
    assert MeshConfig(*sizes).shape(devices) == shape
