"""Every recipe is a whole, valid configuration, and they all ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jem.config import PretrainConfig, PreviewConfig
from pipelines.settings import dump_config, load_config, recipe_names, recipe_text

NAMES = recipe_names()


def test_the_recipes_of_the_documentation_are_there():
    assert {"vicreg-cifar10", "vicreg-cifar10-cpu", "vicreg-imagenet", "vicreg-small"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_a_valid_configuration(name: str):
    config = load_config(PretrainConfig, ["--recipe", name, "--data", "somewhere"])
    assert config.data == "somewhere"
    assert config.track.register_as in {None, name}, "an encoder that is named after another recipe would mislead"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_in_its_first_line_what_it_is_for(name: str):
    first = recipe_text(name).splitlines()[0]
    assert first.startswith("# ")
    assert len(first) < 110


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_says_is_what_the_job_gets(name: str):
    resolved = yaml.safe_load(dump_config(load_config(PretrainConfig, ["--recipe", name, "--data", "somewhere"])))
    assert_holds(resolved, yaml.safe_load(recipe_text(name)))


def assert_holds(whole: Any, part: Any, path: str = "") -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            assert_holds(whole[key], value, f"{path}.{key}")
    elif isinstance(part, list):
        assert len(whole) == len(part), path
        for position, value in enumerate(part):
            assert_holds(whole[position], value, f"{path}.{position}")
    else:
        assert whole == part, path


@pytest.mark.parametrize("name", NAMES)
def test_preview_reads_the_views_out_of_a_recipe(name: str):
    preview = load_config(PreviewConfig, ["--recipe", name, "in", "out.png"], positional=("data", "out"))
    pretrain = load_config(PretrainConfig, ["--recipe", name, "--data", "in"])
    assert (preview.augment, preview.stream) == (pretrain.augment, pretrain.stream)


def test_cifar10_recipe_follows_the_published_settings():
    """METHODS of the field: solo-learn's VICReg row (LARS, eta 0.02, clipped, 0.3, 1e-4; 2048 x 3; 25/25/1)."""
    config = load_config(PretrainConfig, ["--recipe", "vicreg-cifar10", "--data", "somewhere"])
    method, optimizer = config.method, config.optimizer
    assert method.name == "vicreg"
    assert optimizer.name == "lars"
    assert (method.lam, method.mu, method.nu, method.expander) == (25, 25, 1, (2048, 2048, 2048))
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eta, optimizer.clip) == (0.3, 1e-4, 0.02, True)
    assert (config.train.epochs, config.train.batch_size) == (1000, 256)
    (view,) = config.augment.views
    assert (view.count, view.size, view.scale, view.grey, view.solarize, view.blur) == (2, 32, (0.2, 1), 0.2, 0.1, None)


def test_recipes_are_shipped_in_the_package():
    import jem

    assert {path.stem for path in (Path(jem.__file__).parent / "recipes").glob("*.yaml")} == set(NAMES)
