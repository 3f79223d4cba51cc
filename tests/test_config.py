"""The schema: what is refused before anything starts, and that a stored configuration is the same again."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from jem import config as schema
from jem.config import PretrainConfig, Section
from pipelines.complaints import models_of
from pipelines.settings import dump_config

JOBS = [
    schema.IngestConfig,
    schema.PreviewConfig,
    PretrainConfig,
    schema.TuneConfig,
    schema.EvaluateConfig,
    schema.EmbedConfig,
]


def pretrain(**changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"data": "somewhere", **changes})


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for inner in models_of(field.annotation):
            found |= sections(inner)
    return found


@pytest.mark.parametrize("job", JOBS)
def test_every_section_refuses_unknown_keys_and_is_frozen(job: type[BaseModel]):
    for section in sections(job):
        assert issubclass(section, Section), section
        assert section.model_config["extra"] == "forbid", section
        assert section.model_config["frozen"], section


@pytest.mark.parametrize("job", JOBS)
def test_every_section_says_what_it_is(job: type[BaseModel]):
    for section in sections(job):
        assert section.__doc__, section


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"batch_size": -1}}, "greater than 0"),
        ({"train": {"batch_size": 2}, "cluster": {"workers": 4}}, "smaller than cluster.workers 4"),
        ({"train": {"batch_size": 10}, "cluster": {"workers": 4}}, "does not divide"),
        ({"train": {"batch_size": 1}}, "no variance"),
        ({"train": {"batch_size": 256, "accumulate": 3}}, "does not divide"),
        ({"train": {"parts": 3}, "cluster": {"workers": 2}}, "train.parts 3 must be a multiple of cluster.workers 2"),
        ({"train": {"parts": 512}}, "train.batch_size 256 one of train.parts x train.accumulate 512"),
        ({"train": {"parts": 128, "accumulate": 4}}, "one of train.parts x train.accumulate 512"),
        ({"cluster": {"workers": 8, "min_workers": 3}}, "cluster.min_workers 3 must divide train.parts 8"),
        ({"cluster": {"workers": 2, "min_workers": 4}}, "not pass cluster.workers 2"),
        ({"cluster": {"workers": 2, "min_workers": 1}, "train": {"sync_bn": False}}, "set train.sync_bn true"),
        ({"augment": {"views": [{"count": 3}]}}, "exactly 2 views"),
        ({"augment": {"views": []}}, "at least 1"),
        ({"augment": {"views": [{"count": 2, "scale": [0.5, 0.1]}]}}, "from low to high"),
        ({"augment": {"views": [{"count": 2, "scale": [0.5, 1.5]}]}}, "scale cannot pass 1"),
        ({"augment": {"views": [{"count": 2, "size": 8, "blur": {"kernel": 23}}]}}, "too large for a view of 8"),
        ({"augment": {"views": [{"count": 2, "blur": {"kernel": 4}}]}}, "kernel must be odd"),
        ({"augment": {"views": [{"count": 2, "jitter": {"hue": 0.7}}]}}, "less than or equal to 0.5"),
        ({"method": {"name": "vicregg"}}, "vicreg"),
        ({"method": {"name": "vicreg", "label_smoothing": 0.1}}, "Extra inputs"),
        ({"optimizer": {"name": "adamw", "eta": 0.1}}, "Extra inputs"),
        ({"optimizer": {"name": "adamw", "lr": float("nan")}}, "finite"),
        ({"schedule": {"final": 2}}, "less than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        pretrain(**changes)


@pytest.mark.parametrize(
    ("cluster", "parts", "expected"),
    [
        ({"workers": 4}, None, [4]),
        ({"workers": 4}, 8, [4]),
        ({"workers": 8, "min_workers": 2}, None, [2, 4, 8]),
        ({"workers": 6, "min_workers": 1}, 12, [1, 2, 3, 4, 6]),
    ],
)
def test_an_elastic_run_may_have_the_numbers_that_divide_its_parts(
    cluster: dict[str, int], parts: int | None, expected: list[int]
):
    assert pretrain(cluster=cluster, train={"parts": parts, "batch_size": 240}).worlds == expected


def test_methods_take_only_their_own_settings():
    assert pretrain(method={"name": "supervised", "label_smoothing": 0.1}).method == schema.SupervisedConfig(
        label_smoothing=0.1
    )
    with pytest.raises(ValidationError):
        pretrain(method={"name": "supervised", "mu": 0})


def test_branches_may_be_two_different_backbones():
    first, second = {"name": "resnet18"}, {"name": "resnet50", "stem": "cifar"}
    config = pretrain(method={"name": "vicreg", "branches": [first, second]})
    assert config.method == schema.VICRegConfig(
        branches=(schema.BackboneConfig(), schema.BackboneConfig(name="resnet50", stem="cifar"))
    )


views = st.builds(
    schema.ViewConfig,
    count=st.just(2),
    size=st.integers(24, 256),
    flip=st.floats(0, 1),
    grey=st.floats(0, 1),
    jitter=st.none() | st.builds(schema.JitterConfig, hue=st.floats(0, 0.5), p=st.floats(0, 1)),
    blur=st.none() | st.builds(schema.BlurConfig, p=st.floats(0, 1), kernel=st.just(5)),
)
configs = st.builds(
    PretrainConfig,
    data=st.text(min_size=1, max_size=20),
    test=st.none() | st.text(max_size=20),
    limit=st.none() | st.integers(1, 10**9),
    seed=st.integers(0, 2**31),
    augment=st.builds(schema.AugmentConfig, views=st.tuples(views)),
    method=st.builds(schema.VICRegConfig, lam=st.floats(0, 1e6), mu=st.floats(0, 1e-9), nu=st.floats(0, 100)),
    optimizer=st.builds(schema.LARSConfig, lr=st.floats(1e-12, 10), clip=st.booleans())
    | st.builds(schema.AdamWConfig, lr=st.floats(1e-12, 10)),
    train=st.builds(schema.TrainConfig, epochs=st.integers(1, 1000), clip_norm=st.none() | st.floats(1e-6, 10)),
)


@settings(max_examples=40)
@given(configs)
def test_a_dumped_configuration_is_the_same_configuration(config: PretrainConfig):
    assert PretrainConfig.model_validate(yaml.safe_load(dump_config(config))) == config
