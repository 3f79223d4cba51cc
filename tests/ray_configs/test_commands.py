"""The commands in the files and in the README are ones that Ray and jem take."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

from pipelines.command import JOBS
from pipelines.settings import load_config
from tests.ray_configs.files import FOLDER, LAUNCHER, documents, text

SHELL = re.compile(r"^( *)```console\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SUBMIT = ["ray", "job", "submit"]


def entrypoints() -> dict[str, list[str]]:
    """What the RayJobs run, and what the README submits, by where it stands."""
    found = {
        name: shlex.split(documents(name)[0]["spec"]["entrypoint"])
        for name in ("kuberay/pretrain.yaml", "kuberay/tune.yaml")
    }
    submitted = [words for words in readme_commands() if words[:3] == SUBMIT]
    found |= {f"README.md {number}": words[words.index("--") + 1 :] for number, words in enumerate(submitted)}
    return found


def readme_commands() -> list[list[str]]:
    """The commands of the README's console blocks, without prompt and comment."""
    lines = []
    for _, block in SHELL.findall(text("README.md")):
        joined = re.sub(r"\\\n\s*", " ", block)
        lines += [line.strip()[2:] for line in joined.splitlines() if line.strip().startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("where", entrypoints())
def test_an_entrypoint_is_a_job_with_settings_that_jem_takes(where: str) -> None:
    words = entrypoints()[where]
    if words[:2] == ["python", "-c"]:
        compile(words[2], where, "exec")
        return
    assert words[:2] == ["python", "-m"]
    assert importlib.util.find_spec(words[2]) is not None, f"{where}: no module {words[2]}"
    module = words[2].removeprefix("pipelines.")
    job = next((job for job in JOBS if job.function.startswith(f"{words[2]}:")), None)
    assert job is not None, f"{where}: no job in {words[2]}"
    assert job.words == module
    load_config(job.schema, words[3:], prog=f"jem {job.words}", positional=job.positional)


def test_a_setting_that_there_is_not_is_refused() -> None:
    from jem.errors import InputError

    words = entrypoints()["kuberay/pretrain.yaml"]
    job = next(job for job in JOBS if job.words == "pretrain")
    with pytest.raises(InputError, match=r"cluster\.worker"):
        load_config(job.schema, [*words[3:], "--cluster.worker", "2"])


def test_a_pretraining_asks_for_as_many_gpus_as_its_cluster_has() -> None:
    words = entrypoints()["kuberay/pretrain.yaml"]
    job = next(job for job in JOBS if job.words == "pretrain")
    config = load_config(job.schema, words[3:])
    groups = documents("kuberay/pretrain.yaml")[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [
        (group["minReplicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in groups
    ]
    assert config.cluster.gpu is True
    assert config.cluster.workers == sum(count * int(each.get("nvidia.com/gpu", 0)) for count, each in limits)


def test_ray_takes_what_the_readme_gives_to_job_submit() -> None:
    from ray.dashboard.modules.job.cli import submit

    given = [words[3:] for words in readme_commands() if words[:3] == SUBMIT]
    assert len(given) >= 5
    for words in given:
        assert submit.make_context("submit", words).params["address"] == "http://localhost:8265"


def test_the_readme_names_files_that_there_are() -> None:
    words = {word for command in readme_commands() for word in command if word.startswith("ray_configs/")}
    assert {f"ray_configs/{name}" for name in ("Dockerfile", "mlflow.yaml", *LAUNCHER[:2])} <= words
    assert [word for word in words if not (FOLDER.parent / word).exists()] == []


def test_the_readme_says_when_to_use_each_file() -> None:
    files = {path.name for path in FOLDER.rglob("*") if path.is_file()} - {"README.md"}
    assert {name for name in files if name not in text("README.md")} == set()
