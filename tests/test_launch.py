"""The launchers: what a dry run shows, what is refused, and what becomes of a program that ends, fails, hangs or saves.

The program is a stand-in that does what its plan says: a file for each process, a line for each time it is started.
SLURM's and Google's commands are stand-ins too, which do on this machine what theirs do elsewhere.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
SWEEPS = ["sweep.sbatch", "gke_sweep.sh"]
SCRIPTS = ["local.sh", "local_multi.sh", "slurm.sbatch", "tpu_vm.sh", "gke.sh", *SWEEPS]
MANIFESTS = ["gke.yaml", "gke_sweep.yaml"]
FILES = [*SCRIPTS, "common.sh", "gke_common.sh", "tpu_worker.sh"]
DIRECTORY = {name: "SWEEP_DIR" if name in SWEEPS else "RUN_DIR" for name in SCRIPTS}
REQUIRED = {name: ["EXPERIMENT", DIRECTORY[name]] for name in SCRIPTS}
REQUIRED["tpu_vm.sh"] = ["TPU_NAME", "ZONE"]
for _name in ("gke.sh", "gke_sweep.sh"):
    REQUIRED[_name] = ["JOB_NAME", "IMAGE", *REQUIRED[_name]]
SUBCOMMAND = {"tpu_vm.sh": ["run"], "gke.sh": ["apply"], "gke_sweep.sh": ["apply"]}

PROGRAM = """#!/usr/bin/env bash
# Stand-in for mtp-jax: does line n of $PLANS/<process> the nth time it is started, and exits with the last word of it.
me=${MTP_JAX_PROCESS_ID:-0}
n=$(($(cat "$PLANS/tries.$me" 2>/dev/null || echo 0) + 1))
echo "$n" >"$PLANS/tries.$me"
while [[ $1 != --run-dir ]]; do shift; done
echo "process $me try $n ${*:3}"
for word in $(sed -n "${n}p" "$PLANS/$me"); do
  case $word in
    step=*) mkdir -p "$2/checkpoints/${word#*=}" ;;
    env=*) name=${word#*=} && echo "$name is ${!name}" ;;
    run=*) eval "${word#*=}" ;;
    TERM=*|INT=*) trap "echo process $me got ${word%=*}; exit ${word#*=}" "${word%=*}" ;;
    deaf) trap '' TERM INT ;;
    forever) touch "$PLANS/ready.$me"; for _ in {1..1200}; do sleep 0.05; done; exit 99 ;;
    after=*) sleep "${word#*=}" ;;
    *) exit "$word" ;;
  esac
done
"""


class Box:
    """A directory with the stand-in program, its plans, and a PATH that other stand-ins can be put on."""

    def __init__(self, path):
        self.path, self.plans, self.run_dir, self.bin = path, path / "plans", path / "runs" / "mine", path / "bin"
        for folder in (self.plans, self.bin):
            folder.mkdir()
        self.command("program", PROGRAM)
        self.env = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(path),
            "PLANS": str(self.plans),
            "EXPERIMENT": "experiment.py",
            "RUN_DIR": str(self.run_dir),
            "MTP_JAX_PROGRAM": str(self.bin / "program"),
            "RESTART_DELAY": "0",
        }

    def command(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def plan(self, *lines, process=0):
        (self.plans / str(process)).write_text("\n".join(lines) + "\n")

    def tries(self, process=0):
        """How often the program was started."""
        file = self.plans / f"tries.{process}"
        return int(file.read_text()) if file.exists() else 0

    def start(self, script, *args, launch=LAUNCH, **env):
        command = ["bash", str(launch / script), *args]
        # A session of its own, so that nothing is signalled but what the launcher signals.
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *args, **options):
        """(status, output) of a launcher that ends by itself."""
        return end(self.start(script, *args, **options))

    def ready(self, processes=1):
        """Wait until so many processes are where their plan says `forever`."""
        until(lambda: all((self.plans / f"ready.{i}").exists() for i in range(processes)))

    def log(self, process):
        return (self.path / "logs" / "mine" / f"process-{process}.log").read_text()


def end(process, timeout=60):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def until(what, seconds=30):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "this does not happen"
        time.sleep(0.02)


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def dry(script, *args, **env):
    """(status, standard output, standard error) of a launcher in an environment of nothing but `env`."""
    done = subprocess.run(
        ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in env.items()), "bash", str(LAUNCH / script), *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
    )
    return done.returncode, done.stdout, done.stderr


def flag(name):
    return "--" + name.lower().replace("_", "-")


def documented(script):
    """The settings that the head of a script lists."""
    head = dry(script, "--help")[1]
    return re.findall(r"^  ([A-Z][A-Z0-9_]+)  *\S", head, re.MULTILINE)


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


# When a run is started again


def test_status_75_is_started_again_until_it_is_done(box):
    box.plan("step=1 75", "75", "env=JAX_COMPILATION_CACHE_DIR 0")
    status, output = box.run("local.sh")
    assert (status, box.tries()) == (0, 3)
    assert f"JAX_COMPILATION_CACHE_DIR is {box.path}/.cache/mtp_jax/xla" in output
    assert "restart 1 of 1000, newest checkpoint 1" in output


def test_restarts_are_bounded(box):
    box.plan("75", "75", "75", "75")
    status, output = box.run("local.sh", "--max-restarts", "2")
    assert (status, box.tries()) == (75, 3) and "restarted 2 times (MAX_RESTARTS)" in output


def test_a_failure_stops_one_process_and_status_is_its_own(box):
    box.plan("3", "0")
    status, output = box.run("local.sh")
    assert (status, box.tries()) == (3, 1) and "failed with status 3, failure 1 in a row (RETRIES = 0)" in output


def test_failures_are_repeated_only_so_often_without_a_new_checkpoint(box):
    box.plan("1", "134", "step=9 1", "1", "1", "0")
    status, output = box.run("local.sh", "--retries", "2")
    assert (status, box.tries()) == (1, 5), output
    assert output.count("retry 1 of 2") == 2 and output.count("retry 2 of 2") == 2, "step 9 begins a new count"
    assert "failed with status 1, failure 3 in a row, newest checkpoint 9" in output


@pytest.mark.parametrize("status", [2, 126, 127, 130, 143])
def test_what_would_fail_the_same_again_is_not_repeated(box, status):
    box.plan(str(status), "0")
    assert box.run("local.sh", "--retries", "5")[0] == status and box.tries() == 1


def test_partial_checkpoints_are_no_progress(box):
    box.plan("step=2 1", "step=3.orbax-checkpoint-tmp 1", "1")
    output = box.run("local.sh", "--retries", "1")[1]
    assert box.tries() == 2 and "failure 2 in a row, newest checkpoint 2" in output


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_reaches_the_program_and_nothing_starts_again(box, name):
    box.plan(f"{name}=75 forever", "0")
    launcher = box.start("local.sh", "--retries", "3")
    box.ready()
    launcher.send_signal(getattr(signal, f"SIG{name}"))
    status, output = end(launcher)
    assert (status, box.tries()) == (75, 1) and f"process 0 got {name}" in output


def test_a_closed_terminal_saves(box):
    box.plan("TERM=75 forever")
    launcher = box.start("local.sh")
    box.ready()
    launcher.send_signal(signal.SIGHUP)
    assert end(launcher)[0] == 75


# Several processes


def test_processes_are_told_who_they_are(box):
    words = "env=MTP_JAX_COORDINATOR env=MTP_JAX_NUM_PROCESSES env=MTP_JAX_PROCESS_ID env=CUDA_VISIBLE_DEVICES"
    for i in range(3):
        box.plan(f"{words} env=JAX_PLATFORMS 0", process=i)
    status, output = box.run("local_multi.sh", "--processes", "3", "--devices", "gpu", "--", "--steps", "4")
    assert status == 0
    logs = [box.log(i) for i in range(3)]
    until(lambda: box.log(0) == output)
    addresses = {re.search(r"COORDINATOR is (127\.0\.0\.1:2\d{4})\n", log)[1] for log in logs}
    assert len(addresses) == 1
    for i, log in enumerate(logs):
        assert log.startswith(f"process {i} try 1 --auto-resume --steps 4\n")
        assert "NUM_PROCESSES is 3\n" in log and f"PROCESS_ID is {i}\n" in log
        assert f"CUDA_VISIBLE_DEVICES is {i}\n" in log and "JAX_PLATFORMS is \n" in log
    assert "process 1" not in output, "only process 0 is on the terminal"


def test_on_the_cpu_no_gpu_is_touched(box):
    box.plan("env=JAX_PLATFORMS 0")
    assert "JAX_PLATFORMS is cpu" in box.run("local_multi.sh", "--processes", "1")[1]


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        (["0", "0"], 0),
        (["75", "75"], 75),
        (["0", "75"], 75),
        (["after=0.6 134", "7"], 7),
        (["9", "after=0.6 134"], 9),
        (["75", "after=0.6 1"], 1),
        (["0", "3"], 3),
    ],
)
def test_the_status_of_several(box, plans, expected):
    for i, plan in enumerate(plans):
        box.plan(plan, process=i)
    assert box.run("local_multi.sh", "--retries", "0", "--max-restarts", "0")[0] == expected


def test_several_are_started_again_together_with_logs_appended(box):
    box.plan("step=3 75", "0")
    box.plan("75", "0", process=1)
    status, output = box.run("local_multi.sh")
    assert status == 0 and "restart 1 of 1000, newest checkpoint 3" in output
    for i in range(2):
        until(lambda i=i: "try 2" in box.log(i))
        assert [line.split(" --")[0] for line in box.log(i).splitlines()] == [f"process {i} try {n}" for n in (1, 2)]


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_reaches_all(box, name):
    for i in range(3):
        box.plan(f"{name}=75 forever", "0", process=i)
    launcher = box.start("local_multi.sh", "--processes", "3")
    box.ready(3)
    launcher.send_signal(getattr(signal, f"SIG{name}"))
    assert end(launcher)[0] == 75
    assert all(f"process {i} got {name}" in box.log(i) and box.tries(i) == 1 for i in range(3))


def test_the_others_have_time_to_end_and_are_killed_after_it(box):
    box.plan("after=1 134")
    box.plan("after=0.3 7", process=1)
    box.plan("deaf forever", process=2)
    begun = time.monotonic()
    status, output = box.run("local_multi.sh", "--processes", "3", "--grace", "2", "--retries", "0")
    assert status == 7 and time.monotonic() - begun > 2
    assert "process 0 ended with status 134" in output, "it ended by itself"
    assert "process 2 has not ended in 2 s (GRACE): killed" in output and "process 2 ended with status 137" in output


# SLURM

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 exec "$@"
"""
# SLURM runs a copy of the script from a spool directory, and again where it is requeued.
SBATCH = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  [[ $1 != --export=ALL,* ]] || export "${1#--export=ALL,}"
  shift
done
mkdir -p spool && cp "$1" spool/slurm_script && shift
export SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0
while rm -f requeued; bash spool/slurm_script "$@"; status=$?; [[ -e requeued ]]; do ((SLURM_RESTART_COUNT++)); done
exit $status
"""


@pytest.fixture
def slurm(box):
    box.command("srun", SRUN)
    box.command("sbatch", SBATCH)
    box.command("scontrol", "#!/usr/bin/env bash\n[[ $* == 'requeue 7' ]] && touch requeued && echo requeued\n")
    return box


def test_slurm_submits_itself_and_is_requeued_until_it_is_done(slurm):
    slurm.plan("step=1 75", "1", "step=2 75", "env=MTP_JAX_COORDINATOR 0")
    status, output = slurm.run("slurm.sbatch", "--", "--steps", "5")
    assert status == 0, output
    assert "process 0 try 4 --auto-resume --steps 5\nMTP_JAX_COORDINATOR is auto" in output
    assert "restart 1 of 1000" in output and "restart 2 of 1000" in output and output.count("requeued\n") == 2
    assert "failed with status 1: retry 1 of 3, newest checkpoint 1" in output, "within the job"


def test_slurm_bounds_what_it_requeues(slurm):
    slurm.plan("75", "75", "75", "75")
    assert slurm.run("slurm.sbatch", "--max-restarts", "2")[0] == 75 and slurm.tries() == 3


def test_a_job_that_slurm_takes_away_is_not_requeued_by_it(slurm):
    slurm.plan("after=1 75", "0")
    job = slurm.start("slurm.sbatch", SLURM_JOB_ID="7")
    until(slurm.tries)
    job.terminate()
    assert end(job)[0] == 75 and slurm.tries() == 1 and not (slurm.path / "requeued").exists()


def test_a_copy_without_common_names_the_way_out(slurm):
    copy = slurm.path / "spool"
    copy.mkdir()
    shutil.copy(LAUNCH / "slurm.sbatch", copy)
    status, output = slurm.run("slurm.sbatch", launch=copy, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR="/nowhere")
    assert status == 2 and "'/nowhere'" in output and "set LAUNCH_DIR" in output
    slurm.plan("0")
    assert slurm.run("slurm.sbatch", launch=copy, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(REPOSITORY))[0] == 0


def test_the_defaults_of_sbatch_are_those_of_the_script():
    """`sbatch slurm.sbatch` and `bash slurm.sbatch` submit the same job."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = {word for line in re.findall("^#SBATCH (.*)", text, re.MULTILINE) for word in line.split()}
    shown = dry("slurm.sbatch", "--dry-run")[1].splitlines()[0].split()
    assert directives == {word for word in shown[1 : shown.index("--requeue") + 1]}


# TPU VMs

GCLOUD = """#!/usr/bin/env bash
# A slice of one worker, whose home is ./worker; ./slice holds its state.
echo "$*" >>calls
for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
case "$*" in
  *'queued-resources list'*) cat slice 2>/dev/null; sed -i s/PROVISIONING/ACTIVE/ slice 2>/dev/null; true ;;
  *'queued-resources create'*) [[ ! -e slice ]] && mkdir worker && echo PROVISIONING >slice ;;
  *'queued-resources delete'*) kill -KILL "$(cat worker/mtp_jax_job/pid)"; rm -r slice worker ;;
  *'tpu-vm scp'*) cp "$5" worker/mtp_jax.tar.gz ;;
  *'tpu-vm ssh'*) [[ $(cat slice) == ACTIVE ]] && cd worker && HOME=$PWD MEGASCALE_NUM_SLICES=4 bash -c "$command" ;;
  *'storage ls'*) ls "$RUNS" 2>/dev/null ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def tpu(box):
    """Launchers in a checkout of their own, which `install` packs."""
    box.command("gcloud", GCLOUD)
    box.command("sudo", '#!/usr/bin/env bash\n[[ ! -e "$PLANS/held" ]] || cat "$PLANS/held"\n')
    box.checkout = box.path / "checkout"
    shutil.copytree(LAUNCH, box.checkout / "launch")
    (box.checkout / ".gitignore").write_text("ignored\n")
    (box.checkout / "ignored").touch()
    subprocess.run(["git", "init", "--quiet", box.checkout], check=True)
    box.env |= {
        **{"TPU_NAME": "mine", "ZONE": "z", "ACCELERATOR_TYPE": "v6e-16", "RUNTIME_VERSION": "v2", "POLL": "0"},
        **{
            "RUN_DIR": "gs://bucket/runs/mine",
            "INSTALL": "touch installed",
            "SETUP": "ls installed >data",
            "RUNS": str(box.path / "runs"),
        },
    }
    return box


def tpu_vm(box, *args, **env):
    return box.run("tpu_vm.sh", *args, launch=box.checkout / "launch", **env)


def calls(box, what):
    return [line for line in (box.path / "calls").read_text().splitlines() if what in line]


def test_watch_creates_installs_runs_and_requeues_until_it_is_done(tpu):
    preempted = f"run=echo${{IFS}}SUSPENDED>{tpu.path}/slice forever"
    tpu.plan("75", preempted, "env=JAX_COMPILATION_CACHE_DIR env=MEGASCALE_NUM_SLICES env=MTP_JAX_COORDINATOR 0")
    status, output = tpu_vm(tpu, "watch", "--spot", "1", "--", "--steps", "5")
    assert status == 0, output
    assert tpu.tries() == 3 and len(calls(tpu, "create mine")) == 2 and len(calls(tpu, "delete mine")) == 1
    assert all("--spot" in line for line in calls(tpu, "create mine"))
    assert "the slice is SUSPENDED" in output and "restart 2 of 1000" in output and "costs money" in output
    worker = tpu.path / "worker"
    log = (worker / "mtp_jax_job" / "log").read_text()
    assert log.startswith("process 0 try 3 --auto-resume --steps 5\n")
    assert "CACHE_DIR is gs://bucket/runs/xla_cache\n" in log and "COORDINATOR is auto\n" in log
    assert "MEGASCALE_NUM_SLICES is \n" in log, "what an earlier slice left behind is gone"
    assert (worker / "mtp_jax" / "data").read_text() == "installed\n" and not (worker / "mtp_jax" / "ignored").exists()
    assert all("--worker=all" in line for line in calls(tpu, "tpu_worker.sh start") + calls(tpu, "scp"))


def test_watch_stops_when_the_run_fails(tpu):
    tpu.plan("1", "1", "1")
    status, output = tpu_vm(tpu, "watch", "--retries", "1")
    assert (status, tpu.tries()) == (1, 2) and "failure 2 in a row" in output
    assert not calls(tpu, "delete mine"), "nothing is deleted that may be looked at"


def test_watch_stops_when_installing_fails(tpu):
    assert tpu_vm(tpu, "watch", "--retries", "1", INSTALL="false")[0] == 1
    assert len(calls(tpu, "scp")) == 2 and tpu.tries() == 0


def test_run_logs_status_and_stop(tpu):
    tpu.plan("TERM=75 forever")
    for step in ("create", "install"):
        (tpu.path / "slice").exists() and (tpu.path / "slice").write_text("ACTIVE")
        assert tpu_vm(tpu, step)[0] == 0
    worker = ["bash", str(tpu.path / "worker" / "mtp_jax" / "launch" / "tpu_worker.sh")]
    env = tpu.env | {"HOME": str(tpu.path / "worker")}

    def state():
        return subprocess.run([*worker, "state"], env=env, capture_output=True, text=True).stdout.strip()

    (tpu.plans / "held").write_text(" 4711 4712\n")
    status, output = tpu_vm(tpu, "run")
    assert status == 1 and "the TPU is held by process 4711 4712; end it (ps -fp 4711,4712)" in output
    assert state() == "none"
    (tpu.plans / "held").unlink()
    assert tpu_vm(tpu, "run")[0] == 0
    tpu.ready()
    status, output = tpu_vm(tpu, "run")
    assert status == 1 and "the program runs already" in output and state() == "running"
    assert tpu_vm(tpu, "stop")[0] == 0
    assert tpu_vm(tpu, "stop")[0] == 0, "there is nothing left to stop"
    until(lambda: state() == "ended 75")


# GKE


def jobset(*args):
    given = ["--job-name=mine", "--image=registry/image:1", "--experiment=e.py", "--run-dir=gs://bucket/runs/mine"]
    status, output, errors = dry("gke.sh", "render", *given, *args)
    assert status == 0, errors
    return yaml.safe_load(output)


def test_a_tpu_jobset_asks_for_a_slice():
    found = jobset("--tpu-accelerator=tpu-v6e-slice", "--tpu-topology=2x4x4", "--", "--steps", 'a "b" \\c')
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "mine"
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"], job["completionMode"]) == (8, 8, 0, "Indexed")
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "2x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}} and "volumes" not in pod
    program = ["mtp-jax", "train", "e.py", "--run-dir", "gs://bucket/runs/mine", "--auto-resume"]
    assert container["command"] == [*program, "--steps", 'a "b" \\c']
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert env["MTP_JAX_COORDINATOR"] == "auto" and "MTP_JAX_PROCESS_ID" not in env
    assert env["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/runs/xla_cache"


def test_a_gpu_jobset_tells_pods_who_they_are():
    found = jobset("--devices=gpu", "--gpu-accelerator=nvidia-h100-80gb", "--hosts=3", "--port=1234", "--spot=1")
    job = found["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 3
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    env = {variable["name"]: variable for variable in container["env"]}
    # JobSet's names: <jobset>-<job>-<index of the job>-<index of the pod>.<jobset>
    assert env["MTP_JAX_COORDINATOR"]["value"] == f"mine-{job['name']}-0-0.mine:1234"
    assert found["spec"]["network"]["enableDNSHostnames"] is True
    assert env["MTP_JAX_NUM_PROCESSES"]["value"] == "3"
    index = env["MTP_JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def test_status_75_and_evictions_restart_a_jobset_without_counting():
    found = jobset("--tpu-accelerator=a", "--tpu-topology=4x4", "--retries=5", "--grace=60")["spec"]
    policy = found["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (5, "BlockingRecreate")
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = found["replicatedJobs"][0]["template"]["spec"]
    saved, evicted = job["podFailurePolicy"]["rules"]
    container = job["template"]["spec"]["containers"][0]["name"]
    assert saved == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container, "operator": "In", "values": [75]},
    }
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 60


def test_apply_gives_kubernetes_what_render_shows(box):
    box.command("kubectl", '#!/usr/bin/env bash\n[[ $* == "apply --filename=-" ]] && cat >applied\n')
    args = ["--job-name=j", "--image=i", "--run-dir=gs://b/r", "--tpu-accelerator=a", "--tpu-topology=2x2"]
    assert box.run("gke.sh", "apply", *args)[0] == 0
    shown = box.run("gke.sh", "render", *args)[1]
    assert (box.path / "applied").read_text() == shown
    assert shown in box.run("gke.sh", "apply", "--dry-run", *args)[1]


# The pages


@pytest.mark.parametrize("page", ["pods.md", "hangs.md"])
def test_what_the_pages_tell_you_to_type_exists(page):
    text = (REPOSITORY / "docs" / page).read_text().replace("\\\n", " ")
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
    for other in re.findall(r"\]\(([\w/]+\.md)", text):
        assert (REPOSITORY / "docs" / other).exists()
