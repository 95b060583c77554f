"""The launchers: what a dry run shows, what is refused, and that the pages tell what there is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPOSITORY
from support.launchers import (
    DIRECTORY,
    FILES,
    LAUNCH,
    MANIFESTS,
    REQUIRED,
    SCRIPTS,
    SUBCOMMAND,
    SWEEPS,
    documented,
    dry,
    flag,
)

# What a dry run shows


def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR"]
        + [LAUNCH / file for file in FILES],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in LAUNCH.iterdir()} == {*FILES, *MANIFESTS, "Dockerfile"}, "a file that no test knows"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_needs_nothing_and_shows_placeholders(script):
    status, output, errors = dry(script, "--dry-run")
    assert (status, errors) == (0, "")
    assert dry(script, DRY_RUN="1") == (0, output, "")
    assert all(f"<{name}>" in output for name in REQUIRED[script])
    program = "mtp-jax train <EXPERIMENT> --run-dir <RUN_DIR> --auto-resume"
    if script in SWEEPS:
        program = "mtp-jax sweep <EXPERIMENT> --dir <SWEEP_DIR> --only"
    assert program in re.sub('[",\\[\\]]', "", output) and "JAX_COMPILATION_CACHE_DIR" in output


COMMANDS = {
    "local_multi.sh": ["MTP_JAX_COORDINATOR=127.0.0.1:<FREE_PORT>", "MTP_JAX_PROCESS_ID=1", "MTP_JAX_NUM_PROCESSES=2"],
    "slurm.sbatch": ["sbatch --nodes=1", "--requeue", "srun ", "MTP_JAX_COORDINATOR=auto", "scontrol requeue"],
    "tpu_vm.sh": [
        *("queued-resources create", "tpu-vm scp", "--worker=all", "tpu_worker.sh start", "tpu_worker.sh log"),
        *("tpu_worker.sh stop", "queued-resources describe", "queued-resources delete", "MTP_JAX_COORDINATOR=auto"),
    ],
    "gke.sh": ["docker build", "docker push", "kubectl apply", "kubectl --namespace=default logs", "delete jobset/"],
    "sweep.sbatch": [
        *("--array=<FIRST>%8", "--array=<OTHERS>%8", "--dependency=afterok:<JOB_OF_FIRST>", "srun --ntasks=1"),
        *("--dependency=afterany:<JOB_OF_OTHERS>", "--collect", "requeue <SLURM_ARRAY_JOB_ID>_<SLURM_ARRAY_TASK_ID>"),
    ],
    "gke_sweep.sh": ["docker build", "docker push", "kubectl apply", "--collect", "default logs", "delete jobset/"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_dry_run_shows_every_command(script):
    output = dry(script, "--dry-run")[1]
    assert [command for command in COMMANDS[script] if command not in output] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_flags_and_variables_and_all_are_documented_and_read(script):
    names = documented(script)
    trap = f'trap "echo \\${{SETTINGS[*]}}" EXIT; source {shlex.quote(str(LAUNCH / script))} --dry-run'
    known = subprocess.run(["bash", "-c", trap], capture_output=True, text=True).stdout.splitlines()[-1].split()
    assert sorted(names) == sorted(known + ["LAUNCH_DIR"] * script.endswith(".sbatch"))
    text = "".join((LAUNCH / file).read_text() for file in (script, "common.sh", "gke_common.sh", *MANIFESTS))
    assert [name for name in names if not re.search(rf"\${{?{name}\b", text)] == [], "nothing reads these"

    special = {"DRY_RUN": "1", "SPOT": "1", "DEVICES": "gpu", "TPU_TOPOLOGY": "4x4"}
    special |= dict.fromkeys(DIRECTORY.values(), "gs://bucket/it's")
    words = {"TRAIN_OPTIONS": "--steps 9", "SBATCH_FLAGS": "--account=me", "CREATE_FLAGS": "--labels=a=b"}
    values = {name: special.get(name) or words.get(name) or str(11 + i) for i, name in enumerate(known)}
    by_flag = dry(script, *(f"{flag(name)}={value}" for name, value in values.items()))
    assert by_flag[0] == 0, by_flag
    assert dry(script, **values) == by_flag
    rest = {name: value for name, value in values.items() if value[:2] == "--" or name == "DRY_RUN"}
    spaced = (arg for name, value in values.items() if name not in rest for arg in (flag(name), value))
    assert dry(script, *spaced, **rest) == by_flag
    assert dry(script, *(f"{flag(n)}={v}" for n, v in values.items()), **dict.fromkeys(values, "0")) == by_flag
    later = r"<(SLURM_\w+|ARCHIVE|FIRST|OTHERS|COMPLETIONS|JOB_OF_\w+)>|<<'EOF'"
    assert "<" not in re.sub(later, "", by_flag[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script(script):
    status, output, errors = dry(script, "--help")
    assert (status, errors) == (0, "") and f"launch/{script}" in output
    assert output.splitlines()[0] == (LAUNCH / script).read_text().splitlines()[1].removeprefix("# ")
    assert "#SBATCH" not in output and "set -euo" not in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_refused_with_status_2(script):
    status, output, errors = dry(script, *SUBCOMMAND.get(script, []))
    assert (status, output) == (2, "")
    assert all(f"{flag(name)} ({name})" in errors for name in REQUIRED[script])
    directory = flag(DIRECTORY[script])
    for mistake, answer in (
        ([directory[:-1], "x"], f"there is no setting {directory[:-1]}"),
        ([directory], f"{directory} needs a value"),
        ([directory, "--dry-run"], f"{directory} needs a value"),
        (["no-such-word"], "no-such-word"),
        (["--retries", "some"], "RETRIES is 'some'; it must be a whole number"),
        (["--dry-run", "--dry-run=yes"], "DRY_RUN is 'yes'"),
    ):
        status, output, errors = dry(script, "--experiment", "e.py", f"{directory}=gs://b/r", *mistake)
        assert status == 2 and answer in errors, (mistake, errors)


@pytest.mark.parametrize(
    ("script", "args", "answer"),
    [
        ("local_multi.sh", ["--processes", "0"], "PROCESSES is 0"),
        ("local_multi.sh", ["--devices", "npu"], "DEVICES is 'npu'; it must be one of: cpu gpu"),
        ("tpu_vm.sh", ["run", "--tpu-name=t", "--zone=z", "--run-dir=here"], "it must be gs://"),
        ("tpu_vm.sh", ["create", "--tpu-name=t", "--zone=z"], "--accelerator-type (ACCELERATOR_TYPE)"),
        ("tpu_vm.sh", ["--tpu-name=t", "--zone=z"], "give one subcommand: create install"),
        ("gke.sh", ["render", "--run-dir=here"], "it must be gs://"),
        ("gke.sh", ["render", "--tpu-topology", "4x"], "TPU_TOPOLOGY is '4x'"),
        ("gke.sh", ["render", "--tpu-topology", "3x3"], "9 chips, which are no multiple of CHIPS_PER_HOST, 4"),
        ("gke.sh", ["render", "--devices=gpu"], "--gpu-accelerator (GPU_ACCELERATOR), --hosts (HOSTS)"),
    ],
)
def test_what_a_launcher_alone_refuses(script, args, answer):
    given = ["--job-name=j", "--image=i", "--tpu-accelerator=a"] if script == "gke.sh" else []
    given += [] if "--tpu-topology" in args or script != "gke.sh" else ["--tpu-topology=4x4"]
    status, output, errors = dry(script, "--experiment=e.py", "--run-dir=gs://b/r", *given, *args)
    assert (status, output) == (2, "") and answer in errors


def test_a_dry_run_is_what_runs(box):
    box.plan("0")
    args = ["--", "--steps", "7", "--name", 'it\'s a "name" $HOME']
    line = box.run("local.sh", "--dry-run", *args, TRAIN_OPTIONS="--seed 3")[1]
    shown = subprocess.run(["bash", "-c", line], env=box.env, capture_output=True, text=True).stdout
    (box.plans / "tries.0").unlink()
    assert box.run("local.sh", *args, TRAIN_OPTIONS="--seed 3") == (0, shown)
    assert shown == 'process 0 try 1 --auto-resume --seed 3 --steps 7 --name it\'s a "name" $HOME\n'


# The pages


@pytest.mark.parametrize("page", ["clusters.md", "hangs.md"])
def test_what_the_pages_tell_you_to_type_exists(page):
    text = (REPOSITORY / "docs" / "guides" / page).read_text().replace("\\\n", " ")
    settings = {name for script in SCRIPTS for name in documented(script)}
    for names in re.findall(r"^    export (.*)", text, re.MULTILINE):
        assert {word.split("=")[0] for word in names.split()} <= settings, names
    commands = re.findall(r"launch/([\w.]+)([^`\n#]*)", text)
    assert len(commands) >= 3
    for script, rest in commands:
        if script not in SCRIPTS:
            assert (LAUNCH / script).exists(), script
            continue
        own = rest.split(" -- ")[0]
        flags = set(re.findall(r"(?<= )--[a-z-]+(?=[ =]|$)", re.sub("'[^']*'", "", own)))
        assert flags <= {flag(name) for name in documented(script)} | {"--help"}, (script, own)
        if script in SUBCOMMAND and "--dry-run" not in own:
            word = own.split()[0].strip(",;")
            assert re.search(rf"^  {word} |   {word} ", dry(script, "--help")[1], re.MULTILINE), (script, own)
