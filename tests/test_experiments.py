"""The experiments: run in quick size end to end, kept as records, refused where they would mislead."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.demo import train
from pyarith.demo.vocabulary import build_tokenizer
from pyarith.errors import InputError
from pyarith.evaluation import Items
from pyarith.reporting.experiments import EXPERIMENTS, Plan, Subject, read, records
from pyarith.reporting.experiments.e09_dataset import pairs_of
from pyarith.reporting.experiments.e12_lens import kind
from pyarith.reporting.experiments.subject import mean_effects
from pyarith.reporting.files import file_hash

NAMES = ("E6", "E11", "E12")
QUICK = ("--quick", "--n", 24)


def pyarith(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def files(folder):
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


def refused(done, *parts):
    assert done.exit_code == 2, done.output
    for part in parts:
        assert part in done.output.replace("\n", " "), done.output


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def subject():
    return Subject(*pa.load_demo(), "pyarith demo model")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Three cheap experiments in quick size, with a page."""
    folder = tmp_path_factory.mktemp("experiments") / "records"
    done = pyarith("reproduce", *NAMES, *QUICK, "--out", folder, "--page", folder.parent / "page.md")
    assert done.exit_code == 0, done.output
    return folder, done


@pytest.fixture
def copied(quick, tmp_path):
    return Path(shutil.copytree(quick[0], tmp_path / "records"))


def changed(path, **entries):
    """A record with other entries."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# end to end


def test_each_experiment_leaves_a_record_and_a_section(quick):
    folder, done = quick
    page = (folder.parent / "page.md").read_text()
    for name in NAMES:
        record = json.loads((folder / f"{name}.json").read_text())
        assert record["experiment"] == name and record["quick"] and record["format"] == records.FORMAT
        assert record["settings"] == EXPERIMENTS[name].chosen(quick=True, n=24)
        assert record["model"]["name"] == "pyarith demo model" and record["model"]["fingerprint"].startswith("sha256:")
        assert record["seconds"] > 0 < record["cpu_seconds"] and record["versions"]["torch"] and record["results"]
        assert record["command_line"][0] == "pyarith"
        assert f"## {name} {EXPERIMENTS[name].title}" in page and f"(records/{name}.json)" in page
        assert EXPERIMENTS[name].paper in page and f"{name}  " in done.output
    assert "**Quick run** of E6, E11 and E12" in page and "the numbers mean nothing" in page
    assert "](records/E6.png)" in page and (folder / "E6.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(copied):
    before = files(copied)
    again = pyarith("reproduce", *NAMES, *QUICK, "--out", copied)
    assert again.exit_code == 0 and "Done already" in again.output and "E6, E11, E12" in again.output
    assert files(copied) == before
    other = pyarith("reproduce", "E12", *QUICK, "--seed", 3, "--out", copied)
    assert other.exit_code == 0 and "Done already" not in other.output
    assert read(copied / "E12.json")["settings"]["seed"] == 3
    forced = pyarith("reproduce", "E12", *QUICK, "--seed", 3, "--force", "--out", copied)
    assert forced.exit_code == 0 and "Done already" not in forced.output
    one = {name: value for name, value in files(copied).items() if name != "E12.json"}
    assert one == {name: value for name, value in before.items() if name != "E12.json"}


def test_the_same_seed_gives_the_same_numbers(copied):
    before = read(copied / "E12.json")["results"]
    assert pyarith("reproduce", "E12", *QUICK, "--force", "--out", copied).exit_code == 0
    assert read(copied / "E12.json")["results"] == before


def test_a_missing_picture_is_drawn_again_from_its_record(copied):
    (copied / "E6.png").unlink()
    done = pyarith("reproduce", "E6", *QUICK, "--out", copied, "--page", copied / "page.md")
    assert done.exit_code == 0 and "Done already" in done.output
    assert (copied / "E6.png").is_file() and "](./E6.png)" in (copied / "page.md").read_text()


def test_own_questions_for_the_data_set(tmp_path):
    file = tmp_path / "sums.csv"
    problems = pa.tasks.draw_problems("two_digit_sum", 24, 5)
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows([("prompt", "answer"), *((one.prompt, one.answer) for one in problems)])
    done = pyarith("reproduce", "E9", *QUICK, "--data", file, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    record = read(tmp_path / "out" / "E9.json")
    assert record["results"]["file"] == "sums.csv" and record["results"]["rows"] == 24
    assert record["settings"]["data_hash"] == file_hash(file) and not (tmp_path / "out" / "E9.jsonl").exists()


def test_models_with_shared_keys_are_compared(subject, tmp_path):
    tokenizer = build_tokenizer()
    settings = {**train.SETTINGS, "heads": 4, "kv_heads": 2, "layers": 2, "d_model": 32, "d_mlp": 64}
    model = train.build_model(tokenizer, settings).eval()
    other = Subject(model, tokenizer, "small", origin="a command")
    both = Subject(subject.model, subject.tokenizer, subject.name, also=(other,))
    plan = Plan.of(EXPERIMENTS, ["E2"], both, tmp_path, quick=True, n=24)
    (record,) = plan.run(["pyarith"])
    text = "\n".join(EXPERIMENTS["E2"].section(record))
    assert "2 x 4, GQA, 2 key-value heads" in text and "`small` was made by `a command`" in text and ", MHA" in text
    assert record["also"][0]["fingerprint"] == other.identity["fingerprint"]
    assert Plan.of(EXPERIMENTS, ["E2"], both, tmp_path, quick=True, n=24).todo == ()
    another = Subject(train.build_model(tokenizer, settings | {"seed": 9}).eval(), tokenizer, "small")
    both = Subject(subject.model, subject.tokenizer, subject.name, also=(another,))
    assert Plan.of(EXPERIMENTS, ["E2"], both, tmp_path, quick=True, n=24).todo == ("E2",)


# the parts


def test_registry_is_whole():
    assert [int(name[1:]) for name in EXPERIMENTS] == sorted(int(name[1:]) for name in EXPERIMENTS)
    assert {f"E{i}" for i in range(1, 13)} <= set(EXPERIMENTS)
    for name, one in EXPERIMENTS.items():
        assert one.name == name and set(one.quick) <= set(one.settings) and {"n", "seed"} <= set(one.settings)
        assert one.chosen(quick=True, n=7, seed=5) == {**one.settings, **one.quick, "n": 7, "seed": 5}


@pytest.mark.parametrize("corruption", pa.tasks.CORRUPTIONS)
def test_heads_are_chosen_and_tested_on_different_operand_pairs(subject, corruption):
    n, seed = 60, 2
    reported = set(subject.report("-", n, seed).strata["pair"])
    pairs = subject.pairs("-", n, seed, corruption)
    select = np.array([pair not in reported for pair in pairs.strata["pair"]])
    assert reported and 0.3 < select.mean() < 0.7
    effects = subject.effects("-", n, seed, corruption)
    chosen = subject.chosen_effects("-", n, seed, corruption)
    np.testing.assert_array_equal(chosen, mean_effects(effects[..., select]))
    assert not np.array_equal(chosen, mean_effects(effects))
    flat = [float(chosen[head]) for head in subject.ranking("-", n, seed, corruption)]
    assert flat == sorted(flat)


def test_questions_are_paired_with_others_of_their_length(subject):
    prompts = (
        "The sum of 3 and 4 is",
        "The sum of 2 and 5 is",
        "The sum of 1 and 2 is",
        "2 + 2 =",
        "The capital of Peru is",
    )
    items = Items(prompts, ("7", "7", "3", "4", "Lima"), "text")
    answers = dict(zip(items.prompts, items.answers, strict=True))
    for seed in range(8):
        pairs = pairs_of(items, subject.tokenizer, seed)
        assert pairs.strata["item"].tolist() == [0, 1, 2]  # the others have no partner of their length
        for clean, other in zip(pairs.prompts, pairs.corrupted_prompts, strict=True):
            assert answers[clean] != answers[other]
    with pytest.raises(InputError, match="equal length in tokens"):
        pairs_of(Items(prompts[3:], ("4", "Lima"), "text"), subject.tokenizer, 0)


def test_what_the_lens_shows_first():
    assert [kind(top, 7, (4, 3)) for top in (None, 7, 3, 9, 5, 10)] == [
        *("word", "answer", "operand", "neighbour", "neighbour", "number"),
    ]
    assert kind(3, 3, (6, 3)) == "answer"


def test_records_keep_six_digits():
    assert records.rounded({"a": [0.123456789, 1, None, True, "x"], "b": 1e-9 / 3}) == {
        "a": [0.123457, 1, None, True, "x"],
        "b": 3.33333e-10,
    }


# what bad input gets


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("E99",), ("expected some of E1, E2", "E99")),
        (("somewhere",), ("expected names such as E1 or all", "somewhere")),
        (("E4", "one", "two"), ("MODEL: expected one at most", "--also")),
        (("E2",), ("E2 compares with other models", "--also")),
        (("E4", "--data", __file__), ("none of E4 takes a file of questions",)),
        (("E9", "--data", "nowhere.csv"), ("expected a file of questions", "nowhere.csv")),
        (("E4", "/nowhere/at/all"), ("MODEL", "/nowhere/at/all")),
        (("E4", "--dtype", "int3"), ("dtype: expected one of",)),
    ],
)
def test_refusals(tmp_path, arguments, parts):
    refused(pyarith("reproduce", *arguments, "--quick", "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_records_of_one_model(copied, subject):
    record = json.loads((copied / "E6.json").read_text())
    changed(copied / "E6.json", model=record["model"] | {"fingerprint": "sha256:0", "name": "another"})
    before = files(copied)
    refused(pyarith("reproduce", "E4", "--quick", "--out", copied), "holds E6 of another model, 'another'")
    refused(pyarith("reproduce", "E6", *QUICK, "--out", copied), "'another'", "--force")
    with pytest.raises(InputError, match="expected records of one model"):
        records.read_all(copied, list(EXPERIMENTS))
    assert files(copied) == before
    assert Plan.of(EXPERIMENTS, ["E6"], subject, copied, quick=True, force=True).todo == ("E6",)


def test_a_quick_run_replaces_no_full_record(copied):
    changed(copied / "E11.json", quick=False)
    refused(pyarith("reproduce", "E11", *QUICK, "--force", "--out", copied), "quick", "full records of E11")


def test_all_without_other_models_leaves_the_comparison_out(subject, tmp_path):
    plan = Plan.of(EXPERIMENTS, ["all"], subject, tmp_path)
    assert list(plan.left_out) == ["E2"] and len(plan.todo) == len(EXPERIMENTS) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("{"), "no record of an experiment E12"),
        (lambda path: path.write_text('{"tool": "pyarith", "experiment": "E1"}'), "no record of an experiment E12"),
        (lambda path: changed(path, format=records.FORMAT + 1), "use the newer pyarith"),
        (
            lambda path: path.write_text(path.read_text().replace('"answer": 1.0', '"answer": 0.9')),
            "not those that were",
        ),
    ],
)
def test_records_that_are_not_as_written(copied, change, message):
    path = copied / "E12.json"
    before = path.read_text()
    change(path)
    assert path.read_text() != before
    refused(pyarith("reproduce", "E12", *QUICK, "--out", copied), message)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_file_in_place_of_the_folder(tmp_path, subject):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder"):
        Plan.of(EXPERIMENTS, ["E4"], subject, tmp_path / "file")


# training with shared keys and values


def test_key_value_heads_of_the_training_script(tmp_path):
    tokenizer = build_tokenizer()
    small = {**train.SETTINGS, "heads": 4, "d_model": 32, "layers": 1}
    assert train.build_model(tokenizer, small).config.num_key_value_heads == 4
    assert train.build_model(tokenizer, small | {"kv_heads": 2}).config.num_key_value_heads == 2
    for wrong in ({"kv_heads": 3}, {"heads": 5}, {"heads": 0}):
        with pytest.raises(InputError, match="kv_heads, heads, d_model"):
            train.build_model(tokenizer, small | wrong)


def test_the_command_that_made_a_model(tmp_path):
    assert train.command_of(tmp_path) == ""
    (tmp_path / "accuracy.json").write_text(json.dumps({"settings": {**train.SETTINGS, "seed": 1, "kv_heads": 2}}))
    assert (
        train.command_of(tmp_path) == f"python -m pyarith.demo.train --out {tmp_path.as_posix()} --seed 1 --kv-heads 2"
    )
    (tmp_path / "accuracy.json").write_text("[]")
    assert train.command_of(tmp_path) == ""
