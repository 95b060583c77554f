"""A model without a head: its own next token is all there is."""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import Decoding
from support import tiny


def make():
    head = tiny.head_config(kind="none", window=1, circuit="independent", rank=1, target="ntp", balance="none")
    return tiny.train_config(tiny.model_config(num_tokens=30), head)


def test_its_loss_is_that_of_the_next_token():
    config = make()
    with tiny.mesh():
        model = tiny.make_model(config)
        batch = tiny.make_batch(tiny.train_config(tiny.model_config(vocab_size=30), config.head))
        weights_BTW = batch["valid_BTW"] / jnp.sum(batch["valid_BTW"])

        @jax.jit
        def everything(model, batch, weights_BTW):
            seen = model.see(batch["tokens_BT"], batch["segments_BT"])
            likelihood_BT1 = model.head.log_likelihood(seen, batch["targets_BTW"])
            return model.loss(batch, weights_BTW), likelihood_BT1, model.target(seen)[0]

        (loss, aux), likelihood_BT1, logp_BTV = jax.device_get(everything(model, batch, weights_BTW))
    own_BT1 = np.take_along_axis(logp_BTV, np.asarray(batch["targets_BTW"]), axis=-1)
    np.testing.assert_allclose(likelihood_BT1, own_BT1, atol=1e-5)
    want = -np.sum(own_BT1 * np.asarray(weights_BTW))
    np.testing.assert_allclose([loss, aux["loss_offset"][0], aux["loss_first_token"]], want, rtol=1e-5)
    assert aux["loss_offset"].shape == (1,)


def test_it_decodes_without_drafts():
    with tiny.mesh():
        decoder = for_decoding(tiny.make_model(make()))
        for k in (None, 0):
            decoding = Decoding(decoder, [[1, 2, 3]], DecodeConfig(6, k=k))
            decoding.advance()
            out = decoding.result()
            assert out.k == 0 and len(out.tokens[0]) == 6 and out.forwards[0] == 5
