"""The launchers of sweeps: what is submitted, in which order it runs, and what becomes of runs that save or fail.

The program is a stand-in that lists the runs in $PLANS/runs, does what is planned for a run, and knows which are done.
SLURM is one that runs a job where it is submitted, after those that it depends on.
"""

import shutil
import subprocess

import pytest
import yaml

from support import REPOSITORY
from support.launchers import LAUNCH, Box, dry, end, until

PROGRAM = """#!/usr/bin/env bash
[[ "$1 $3" == 'sweep --list' || "$1 $3" == 'sweep --dir' ]] || exit 64
experiment=$2
shift 2
while (($#)); do
  case $1 in
    --list) what=list ;;
    --collect) what=collect ;;
    --only) what=only && number=$2 && shift ;;
    --dir) dir=$2 && shift ;;
    --out) out=$2 && shift ;;
    *) exit 64 ;;
  esac
  shift
done
case $what in
  list)
    while read -r number kind name; do
      state=waiting
      [[ ! -e $PLANS/done.$number ]] || state=done
      printf '%s\\t%s\\t%s\\t%s\\n' "$number" "$kind" "$name" "$state"
    done <"$PLANS/runs"
    ;;
  collect) echo "$experiment $dir ${out:-} $(cd "$PLANS" && echo done.*)" >>collected ;;
  only)
    n=$(($(cat "$PLANS/tries.$number" 2>/dev/null || echo 0) + 1))
    echo "$n" >"$PLANS/tries.$number"
    echo "$number" >>"$PLANS/order"
    echo "$experiment run $number try $n in $dir coordinator=${MTP_JAX_COORDINATOR:-}"
    for word in $(sed -n "${n}p" "$PLANS/$number" 2>/dev/null); do
      case $word in
        step=*) mkdir -p "$dir/rank=$number/checkpoints/${word#*=}" ;;
        after=*) sleep "${word#*=}" ;;
        *) status=$word ;;
      esac
    done
    [[ ${status:-0} != 0 ]] || touch "$PLANS/done.$number"
    exit "${status:-0}"
    ;;
esac
"""
SBATCH = """#!/usr/bin/env bash
echo "$*" >>submitted
[[ ! -e refuse || $* != *$(cat refuse)* ]] || { echo 'sbatch: error: invalid account' >&2; exit 1; }
while [[ $1 == --* ]]; do
  case $1 in
    --array=*) array=${1#*=} ;;
    --dependency=*) dependency=${1#*=} ;;
    --export=ALL,*) export "${1#--export=ALL,}" ;;
    --kill-on-invalid-dep=yes) kill=1 ;;
  esac
  shift
done
mkdir -p jobs spool
id=$((100 + $(ls jobs | wc -l)))
echo "$id;cluster"
cp "$1" spool/slurm_script && shift
echo succeeded >"jobs/$id"
case $dependency in
  afterok:*) [[ $(cat "jobs/${dependency#*:}") == succeeded ]] || { echo "${kill:+cancelled}" >"jobs/$id" && exit; } ;;
  afterany:*) [[ $(cat "jobs/${dependency#*:}") ]] || { echo >"jobs/$id" && exit; } ;;
esac
task() {
  export SLURM_RESTART_COUNT=0
  while
    rm -f "requeued.$name"
    bash spool/slurm_script "$@" >>"sweep-$name.log" 2>&1
    status=$?
    [[ -e requeued.$name ]]
  do
    ((SLURM_RESTART_COUNT++))
  done
  ((status == 0)) || echo failed >"jobs/$id"
}
if [[ ! $array ]]; then
  name=$id
  SLURM_JOB_ID=$id task "$@"
fi
array=${array%[%]*}
for part in ${array//,/ }; do
  for n in $(seq "${part%-*}" "${part#*-}"); do
    name=${id}_$n
    # As in SLURM the number of one task is that of the array.
    SLURM_JOB_ID=$id SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$n task "$@"
  done
done
"""
SCONTROL = '#!/usr/bin/env bash\n[[ $1 == requeue && $2 == *_* ]] && touch "requeued.$2"\n'
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
RUNS = "0 first rank=0\n1 run rank=1\n2 run rank=2\n3 run rank=3\n"


class SweepBox(Box):
    """A box in which a sweep of four runs is planned; the last three begin from the first."""

    def __init__(self, path):
        super().__init__(path)
        for name, text in {"program": PROGRAM, "sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}.items():
            self.command(name, text)
        (self.plans / "runs").write_text(RUNS)
        self.env |= {"EXPERIMENT": "ranks.py@tiny", "SWEEP_DIR": str(path / "runs")}
        del self.env["RUN_DIR"]

    def submitted(self, *names):
        """Of each submission, since this was last asked, the flags of these names, and its word."""
        file = self.path / "submitted"
        lines = file.read_text().splitlines()
        file.unlink()
        found = []
        for line in lines:
            words = line.split()
            flags = [word for word in words if word.partition("=")[0] in names]
            found.append([*flags, words[words.index(next(w for w in words if w.endswith("/sweep.sbatch"))) + 1]])
        return found

    def order(self):
        return [int(line) for line in (self.plans / "order").read_text().split()]

    def log(self, task):
        return (self.path / f"sweep-{task}.log").read_text()


@pytest.fixture
def box(tmp_path):
    box = SweepBox(tmp_path)
    yield box
    box.close()


HOW = ("--array", "--dependency", "--kill-on-invalid-dep")


def test_runs_are_submitted_after_those_that_they_begin_from_and_results_after_all(box):
    status, output = box.run("sweep.sbatch", "--max-parallel", "2", OUT="results/mine.json")
    assert (status, output) == (
        0,
        "Submitted runs 0 as job 100\nSubmitted runs 1-3 as job 101\nThe results file is written by job 102\n",
    )
    assert box.submitted(*HOW) == [
        ["--array=0%2", "run"],
        ["--array=1-3%2", "--dependency=afterok:100", "--kill-on-invalid-dep=yes", "run"],
        ["--dependency=afterany:101", "collect"],
    ]
    assert box.order() == [0, 1, 2, 3]
    assert box.log("101_2") == f"ranks.py@tiny run 2 try 1 in {box.path}/runs coordinator=\n"
    collected = f"ranks.py@tiny {box.path}/runs results/mine.json done.0 done.1 done.2 done.3\n"
    assert (box.path / "collected").read_text() == collected


def test_each_run_gets_its_devices_and_the_collecting_job_none(box):
    env = {"SBATCH_FLAGS": "--partition=gpu --account=me", "COLLECT_FLAGS": "--partition=cpu"}
    assert box.run("sweep.sbatch", "--gpus-per-run=4", "--cpus-per-run=6", "--time=1:00:00", **env)[0] == 0
    names = ("--nodes", "--ntasks", "--gpus-per-node", "--cpus-per-task", "--signal", "--requeue", "--partition")
    first, others, results = box.submitted(*names)
    one = ["--nodes=1", "--ntasks=1"]
    devices = ["--gpus-per-node=4", "--cpus-per-task=6", "--signal=TERM@300", "--requeue", "--partition=gpu"]
    assert first == others == [*one, *devices, "run"]
    assert results == [*one, "--cpus-per-task=1", "--partition=cpu", "collect"]


def test_a_saved_run_is_requeued_alone_and_a_failed_one_repeated_where_it_is(box):
    box.plan("75", "75", "0", process=0)
    box.plan("step=5 1", "75", "0", process=2)
    assert box.run("sweep.sbatch")[0] == 0
    assert box.order() == [0, 0, 0, 1, 2, 2, 2, 3]
    assert "restart 2 of 1000" in box.log("100_0")
    assert "failed with status 1: retry 1 of 3, newest checkpoint 5" in box.log("101_2")
    assert {file.read_text() for file in (box.path / "jobs").iterdir()} == {"succeeded\n"}


def test_restarts_are_bounded(box):
    box.plan("75", "75", "75", process=1)
    assert box.run("sweep.sbatch", "--max-restarts=1")[0] == 0
    assert box.order().count(1) == 2 and "restarted 1 times (MAX_RESTARTS)" in box.log("101_1")
    assert (box.path / "jobs" / "101").read_text() == "failed\n"


def test_a_run_that_fails_holds_nothing_up_and_the_same_command_goes_on(box):
    box.plan("3", "3", "0", process=2)
    assert box.run("sweep.sbatch", "--retries=1")[0] == 0
    assert box.order() == [0, 1, 2, 2, 3]
    assert (box.path / "collected").read_text().endswith("done.0 done.1 done.3\n")
    box.submitted()
    assert box.run("sweep.sbatch")[0] == 0
    assert box.submitted(*HOW) == [["--array=2%8", "run"], ["--dependency=afterany:103", "collect"]]
    assert box.order()[5:] == [2] and (box.path / "collected").read_text().endswith("done.1 done.2 done.3\n")


def test_where_what_others_begin_from_fails_they_are_cancelled_and_results_written(box):
    box.plan("2", process=0)
    assert box.run("sweep.sbatch")[0] == 0
    assert box.order() == [0]
    assert [(box.path / "jobs" / str(i)).read_text() for i in (100, 101, 102)] == [
        "failed\n",
        "cancelled\n",
        "succeeded\n",
    ]
    assert (box.path / "collected").exists()


def test_of_a_sweep_that_is_done_the_results_are_written_again(box):
    for i in range(4):
        (box.plans / f"done.{i}").touch()
    status, output = box.run("sweep.sbatch")
    assert (status, output) == (0, "The results file is written by job 100\n")
    assert box.submitted(*HOW) == [["collect"]]


@pytest.mark.parametrize(
    ("done", "array"), [((1, 3), "2,4-6"), ((2,), "1,3-6"), ((1, 2, 6), "3-5"), ((2, 3, 5), "1,4,6")]
)
def test_runs_that_are_done_are_left_out(box, done, array):
    (box.plans / "runs").write_text("".join(f"{i} {'run' if i else 'first'} rank={i}\n" for i in range(7)))
    for i in (0, *done):
        (box.plans / f"done.{i}").touch()
    assert box.run("sweep.sbatch")[0] == 0
    assert box.submitted("--array")[0] == [f"--array={array}%8", "run"]
    assert box.order() == [i for i in range(1, 7) if i not in done]


def test_a_dry_run_is_what_is_submitted(box):
    status, shown = box.run("sweep.sbatch", "--dry-run")
    assert status == 0 and not (box.path / "submitted").exists()
    jobs = [line.removeprefix("sbatch ") for line in shown.splitlines() if line.startswith("sbatch ")]
    jobs = [job.replace("<JOB_OF_FIRST>", "100").replace("<JOB_OF_OTHERS>", "101") for job in jobs]
    assert box.run("sweep.sbatch")[0] == 0
    assert (box.path / "submitted").read_text().splitlines() == jobs


def test_what_sbatch_refuses_is_said_with_what_was_submitted_before(box):
    (box.path / "refuse").write_text("dependency=afterok")
    status, output = box.run("sweep.sbatch")
    assert status == 1 and "invalid account" in output and "Submitted before it: 100." in output
    assert box.order() == [0]


def test_a_run_that_slurm_takes_away_is_not_requeued_by_it(box):
    box.plan("after=1 75", "0", process=2)
    job = box.start("sweep.sbatch", "run", SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    until(lambda: box.tries(2))
    job.terminate()
    assert end(job)[0] == 75 and box.tries(2) == 1 and not list(box.path.glob("requeued*"))


def test_a_number_that_the_file_has_no_more_is_not_run(box):
    env = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "4"}
    status, output = box.run("sweep.sbatch", "run", **env)
    assert status == 2 and "ranks.py@tiny has no run 4 any more" in output and not (box.plans / "order").exists()


def test_what_is_no_list_of_runs_is_refused(box):
    (box.plans / "runs").write_text("warning: your disk is full\n" + RUNS)
    status, output = box.run("sweep.sbatch")
    assert status == 2 and "printed no list of runs" in output
    assert not (box.path / "submitted").exists()


def test_a_file_that_has_no_runs_is_refused_before_anything_is_submitted(box):
    (box.plans / "runs").unlink()
    box.command("program", "#!/usr/bin/env bash\necho 'mtp-jax: error: there is no experiment' >&2\nexit 2\n")
    for args in ([], ["--dry-run"]):
        status, output = box.run("sweep.sbatch", *args)
        assert (
            status == 2 and "there is no experiment" in output and "the runs of ranks.py@tiny are not known" in output
        )
    assert not (box.path / "submitted").exists()


def test_a_copy_without_common_names_the_way_out(box):
    copy = box.path / "spool"
    copy.mkdir()
    shutil.copy(LAUNCH / "sweep.sbatch", copy)
    status, output = box.run("sweep.sbatch", "collect", launch=copy, SLURM_SUBMIT_DIR="/nowhere")
    assert status == 2 and "'/nowhere'" in output and "set LAUNCH_DIR" in output
    assert box.run("sweep.sbatch", "collect", launch=copy, SLURM_SUBMIT_DIR=str(REPOSITORY))[0] == 0


@pytest.mark.parametrize(
    ("script", "args", "answer"),
    [
        ("sweep.sbatch", ["run"], "'run' is for the jobs of an array"),
        ("sweep.sbatch", ["run", "collect"], "'run collect' is no option"),
        ("sweep.sbatch", ["--max-parallel=0"], "MAX_PARALLEL is 0"),
        ("sweep.sbatch", ["--", "--steps", "7"], "'--steps' follows --, and a sweep takes no options"),
        ("gke_sweep.sh", ["apply", "--", "--steps", "7"], "'--steps' follows --, and a sweep takes no options"),
        ("gke_sweep.sh", ["apply", "--sweep-dir=here"], "SWEEP_DIR is 'here'; pods share no file system"),
        (
            "gke_sweep.sh",
            ["render", "--tpu-topology=4x4"],
            "4x4 has 4 hosts of 4 chips; a run of a sweep is",
        ),
        ("gke_sweep.sh", ["render", "--devices=gpu"], "--gpu-accelerator (GPU_ACCELERATOR)"),
        ("gke_sweep.sh", ["render", "--max-parallel=0"], "MAX_PARALLEL is 0"),
    ],
)
def test_what_the_launcher_of_a_sweep_refuses(script, args, answer):
    given = ["--experiment=e.py", "--sweep-dir=gs://b/r"]
    if script == "gke_sweep.sh":
        given += ["--job-name=j", "--image=i", "--tpu-accelerator=a", "--tpu-topology=2x2"]
        args = [args[0], *given, *args[1:]]
    else:
        args = [*given, *args]
    status, output, errors = dry(script, *args)
    assert (status, output) == (2, "") and answer in errors


# GKE

POD = ["--job-name=mine", "--image=registry/image:1", "--sweep-dir=gs://bucket/sweep"]
GPU = ["--devices=gpu", "--gpu-accelerator=nvidia-h100-80gb", "--gpus-per-run=2"]


def jobset(box, *args):
    status, output = box.run("gke_sweep.sh", "render", *POD, *args)
    assert status == 0, output
    return yaml.safe_load(output)


def test_a_jobset_has_a_pod_for_each_run_and_an_order(box):
    found = jobset(box, *GPU, "--max-parallel=2", "--spot=1")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    first, others = found["spec"]["replicatedJobs"]
    assert (first["name"], others["name"]) == ("first", "runs")
    assert "dependsOn" not in first and others["dependsOn"] == [{"name": "first", "status": "Complete"}]
    assert [job["template"]["spec"]["completions"] for job in (first, others)] == [1, 3]
    assert others["template"]["spec"]["parallelism"] == 2
    for job in (first, others):
        assert job["template"]["spec"]["completionMode"] == "Indexed"
        pod = job["template"]["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
            "cloud.google.com/gke-spot": "true",
        }
        (container,) = pod["containers"]
        assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert env["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/sweep/xla_cache" and "MTP_JAX_COORDINATOR" not in env
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def test_each_pod_runs_a_run_of_its_own(box):
    """As Kubernetes would start them, which tells a pod its index."""
    (box.plans / "done.2").touch()
    for job in jobset(box, *GPU)["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        command = spec["template"]["spec"]["containers"][0]["command"]
        assert "$(" not in "".join(command), "Kubernetes would expand it"
        for index in range(spec["completions"]):
            env = box.env | {"JOB_COMPLETION_INDEX": str(index)}
            done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=box.path)
            assert done.returncode == 0 and "ranks.py@tiny run" in done.stdout and "gs://bucket/sweep" in done.stdout
    assert box.order() == [0, 1, 3]


def test_status_75_and_evictions_are_not_counted_and_a_failure_is_one_runs_own(box):
    for job in jobset(box, *GPU, "--retries=5", "--grace=60")["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        assert spec["backoffLimitPerIndex"] == 5 and "backoffLimit" not in spec
        saved, evicted, mistake = spec["podFailurePolicy"]["rules"]
        container = spec["template"]["spec"]["containers"][0]["name"]
        codes = {"containerName": container, "operator": "In"}
        assert saved == {"action": "Ignore", "onExitCodes": {**codes, "values": [75]}}
        assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert mistake == {"action": "FailIndex", "onExitCodes": {**codes, "values": [2, 126, 127]}}


def test_only_what_is_not_done_is_in_the_jobset(box):
    (box.plans / "done.0").touch()
    tpu = ["--tpu-accelerator=tpu-v6e-slice", "--tpu-topology=2x2"]
    (job,) = jobset(box, *tpu)["spec"]["replicatedJobs"]
    assert job["name"] == "runs" and "dependsOn" not in job
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}} and "volumes" not in pod
    (box.plans / "done.0").unlink()
    for i in (1, 2, 3):
        (box.plans / f"done.{i}").touch()
    (job,) = jobset(box, *tpu)["spec"]["replicatedJobs"]
    assert job["name"] == "first" and job["template"]["spec"]["completions"] == 1
    (box.plans / "done.0").touch()
    status, output = box.run("gke_sweep.sh", "apply", *POD, *tpu)
    assert status == 2 and "all runs of ranks.py@tiny in gs://bucket/sweep are done; collect" in output


def test_apply_gives_kubernetes_what_render_shows_and_collect_writes_results_here(box):
    box.command("kubectl", '#!/usr/bin/env bash\n[[ $* == "apply --filename=-" ]] && cat >applied\n')
    assert box.run("gke_sweep.sh", "apply", *POD, *GPU)[0] == 0
    shown = box.run("gke_sweep.sh", "render", *POD, *GPU)[1]
    assert (box.path / "applied").read_text() == shown
    assert shown in box.run("gke_sweep.sh", "apply", "--dry-run", *POD, *GPU)[1]
    assert box.run("gke_sweep.sh", "collect", "--sweep-dir=gs://bucket/sweep", "--out=mine.json")[0] == 0
    assert (box.path / "collected").read_text().startswith("ranks.py@tiny gs://bucket/sweep mine.json ")
