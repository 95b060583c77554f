"""The launcher of SLURM, whose commands are stand-ins that do on this machine what theirs do elsewhere."""

import re
import shutil

import pytest

from support import REPOSITORY
from support.launchers import LAUNCH, dry, end, until

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
