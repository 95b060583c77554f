"""The benchmark of data."""

import dataclasses

from mtp_jax.bench.config import DataBenchConfig
from mtp_jax.bench.data import bench_data
from mtp_jax.data.config import DataConfig
from support import tiny


def test_the_data_benchmark_measures_what_training_reads(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_bytes(bytes(range(32, 120)) * (4 + i))
    config = tiny.train_config(tiny.model_config(vocab_size=264))
    data = DataConfig("text", f"{tmp_path}/*.txt", seq_len=16, batch_size=8, cache_dir=str(tmp_path / "cache"))
    config, bench = dataclasses.replace(config, data=data), DataBenchConfig(seconds=0.05, steps=2)
    found = bench_data(config, bench)
    assert found["prepare_bytes_per_second"] > 0 and found["read_tokens_per_second"] > 0
    assert 0 < found["wait_seconds"] < found["step_seconds"] and 0 < found["wait_fraction"] < 1
    (store,) = (tmp_path / "cache" / "tokens").iterdir()
    data = dataclasses.replace(data, source=str(store), files="")
    assert bench_data(dataclasses.replace(config, data=data), bench)["prepare_bytes_per_second"] is None
