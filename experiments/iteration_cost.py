"""What an iteration of the decode loop costs, by its number of drafts and its dtype, for a model of random parameters.

    python experiments/iteration_cost.py                           # 8 layers of 768, V = 4,096, lowrank R = 8, W = 4
    python experiments/iteration_cost.py --d 512 --layers 3 --ff 1024 --v 264 --rank 4 --factors full --temperature 0.7

All widths and dtypes run in turn; a cost is the median of the rounds, and a ratio is to the fastest iteration without
drafts of any dtype. Tokens per forward over that ratio is the speed-up of a model whose drafts are accepted so often.

Cost: about a minute on two CPU cores.
Expect: a ratio of 1.3 with 3 drafts in bfloat16 where the processor has AMX; without it float32 is the faster.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np
from flax import nnx

import mtp_jax
from mtp_jax import DecodeConfig, HeadConfig, ModelConfig
from mtp_jax.decode.decoder import for_decoding
from mtp_jax.decode.decoding import Decoding
from mtp_jax.heads.factors import FACTORS
from mtp_jax.language_model import LanguageModel, in_dtype

DTYPES = "float32", "bfloat16"
PROMPT, NEW = 96, 256


def measure(
    model: ModelConfig, head: HeadConfig, batch: int, temperature: float, rounds: int = 7, forwards: int = 12
) -> dict[tuple[str, int], float]:
    """Seconds of an iteration by (dtype, k), on the mesh in scope."""
    made = LanguageModel(model, head, rngs=nnx.Rngs(0))
    models = {dtype: for_decoding(in_dtype(made, dtype)) for dtype in DTYPES}  # type: ignore[arg-type]
    prompts = [np.arange(PROMPT) % model.vocab_size] * batch
    decodings = {
        (dtype, k): Decoding(decoder, prompts, DecodeConfig(NEW, temperature, k=k))
        for dtype, decoder in models.items()
        for k in range(head.window)
    }
    for decoding in decodings.values():
        decoding.advance(1)  # compiles
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in decodings}
    for _ in range(rounds):
        for key, decoding in decodings.items():
            decoding.prefill()
            begin = time.perf_counter()
            decoding.advance(forwards)
            decoding.wait()
            seconds[key].append((time.perf_counter() - begin) / int(np.max(decoding.state.forwards_B)))
    return {key: float(np.median(found)) for key, found in seconds.items()}


def main() -> None:
    """Print a line for each dtype and number of drafts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d": 768, "ff": 2048, "layers": 8, "v": 4096, "rank": 8, "window": 4, "factor-width": 64, "batch": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--factors", choices=list(FACTORS), default="lowrank")
    parser.add_argument("--temperature", type=float, default=0.0)
    a = parser.parse_args()
    heads = a.d // 64
    model = ModelConfig(
        vocab_size=a.v, d_model=a.d, d_ff=a.ff, num_layers=a.layers, num_heads=heads, num_kv_heads=heads
    )
    head = HeadConfig(window=a.window, rank=a.rank, factors=a.factors, factor_width=a.factor_width)
    with jax.set_mesh(mtp_jax.make_mesh()):
        seconds = measure(model, head, a.batch, a.temperature)
    fastest = min(value for (_, k), value in seconds.items() if k == 0)
    for (dtype, k), value in seconds.items():
        print(f"{dtype:8}  k = {k}  {value * 1e3:7.3f} ms  {value / fastest:.2f}")


if __name__ == "__main__":
    main()
