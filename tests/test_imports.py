"""What an import costs: `import jem` and the `jem` command must not wait for torch, Ray or MLflow."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("ray", "mlflow", "torch", "torchvision", "sklearn", "matplotlib", "pandas", "pyarrow")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split())


def test_import_jem_loads_neither_ray_nor_mlflow_nor_torch():
    assert not loaded_by("import jem") & set(HEAVY)


def test_importtime_of_jem_names_neither_ray_nor_mlflow():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import jem"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "jem" in modules
    assert not modules & {"ray", "mlflow"}


@pytest.mark.parametrize(
    "statement",
    [
        "from jem.config import PretrainConfig",
        "from pipelines.command import main; main(['--help'])",
        "from pipelines.command import main; main(['pretrain', '--help'])",
        "from pipelines.command import main; main(['tune', '--help'])",
        "from pipelines.command import main; main(['recipes'])",
        "from pipelines.command import main; main(['pretrain', '--data', 'x', '--train.epoch', '1'])",
    ],
)
def test_help_and_refusals_do_not_wait_for_heavy_packages(statement: str):
    assert not loaded_by(statement) & set(HEAVY)


def test_the_library_s_networks_and_losses_need_no_ray_and_no_mlflow():
    assert not loaded_by("import jem.methods, jem.models.backbones, jem.augment.views") & {"ray", "mlflow"}


def test_the_compiler_of_torch_is_not_waited_for_where_nothing_is_compiled():
    code = "import sys, jem.methods, jem.augment.views, jem.evaluate.extract, jem.models.vit; "
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
