"""The command line: the order of the layers, what is refused and how, exit statuses."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import jem
from jem.config import EvaluateConfig, IngestConfig, LARSConfig, PretrainConfig, SupervisedConfig, VICRegConfig
from jem.errors import InputError, RunError
from pipelines.command import JOBS, main, run_job
from pipelines.settings import dump_config, load_config

DATA = ("--data", "somewhere")


def load(*argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, [*DATA, *argv])


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        load(*argv)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- layers -------------------------------------------------------------------------------------------------------


def test_defaults_give_way_to_recipe_to_file_to_command_line(write: Callable[[str], str]):
    assert load().train.epochs == 100
    recipe = load("--recipe", "vicreg-cifar10")
    assert (recipe.train.epochs, recipe.optimizer.lr) == (1000, 0.3)
    file = write("train: {epochs: 7, log_every: 3}\noptimizer: {lr: 0.1}\n")
    layered = load("--train.epochs", "5", "--config", file, "--recipe", "vicreg-cifar10")
    assert (layered.train.epochs, layered.train.log_every, layered.optimizer.lr) == (5, 3, 0.1)
    assert layered.optimizer == LARSConfig(lr=0.1, eta=0.02, clip=True), "what is not named stays the recipe's"


def test_dotted_overrides_reach_every_depth():
    config = load(
        *("--method.mu", "0", "--train.compile", "true", "--evaluation.knn.k=5", "--evaluation.probe", "null"),
        *("--augment.views", '[{"count": 2, "size": 32, "jitter": null}]', "--method.expander", "[64, 32]"),
        *("--augment.mean", "0.5,0.5,0.5", "--cluster.gpu", "false", "--schedule.final", "1e-2"),
    )
    assert isinstance(config.method, VICRegConfig)
    assert (config.method.mu, config.method.expander, config.method.lam) == (0, (64, 32), 25)
    assert config.train.compile
    assert (config.evaluation.knn.k, config.evaluation.knn.temperature, config.evaluation.probe) == (5, 0.1, None)
    assert config.augment.views[0].size == 32
    assert config.augment.views[0].jitter is None
    assert (config.augment.mean, config.cluster.gpu, config.schedule.final) == ((0.5, 0.5, 0.5), False, 0.01)


@pytest.mark.parametrize("branches", ["shared", "separate"])
def test_a_word_is_a_word_where_a_list_would_do_too(branches: str):
    config = load("--method.branches", branches)
    assert isinstance(config.method, VICRegConfig)
    assert config.method.branches == branches


def test_another_method_leaves_the_former_one_s_settings_behind(write: Callable[[str], str]):
    assert load("--recipe", "vicreg-cifar10", "--method.name", "supervised").method == SupervisedConfig()
    file = write("optimizer: {name: adamw}\n")
    assert load("--recipe", "vicreg-cifar10", "--config", file).optimizer.lr == 1e-3


def test_naming_the_same_method_again_keeps_its_settings():
    config = load("--recipe", "vicreg-imagenet", "--method.name", "vicreg", "--backbone.name", "resnet18")
    assert isinstance(config.method, VICRegConfig)
    assert config.method.expander == (8192, 8192, 8192)


def test_a_job_s_own_defaults_hold_inside_a_section_that_is_set_in_part():
    argv = ["--encoder", "e", *DATA, "--test", "t", "--evaluation.knn.k", "5"]
    assert load_config(EvaluateConfig, argv).evaluation.online is None


def test_a_dumped_file_alone_starts_the_same_run_again(write: Callable[[str], str]):
    config = load("--recipe", "vicreg-cifar10", "--method.mu", "1e-7", "--track.alias", "champion", "--limit", "100")
    assert load_config(PretrainConfig, ["--config", write(dump_config(config))]) == config


def test_a_pretraining_s_file_serves_the_other_jobs(write: Callable[[str], str]):
    file = write(dump_config(load("--recipe", "vicreg-cifar10", "--stream.canvas", "40")))
    argv = ["--config", file, "--encoder", "e", "--test", "t"]
    assert load_config(EvaluateConfig, argv).stream.canvas == 40


def test_positional_arguments_and_flags():
    argv = ["in", "out", "--overwrite", "--short_side", "200"]
    config = load_config(IngestConfig, argv, positional=("source", "dest"))
    assert (config.source, config.dest, config.overwrite, config.short_side) == ("in", "out", True, 200)
    assert load_config(IngestConfig, ["--overwrite", "in", "out"], positional=("source", "dest")).dest == "out"


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.epoch", "5"], "unknown setting --train.epoch: did you mean --train.epochs?"),
        (["--train.epoch=5"], "unknown setting --train.epoch: did you mean --train.epochs?"),
        (["--epochs", "5"], "unknown setting --epochs: did you mean --train.epochs?"),
        (["--method.muu", "5"], "unknown setting --method.muu: did you mean --method.mu?"),
        (["--evaluation.knn.temprature", "5"], "did you mean --evaluation.knn.temperature?"),
        (["--method.name", "vicrge"], "method.name cannot be 'vicrge': did you mean vicreg?"),
        (["--method.label_smoothing", "0.1"], "method.label_smoothing is no setting of method vicreg: that has"),
        (["--optimizer.betas", "[0.9, 0.9]"], "optimizer.betas is no setting of optimizer lars"),
        (["--augment.views", '[{"sise": 3}]'], "augment.views.0.sise: did you mean augment.views.0.size?"),
        (["--augment.views", '[{"count": 2, "jitter": {"heu": 0}}]'], "did you mean augment.views.0.jitter.hue?"),
        (["--train.batch_size", "-3"], "train.batch_size '-3': input should be greater than 0"),
        (["--backbone.name", "resnet19"], "backbone: name 'resnet19' is not a backbone: did you mean resnet18?"),
        (["--method.branches", "seperate"], "method.branches 'seperate': input should be 'shared' or 'separate'"),
        (["--cluster.workers", "300"], "train.batch_size 256 is smaller than cluster.workers 300"),
        (["--recipe", "vicreg-cifar"], "unknown recipe 'vicreg-cifar': did you mean vicreg-cifar10"),
        (["--recipe", "my.yaml"], "--config my.yaml"),
        (["--config", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
        (["stray"], "unexpected argument 'stray'"),
        (["--train.epochs"], "--train.epochs: expected one argument"),
    ],
)
def test_refusal_names_the_setting_the_cause_and_the_nearest_name(argv: list[str], message: str):
    said = refusal(*argv)
    assert message in said
    assert "\n" not in said


def test_each_wrong_value_has_its_line():
    said = refusal("--train.epochs", "0", "--train.precision", "fp8", "--stream.windw", "2").splitlines()
    assert said == ["unknown setting --stream.windw: did you mean --stream.window?"]
    said = refusal("--train.epochs", "0", "--train.precision", "fp8").splitlines()
    assert [line.split()[0] for line in said] == ["train.epochs", "train.precision"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", "unknown setting trian: did you mean train?"),
        ("train: {epoch: 3}", "unknown setting train.epoch: did you mean train.epochs?"),
        ("method: {name: vicreg, expandr: [3]}", "unknown setting method.expandr: did you mean method.expander?"),
        ("method: {name: vicreg, branches: [{nme: resnet18}, {}]}", "method.branches.0.nme: did you mean"),
        ("augment: {views: [{count: 2, blur: {sigmas: 1}}]}", "did you mean augment.views.0.blur.sigma?"),
        (
            "evaluation: {online: {bnk: 3}}",
            "unknown setting evaluation.online.bnk: did you mean evaluation.online.bank?",
        ),
        ("train: {epochs: many}", "train.epochs 'many': input should be a valid integer"),
        ("train:", "train None: input should be a valid dictionary"),
        ("train: {epochs: 3", "is not YAML"),
        ("- 3", "does not hold settings"),
        ("only words", "does not hold settings"),
    ],
)
def test_refusal_of_a_file_names_the_file_and_the_path(write: Callable[[str], str], text: str, message: str):
    path = write(text)
    said = refusal("--config", path)
    assert message in said
    assert path in said
    assert "\n" not in said


def test_a_mistake_on_the_command_line_is_not_laid_to_the_file(write: Callable[[str], str]):
    path = write("train: {epochs: 3}")
    assert path not in refusal("--config", path, "--train.epochs", "0")


def test_a_missing_setting_says_how_to_give_it():
    with pytest.raises(InputError, match="test is missing: give --test VALUE"):
        load_config(EvaluateConfig, ["--encoder", "e", *DATA])
    with pytest.raises(InputError, match="dest is missing: give DEST"):
        load_config(IngestConfig, ["in"], positional=("source", "dest"))


# --- exit statuses ------------------------------------------------------------------------------------------------


class WrappedByRayError(RuntimeError):
    """As Ray does it: the worker's error is an attribute, and the text a whole traceback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::task() (pid=1)\nTraceback (most recent call last):\n ...")
        self.cause = cause


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Put a function in the place of `jem ingest`."""

    def put(function: Callable[[Any], Any]) -> None:
        module = types.ModuleType("pipelines.ingest")
        module.ingest = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pipelines.ingest", module)

    return put


def raising(error: BaseException) -> Callable[[Any], Any]:
    def run(_config: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("no data at x: give data"), 2, "jem ingest: no data at x: give data"),
        (RunError("the worker died: resume it"), 1, "jem ingest: the worker died: resume it"),
        (ValueError("odd\nmany lines"), 1, "jem ingest: ValueError: odd (--debug shows where)"),
        (WrappedByRayError(InputError("bad input: mend it")), 2, "jem ingest: bad input: mend it"),
        (WrappedByRayError(RunError("it stopped: look")), 1, "jem ingest: it stopped: look"),
        (KeyboardInterrupt(), 130, "jem ingest: interrupted"),
        (SystemExit(15), 143, "jem ingest: stopped"),
    ],
)
def test_errors_are_one_line_and_an_exit_status(
    job: Callable[..., None], capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
):
    job(raising(error))
    assert main(["ingest", "a", "b"]) == status
    assert capsys.readouterr().err.splitlines() == [said]


def test_debug_shows_the_traceback(job: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    job(raising(ValueError("odd")))
    assert main(["--debug", "ingest", "a", "b"]) == 1
    assert main(["ingest", "a", "b", "--debug"]) == 1
    assert capsys.readouterr().err.count("Traceback") == 2


def test_a_job_gets_its_configuration_and_its_status_is_the_command_s(job: Callable[..., None]):
    seen: list[IngestConfig] = []
    job(seen.append)
    assert run_job("ingest", ["a", "b", "--seed", "3"]) == 0
    assert seen == [IngestConfig(source="a", dest="b", seed=3)]
    job(lambda _config: types.SimpleNamespace(exit_status=1))
    assert run_job("ingest", ["a", "b"]) == 1


def test_bad_configuration_never_reaches_the_job(job: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    job(raising(AssertionError("it ran")))
    assert main(["ingest", "a", "b", "--sede", "3"]) == 2
    assert capsys.readouterr().err == "jem ingest: unknown setting --sede: did you mean --seed?\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrian"], "jem: unknown command pretrian: did you mean pretrain?"),
        (["encoders", "promot"], "jem: unknown command encoders promot: did you mean encoders promote?"),
        (["xyzzy"], "choose from demo, ingest"),
        (["recipes", "show", "vicreg-cifar10x"], "jem recipes show: unknown recipe"),
    ],
)
def test_misspelt_commands_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str):
    assert main(words) == 2
    assert said in capsys.readouterr().err


# --- help ---------------------------------------------------------------------------------------------------------


def test_overview_names_every_job(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {job.words}" in said for job in JOBS)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.words)
def test_every_job_has_help_and_a_function(capsys: pytest.CaptureFixture[str], job: Any):
    assert main([*job.words.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: jem {job.words}")
    assert all(field.upper() in said for field in job.positional)
    module, _, function = job.function.partition(":")
    source = Path(*module.split(".")).with_suffix(".py")
    root = Path(jem.__file__).parents[1]
    assert f"def {function}(config: {job.config})" in (root / source).read_text() or module == "pipelines.command"


def test_help_gives_each_setting_its_description_and_default(capsys: pytest.CaptureFixture[str]):
    main(["pretrain", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--train.batch_size int global: all workers together (default: 256)" in said
    rates = "(lars: 0.3, sgd: 0.06, adam: 0.001, adamw: 0.001)"
    assert f"--optimizer.lr float base rate for a global batch of 256 {rates}" in said
    assert "--method.mu float mu, weight of the variance term; 0 collapses (default: 25.0)" in said
    assert "From Parquet shards to uint8 batches." in said


@pytest.mark.parametrize(
    ("recipe", "argv", "setting", "value"),
    [
        ("deepcluster-cifar10-cpu", ["--method.prototypes", "[50, 50]"], "prototypes", (50, 50)),
        ("swav-cifar10-cpu", ["--method.prototypes", "50"], "prototypes", 50),
        ("byol-cifar10-cpu", ["--method.predictor", "null"], "predictor", None),
        ("simsiam-cifar10-cpu", ["--method.predictor", "64"], "predictor", 64),
        ("moco-cifar10-cpu", ["--method.momentum", "null"], "momentum", None),
        ("vicreg-cifar10", ["--method.name", "byol", "--method.predictor", "[8, 8]"], "predictor", (8, 8)),
    ],
)
def test_a_setting_has_the_type_that_the_chosen_method_gives_it(recipe, argv, setting, value):
    assert getattr(load("--recipe", recipe, *argv).method, setting) == value


def test_another_methods_setting_is_refused_by_its_name():
    said = refusal("--recipe", "byol-cifar10-cpu", "--method.mu", "2")
    assert said.startswith("method.mu is no setting of method byol: that has name, regularise, projector")


@pytest.mark.parametrize("chosen", [["--method.name", "supervised"], ["--config", "FILE"]])
def test_help_shows_the_settings_of_the_method_that_is_chosen(
    chosen: list[str], write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
):
    file = write("method: {name: supervised}\n")
    assert main(["pretrain", *(word.replace("FILE", file) for word in chosen), "--help"]) == 0
    said = capsys.readouterr().out
    assert "--method.label_smoothing" in said
    assert "--method.mu" not in said
    assert "settings are those of supervised" in said


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jem {jem.__version__}\n"


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    assert "vicreg-cifar10 " in capsys.readouterr().out
    assert main(["recipes", "show", "vicreg-cifar10"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optimizer"]["eta"] == 0.02


def test_the_command_and_the_module_are_the_same_program():
    for program in (["-m", "pipelines.command", "preview"], ["-m", "pipelines.preview"]):
        done = subprocess.run(
            [sys.executable, *program, "in", "out.png", "--stream.canvs", "3"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "jem preview: unknown setting --stream.canvs: did you mean --stream.canvas?\n"
