"""The README does what it says, and the pages beside it that are written from the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "docs"))

import make_families  # noqa: E402


def blocks(language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_supported_models_are_those_of_the_registry():
    shown = README.split(make_families.START)[1].split(make_families.END)[0]
    assert shown == make_families.readme_table(), "run `python docs/make_families.py` to write the table anew"


def test_the_page_of_families_is_that_of_the_registry():
    shown = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert shown == make_families.families_page(), "run `python docs/make_families.py` to write the page anew"
    assert set(tiny_models.FAMILIES) == {*tiny_models.NAMES, *tiny_models.MOE, *tiny_models.MORE}


def test_ci_runs_the_test_command():
    command = next(block for block in blocks("sh") if "pytest" in block)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command.strip() == script.strip().splitlines()[-1]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_set_up_commands_name_what_exists():
    commands = [block.strip() for block in blocks("sh")[:2]]
    assert [command.count("\n") for command in commands] == [0, 0]
    assert (ROOT / "constraints.txt").is_file()
    assert "-e" in commands[1], "a non-editable install is shadowed by the checkout when tests run in it"


def test_commands_and_options_exist():
    from typer.testing import CliRunner

    from pyarith.cli import app

    for line in "".join(blocks("sh")[2:]).splitlines():
        _, command, *rest = line[line.index("pyarith ") :].split()  # a launcher may stand in front
        done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        for option in (word for word in rest if word.startswith("--")):
            assert option in done.output, option
    for command in re.findall(r"`pyarith ([a-z]+)", README):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_pictures_and_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target
    for name in re.findall(r"[\w/]*[A-Z]{4,}\.md\b", README):
        assert (ROOT / name).is_file(), name


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The example, run as a file in an empty folder."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "example.py").write_text("".join(blocks("python")))  # the second one goes on from the first
    command = [sys.executable, "example.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_example_has_ten_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_the_example_runs_and_prints_a_ranking(ran):
    _, printed = ran
    assert "noise floor" in printed
    ranked = re.findall(r"^\d+\.\d+ ([+-][\d.]+)% [+-][\d.]+ logits$", printed, re.MULTILINE)
    assert len(ranked) == 3 and [float(x) for x in ranked] == sorted(map(float, ranked))


def test_the_second_example_prints_a_curve_with_controls(ran):
    _, printed = ran
    assert "KnockoutCurve: " in printed
    assert re.findall(r"^ +(key|random|bottom|same_layer|kept) +[\d.]+%", printed, re.MULTILINE)


def test_the_example_writes_a_picture_and_a_result(ran):
    import pyarith as pa

    folder, _ = ran
    assert (folder / "heads.png").read_bytes()[:4] == b"\x89PNG"
    assert pa.PatchResult.load(folder / "addition").head_effects.size >= 48
