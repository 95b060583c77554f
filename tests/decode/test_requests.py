"""Requests that cannot be decoded are refused with their numbers."""

import pytest

from mtp_jax.decode.config import DecodeConfig
from mtp_jax.decode.decoding import Decoding
from mtp_jax.decode.generate import generate, stream
from mtp_jax.validate import ConfigError
from support import tiny
from support.decoding import NEW


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "Prompt 1 is empty"),
        ([[1] * 120], {}, r"Prompt 0 has 120 tokens and max_new_tokens is 16, 136 together.* context_length is 128"),
        ([[1], [3, 32]], {}, r"Prompt 1 has token ids 3\.\.32; the vocabulary is 0\.\.31"),
        ([[-1, 4]], {}, r"Prompt 0 has token ids -1\.\.4; the vocabulary is 0\.\.31"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[1]], {"temperature": -0.5}, r"temperature is -0\.5; it must be at least 0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, r"top_p is 0\.0; it must lie in \(0, 1\]"),
        ([[1]], {"top_p": 1.5}, r"top_p is 1\.5; it must lie in \(0, 1\]"),
        ([[1]], {"top_k": -2}, "top_k is -2; it must be at least 0"),
        ([[1]], {"k": 4}, r"k is 4 and the head's window is 4; k must lie in 0\.\.3"),
        ([[1]], {"k": -1}, r"k is -1 and the head's window is 4; k must lie in 0\.\.3"),
        ([[1]], {"verifier": "greedy", "temperature": 0.5}, r"verifier is greedy and temperature is 0\.5.*Use coupled"),
        (
            [[1]],
            {"verifier": "cuopled"},
            "verifier is 'cuopled'; did you mean 'coupled'?.*block, coupled, greedy, token",
        ),
        ([[1]], {"k": "best"}, r"DecodeConfig.k is 'best'; it must be an integer or .* or 'auto'"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_input_is_refused_with_its_numbers(model, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, **{"max_new_tokens": NEW, **options})


def test_a_batch_that_the_mesh_does_not_divide_is_refused(models):
    with tiny.mesh(data=2, fsdp=2), pytest.raises(ConfigError, match="has 3 prompts and the mesh 4 data x fsdp dev"):
        Decoding(models.ready, [[1]] * 3, DecodeConfig(max_new_tokens=4))


@pytest.mark.parametrize("name", ["ready", "stacked"])
def test_without_a_mesh_the_user_is_told_what_to_write(models, name):
    model = getattr(models, name)
    with pytest.raises(ConfigError, match=r"No mesh in scope.*jax\.set_mesh"):
        generate(model, [[1]], max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"No mesh in scope.*jax\.set_mesh"):
        next(stream(model, [1], DecodeConfig(4)))
