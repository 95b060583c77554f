"""The launcher of Kubernetes: what it asks for."""

import yaml

from support.launchers import dry


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
