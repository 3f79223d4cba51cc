"""The Kubernetes objects have only fields that there are, and say what a cluster of jem needs."""

from __future__ import annotations

import configparser
import copy
from typing import Any

import pytest

from pipelines.cluster import KEEP_IDLE
from tests.ray_configs.fields import complaints_about
from tests.ray_configs.files import KUBERNETES, PODS_WITH_RAY, cluster_spec, documents, pods

JOBS = ("kuberay/pretrain.yaml", "kuberay/tune.yaml")


@pytest.mark.parametrize("name", KUBERNETES)
def test_every_field_is_one_of_kubernetes_or_kuberay(name: str) -> None:
    assert [each for document in documents(name) for each in complaints_about(document)] == []


def test_a_misspelt_a_missing_and_an_impossible_field_are_found() -> None:
    (job,) = documents("kuberay/pretrain.yaml")
    spoilt = copy.deepcopy(job)
    cluster = spoilt["spec"]["rayClusterSpec"]
    cluster["autoscalerOptions"]["version"] = "v3"
    del cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    cluster["workerGroupSpecs"][0]["template"]["spec"]["toleration"] = []
    found = "\n".join(complaints_about(spoilt))
    assert "autoscalerOptions.version: 'v3'" in found
    assert "containers[0].image is missing" in found
    assert "template.spec.toleration: no such field" in found
    assert len(found.splitlines()) == 3


@pytest.mark.parametrize("name", PODS_WITH_RAY)
def test_the_token_is_asked_for_and_the_autoscaler_is_the_second(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", PODS_WITH_RAY)
def test_the_head_does_no_work_and_is_kept_off_spot(name: str) -> None:
    head = cluster_spec(name)["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    pod = head["template"]["spec"]
    assert not pod.get("tolerations")
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {each["operator"] for each in term["matchExpressions"]} <= {"NotIn", "DoesNotExist"}


@pytest.mark.parametrize("name", PODS_WITH_RAY)
def test_there_are_gpu_and_cpu_groups_that_may_run_on_spot(name: str) -> None:
    groups = {group["groupName"]: group for group in cluster_spec(name)["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "decode"}
    for kind, group in groups.items():
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (kind == "gpu")
        tolerated = {each["key"] for each in group["template"]["spec"]["tolerations"]}
        assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
        # jem plans on what is there when a job starts
        assert 0 < group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", PODS_WITH_RAY)
def test_every_ray_pod_has_shared_memory_shared_storage_and_rays_settings(name: str) -> None:
    found = pods(name)
    assert len(found) == 3
    for pod in found:
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        # Ray's object store, 30 % of the memory, must fit into it
        memory = gibibytes(container["resources"]["limits"]["memory"])
        assert 0.3 * memory <= gibibytes(shared["sizeLimit"]) <= 0.5 * memory
        assert volumes[mounts["/mnt/jem"]]["persistentVolumeClaim"]["claimName"] == claim()
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables[KEEP_IDLE[0]]["value"] == KEEP_IDLE[1]
        for secret in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            assert variables[secret]["valueFrom"]["secretKeyRef"]["name"] == "mlflow-client"


def gibibytes(quantity: str) -> float:
    """Of a quantity in Gi."""
    assert quantity.endswith("Gi")
    return float(quantity[:-2])


def claim() -> str:
    """The volume claim that all nodes can write."""
    (document,) = documents("kuberay/storage.yaml")
    assert document["spec"]["accessModes"] == ["ReadWriteMany"]
    return str(document["metadata"]["name"])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_deadlines_and_takes_its_cluster_with_it(name: str) -> None:
    (document,) = documents(name)
    spec = document["spec"]
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 0


@pytest.mark.parametrize("name", KUBERNETES)
def test_no_pod_runs_as_root_or_gains_rights(name: str) -> None:
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert (rights["allowPrivilegeEscalation"], rights["capabilities"]) == (False, {"drop": ["ALL"]})


def mlflow_objects() -> dict[tuple[str, str], dict[str, Any]]:
    """mlflow.yaml, by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in documents("mlflow.yaml")}


def mlflow_options() -> dict[str, str]:
    """What `mlflow server` is started with."""
    (container,) = mlflow_objects()["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    return dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])


def test_mlflow_knows_the_options_it_is_started_with() -> None:
    from mlflow.cli import server

    given = server.make_context("server", [f"--{name}={value}" for name, value in mlflow_options().items()]).params
    assert given["app_name"] == "basic-auth"
    assert given["backend_store_uri"].startswith("postgresql+psycopg://")
    assert given["artifacts_destination"].startswith("s3://")
    assert given["serve_artifacts"] is True


def test_mlflow_answers_to_its_own_names_only() -> None:
    hosts = mlflow_options()["allowed-hosts"].split(",")
    port = mlflow_objects()["Service", "mlflow"]["spec"]["ports"][0]["port"]
    assert f"mlflow:{port}" in hosts
    assert not [host for host in hosts if "*" in host]
    uris = {
        variable["value"]
        for name in PODS_WITH_RAY
        for pod in pods(name)
        for variable in pod["containers"][0]["env"]
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    assert uris == {f"http://mlflow:{port}"}


def test_mlflow_reads_its_login_from_the_file_and_the_secret_and_has_no_default_password() -> None:
    config = configparser.ConfigParser()
    config.read_string(mlflow_objects()["ConfigMap", "mlflow-auth"]["data"]["basic_auth.ini"])
    assert set(config["mlflow"]) == {"default_permission", "database_uri"}
    assert config["mlflow"]["database_uri"] == mlflow_options()["backend-store-uri"]
    (container,) = mlflow_objects()["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["MLFLOW_AUTH_CONFIG_PATH"]["value"] == "/etc/mlflow/basic_auth.ini"
    for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert variables[name]["valueFrom"]["secretKeyRef"]["name"] == "mlflow-server"


def test_services_find_their_pods_and_probes_ask_what_needs_no_login() -> None:
    objects = mlflow_objects()
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "mlflow-postgres")):
        workload = objects[kind, name]["spec"]
        labels = workload["template"]["metadata"]["labels"]
        assert workload["selector"]["matchLabels"] == labels == objects["Service", name]["spec"]["selector"]
        (container,) = workload["template"]["spec"]["containers"]
        for port in objects["Service", name]["spec"]["ports"]:
            assert {"containerPort": port["port"], "name": port["targetPort"]} in container["ports"]
    (server,) = objects["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
