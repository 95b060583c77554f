"""k = 0 against the loop of `experiments/plain_loop.py`, which knows nothing of drafts."""

import runpy
from types import SimpleNamespace

import numpy as np
import pytest

from support import REPOSITORY, tiny
from support.decoding import LAWS, PROMPTS, build

plain = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "experiments" / "plain_loop.py")))
ROWS = ["tokens_BS", "logp_BS", "finite_B", "length_B", "done_B", "forwards_B"]


@pytest.fixture(scope="module")
def model():
    with tiny.mesh() as mesh:
        yield build(mesh).ready


@pytest.mark.parametrize("laws", [None, LAWS], ids=["greedy", "sampled"])
def test_without_drafts_the_loop_is_the_plain_loop(model, laws):
    """The same rows, by no more operations and the same products. Rows end by stops, by limits and by the budget."""
    options = dict(max_new_tokens=[16, 3, 11, 1], stop_tokens=[7, 19], seed=2)
    if laws:
        options |= dict(zip(("temperature", "top_k", "top_p"), map(list, zip(*laws, strict=True)), strict=True))
    decoding, loops = plain.programs(model, PROMPTS, **options)
    for budget in 4, 100:
        decoding.prefill()
        rows = plain.rows_of(decoding.state)
        decoding.prefill()
        expected, out = (
            loops[name](model, given, decoding.sampling, decoding.stops_n, np.int32(budget))
            for name, given in (("plain", rows), ("k = 0", decoding.state))
        )
        committed = np.arange(out.tokens_BS.shape[1])[None] < np.asarray(out.length_B)[:, None]
        for name in ROWS:
            a, b = (np.asarray(getattr(r, name)) for r in (out, expected))
            a, b = (np.where(committed, x, 0) for x in (a, b)) if name.endswith("_BS") else (a, b)
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert np.asarray(out.done_B).all() and len(set(np.asarray(out.length_B).tolist())) == 4
    counts = {name: plain.operations(loop.as_text()) for name, loop in loops.items()}
    assert counts["k = 0"]["dot"] == counts["plain"]["dot"] > 0
    assert sum(counts["k = 0"].values()) <= sum(counts["plain"].values())


def test_drafts_cost_operations(model):
    """The count sees what it is meant to see."""
    _, loops = plain.programs(model, PROMPTS[:1], max_new_tokens=8)
    plain_count = sum(plain.operations(loops["plain"].as_text()).values())
    decoding = plain.Decoding(model, PROMPTS[:1], plain.DecodeConfig(max_new_tokens=8, k=1))
    args = model, decoding.state, decoding.sampling, decoding.stops_n, np.int32(0)
    drafting = plain.run.lower(decoding.plan, *args).compile().as_text()
    assert sum(plain.operations(drafting).values()) > 1.1 * plain_count
