"""The page on extending: its examples, one line in a registry each, train, reload and decode."""

import dataclasses
import re
import sys
import types

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax import DataConfig, HeadConfig, generate
from mtp_jax.data.sources import SOURCES
from mtp_jax.data.tokenizers import TOKENIZERS
from mtp_jax.decode.verify import VERIFIERS
from mtp_jax.heads.circuits import CIRCUITS
from mtp_jax.heads.factors import FACTORS
from mtp_jax.heads.registry import HEADS
from mtp_jax.parameters import PARAMETERS
from mtp_jax.train.loop import train
from support import REPOSITORY, tiny

REGISTRIES = {
    "heads": (HEADS, {"bigram"}),
    "factors": (FACTORS, {"diagonal"}),
    "circuits": (CIRCUITS, {"forgetful"}),
    "verifiers": (VERIFIERS, {"inverse"}),
    "sources": (SOURCES, {"counting"}),
    "tokenizers": (TOKENIZERS, {"indent"}),
    "parameters": (PARAMETERS, {"bigram_DD", "scale_DRW"}),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """What the page's blocks register, taken out again."""
    page, before = types.ModuleType("extending"), {name: dict(found) for name, (found, _) in REGISTRIES.items()}
    sys.modules[page.__name__] = page
    text = (REPOSITORY / "docs" / "extending.md").read_text()
    try:
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            exec(block, vars(page))
        yield
    finally:
        del sys.modules[page.__name__]
        for name, (found, _) in REGISTRIES.items():
            found.clear()
            found.update(before[name])


def test_each_example_registers_what_it_says():
    for name, (found, added) in REGISTRIES.items():
        assert added <= found.keys(), name


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(window=3, rank=2, circuit="forgetful", factors="diagonal"),
        HeadConfig(window=3, kind="bigram", target="ntp"),
    ],
    ids=["a factor and a circuit", "a head"],
)
def test_a_run_of_them_trains_reloads_and_decodes_losslessly(head, tmp_path):
    data = DataConfig("counting", seq_len=16, batch_size=8, cache_dir=str(tmp_path / "cache"), valid_fraction=0.3)
    config = tiny.train_config(tiny.model_config(vocab_size=264), head, steps=2)
    metrics = train(dataclasses.replace(config, data=dataclasses.replace(data, tokenizer="indent")), tmp_path / "run")
    assert np.isfinite(metrics["loss"])
    run = mtp_jax.load(tmp_path / "run")
    text = "1 and    2"
    assert run.tokenizer.decode(run.tokenizer.encode(text)) == text and 257 in run.tokenizer.encode(text)
    with jax.set_mesh(run.mesh):
        plain, drafted = (
            generate(run.decoder, [[49, 32]], max_new_tokens=12, temperature=0.8, verifier="inverse", k=k)
            for k in (0, 2)
        )
    np.testing.assert_array_equal(plain.tokens, drafted.tokens)
