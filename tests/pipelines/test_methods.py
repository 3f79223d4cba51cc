"""`jem methods`, and the README's table, which is its output."""

from __future__ import annotations

import pytest

from jem.config import METHODS
from pipelines.command import main
from tests.conftest import REPOSITORY


def test_every_method_is_listed_with_all_that_a_user_chooses_by(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    for line, settings in zip(lines[1:], METHODS.values(), strict=True):
        traits = settings.traits
        assert all(fact in line for fact in (traits.title, traits.family, traits.prevents, traits.paper, *traits.needs))


def test_the_readmes_table_is_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_settings_name_the_method_that_they_are_listed_under(name: str) -> None:
    assert METHODS[name]().name == name
