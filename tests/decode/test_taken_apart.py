"""A model that only decodes is taken apart: the same decoder, and of the model's weights no second copy."""

import gc
import weakref

import jax
import numpy as np
import pytest

from mtp_jax.decode.decoder import dtypes_for_decoding, for_decoding
from mtp_jax.parameters import last_name
from mtp_jax.state import split
from support import tiny


def make(factors="full", dtype="float32", **changes):
    return tiny.make_model(
        tiny.train_config(tiny.model_config(dtype=dtype, **changes), tiny.head_config(factors=factors))
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize(("factors", "dtype"), [("full", "float32"), ("lowrank", "bfloat16"), ("lora", "bfloat16")])
def test_the_decoder_is_the_same(factors, dtype, shape):
    with tiny.mesh(*shape):
        kept, taken = for_decoding(make(factors, dtype)), for_decoding(make(factors, dtype), keep=False)
        assert jax.tree.structure(kept) == jax.tree.structure(taken)
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(taken), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype and a.sharding == b.sharding


def test_one_weight_at_a_time_is_there_twice(monkeypatch):
    held, ready = [], jax.block_until_ready

    def record(tree):
        held.append(live() - before)
        return ready(tree)

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    with tiny.mesh():
        before = live()
        model = make(num_layers=8, d_model=64, d_ff=192, vocab_size=64)
        weights = [(weakref.ref(weight), weight.nbytes) for weight in jax.tree.leaves(model.trunk.blocks)]
        size = live() - before
        gc.collect()
        monkeypatch.setattr(jax, "block_until_ready", record)
        decoder = for_decoding(model, keep=False)
        assert not any(weight() for weight, _ in weights)
        assert len(held) == len(weights) + 8
        assert max(held) <= size + max(nbytes for _, nbytes in weights)
        del model
        assert live() - before < 1.1 * size
    assert decoder.config.num_layers == len(decoder.trunk.blocks) == 8


def test_what_decoding_casts_is_cast_on_loading():
    """That is the trunk and the embedding; what the head makes of its own is made of what it was given."""
    with tiny.mesh():
        params = split(make("lowrank", "bfloat16", qk_norm=True))[1]
        found = jax.tree_util.tree_leaves_with_path(dtypes_for_decoding(jax.eval_shape(lambda: params), "bfloat16"))
    names = {last_name(path) for path, leaf in found if leaf.dtype == "bfloat16"}
    assert names == {"embed_VD", "wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "w_gate_DF", "w_up_DF", "w_down_FD"}
    assert {str(leaf.dtype) for path, leaf in found if path[0].key == "head"} == {"float32"}
