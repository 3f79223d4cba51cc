"""Ray's cluster launcher takes the files, and what they start is authenticated."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipelines.cluster import KEEP_IDLE
from tests.ray_configs.files import LAUNCHER, ROOT, documents

CLOUD = ("cluster-aws.yaml", "cluster-gcp.yaml")


def prepared(name: str) -> dict[str, Any]:
    """The configuration as `ray up` completes and checks it, before it calls the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(documents(name)[0])
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_file(name: str) -> None:
    config = prepared(name)
    assert config["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_schema_refuses_a_misspelt_key(name: str) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(documents(name)[0] | {"idle_timeout": 5}))


@pytest.mark.parametrize("name", CLOUD)
def test_the_head_does_no_work_and_is_not_on_spot(name: str) -> None:
    config = prepared(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])


@pytest.mark.parametrize("name", CLOUD)
def test_gpu_and_decoding_workers_are_on_spot(name: str) -> None:
    config = prepared(name)
    workers = {kind: node for kind, node in config["available_node_types"].items() if kind != config["head_node_type"]}
    with_gpus = {kind for kind, node in workers.items() if node["resources"].get("GPU")}
    assert (with_gpus, set(workers) - with_gpus) == ({"gpu"}, {"decode"})
    for node in workers.values():
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        spot = spot or node["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot
        assert 0 < node["min_workers"] <= node["max_workers"]
    assert sum(node["max_workers"] for node in workers.values()) <= config["max_workers"]


@pytest.mark.parametrize("name", CLOUD)
def test_every_container_asks_for_the_token_which_is_copied_to_where_it_looks(name: str) -> None:
    config = prepared(name)
    variables = dict(re.findall(r"--env (\S+?)=(\S+)", " ".join(config["docker"]["run_options"])))
    assert variables["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"][variables["RAY_AUTH_TOKEN_PATH"]] == "~/.ray/auth_token"
    assert variables[KEEP_IDLE[0]] == KEEP_IDLE[1]
    assert not {"head_run_options", "worker_run_options"} & set(config["docker"])


def test_ray_is_started_with_the_token_on_machines_of_ones_own() -> None:
    config = prepared("local.yaml")
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        before, _, _ = command.partition("ray start")
        variables = dict(re.findall(r"(RAY_\w+)=(\S+?)[; ]", before))
        assert variables["RAY_AUTH_MODE"] == "token"
        assert config["file_mounts"][variables["RAY_AUTH_TOKEN_PATH"]] == "~/.ray/auth_token"
        assert variables[KEEP_IDLE[0]] == KEEP_IDLE[1]


def test_what_is_copied_to_machines_of_ones_own_can_be_installed() -> None:
    sent = {there: ROOT / here for there, here in prepared("local.yaml")["file_mounts"].items() if "~" not in here}
    assert all(path.exists() for path in sent.values()), sent
    needed = {"jem", "pipelines", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert set(sent) == {f"~/jem/{name}" for name in needed}


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_knows_the_options_it_is_started_with(name: str) -> None:
    from ray.scripts.scripts import start

    config = prepared(name)
    for commands, first in (("head_start_ray_commands", "--head"), ("worker_start_ray_commands", "--address")):
        words = config[commands][-1].partition("ray start ")[2].split()
        assert words[0].startswith(first)
        start.make_context("start", words)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_dashboard_listens_on_the_head_alone(name: str) -> None:
    assert "--dashboard-host=127.0.0.1" in prepared(name)["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", LAUNCHER)
def test_nothing_is_installed_at_the_start_beside_the_constraints(name: str) -> None:
    config = prepared(name)
    commands = [command for key, value in config.items() if key.endswith("commands") for command in value]
    assert commands
    installs = {command for command in commands if "pip install" in command}
    assert [command for command in installs if "--constraint" not in command] == []
    assert len(installs) == (name == "local.yaml")
