"""The command line end to end: what it prints and writes, what a pipe gets, what errors look like."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import byte_level
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.cli.loading import load
from pyarith.errors import InputError, NotAvailableError
from pyarith.models.families import FAMILIES
from pyarith.ops import native_info

ROOT = Path(__file__).parents[1]
CONTROL = re.compile(r"\x1b|\r|[\u2800-\u28ff\u2501]")  # escape codes, returns, spinners, bars


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Llama with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_level()
    tiny_models.make("llama", torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs that write to their default place do so in a folder of the test."""
    monkeypatch.chdir(tmp_path)


def pyarith(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyarith")


def discover(folder, *arguments):
    return pyarith("discover", folder, "--n", 8, "--verify", 1, *arguments)


def cells(output, name):
    """The cells of one line of a printed table."""
    line = next(line for line in output.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# demo: needs the shipped model


def test_demo_shows_all_operators_and_writes_a_run(tmp_path):
    done = pyarith("demo", "--n", 20, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    for name in ("corruption strength", "noise floor, in logits", "answered wrongly, kept", "left out: misaligned"):
        assert len(cells(done.stdout, name)) == 4, name
    assert "What this shows" in done.stdout and "What it does not show" in done.stdout
    assert not CONTROL.search(done.output)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] == "demo" and list(record["runs"]) == ["+", "-", "*", "/"]
    assert {run["summary"]["prompts"] for run in record["runs"].values()} == {20}
    for folder in ("add", "sub", "mul", "div"):
        rows = read(tmp_path / "run" / folder / "heads.csv")
        result = pa.PatchResult.load(tmp_path / "run" / folder / "result")
        assert len(rows) == result.head_effects.size >= 48
    assert (tmp_path / "run" / "heatmap.png").stat().st_size > 10_000


def test_demo_numbers_are_those_of_fast_patch(tmp_path):
    pyarith("demo", "--n", 20, "--seed", 3, "--out", tmp_path / "run")
    model, tokenizer = pa.load_demo()
    direct = pa.fast_patch(model, **pa.tasks.arithmetic(tokenizer, "*", n=20, seed=3).inputs(), verify=0)
    saved = pa.PatchResult.load(tmp_path / "run" / "mul" / "result")
    np.testing.assert_allclose(saved.head_effects, direct.head_effects, atol=1e-6)


# discover


def test_discover_prints_and_writes_what_fast_patch_finds(checkpoint, tmp_path):
    out = tmp_path / "run"
    done = discover(checkpoint, "--operator", "+", "--corruption", "operator", "--seed", 5, "--out", out)
    assert done.exit_code == 0, done.output
    found = load(str(checkpoint))
    pairs = pa.tasks.arithmetic(found.tokenizer, "+", n=8, seed=5)
    direct = pa.fast_patch(found.model, **pairs.inputs(), verify=1, progress=False)
    np.testing.assert_allclose(pa.PatchResult.load(out / "result").head_logits, direct.head_logits, atol=1e-5)
    first = direct.top(1)[0]
    ranked = cells(done.stdout.split("Heads:")[1], "1 ")
    assert ranked == [str(first.head), f"{first.effect:+.1%}", f"{first.logit_change:+.2f}"]
    assert cells(done.stdout, "prompts") == ["8"]
    record = json.loads((out / "run.json").read_text())
    assert record["seeds"] == {"prompts": 5} and record["settings"]["corruption"] == "operator"
    assert record["model"]["name"] == str(checkpoint) and record["runs"]["+"]["data"]["seed"] == 5
    assert sorted(record["files"]) == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def test_discover_takes_several_operators_words_and_styles(checkpoint, tmp_path):
    arguments = ("--operator", "plus", "--operator", "-", "--style", "equation", "--corruption", "operands")
    done = discover(checkpoint, *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert len(cells(done.stdout, "prompts")) == 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(record["runs"]) == ["+", "-"]
    for folder in ("add", "sub"):
        assert {row["style"] for row in read(tmp_path / "run" / folder / "prompts.csv")} == {"equation"}


def test_without_out_nothing_is_written(checkpoint, tmp_path):
    assert discover(checkpoint).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_run(checkpoint, tmp_path):
    arguments = ("--dtype", "fp64", "--memory-budget", "64MiB", "--mlps", "frozen", "--backend", "reference")
    done = discover(checkpoint, *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    patching = record["runs"]["+"]["patching"]
    assert record["model"]["dtype"] == patching["dtype"] == "float64"
    assert patching["memory_budget"] == 64 * 2**20 and patching["mlps"] == "frozen" and patching["verify"] == 1
    assert set(patching["backends"].values()) == {"reference"}


def test_wrongly_answered_prompts_are_kept_and_counted_unless_asked(checkpoint):
    done = discover(checkpoint)
    assert cells(done.stdout, "answered wrongly, kept") == ["8"]
    done = discover(checkpoint, "--only-correct")
    assert done.exit_code == 2 and "only_correct: expected prompts that the model answers correctly" in done.stderr


def test_a_second_run_replaces_the_first(checkpoint, tmp_path):
    for n in (4, 6):
        assert pyarith("discover", checkpoint, "--n", n, "--out", tmp_path / "run").exit_code == 0
    assert len(read(tmp_path / "run" / "prompts.csv")) == 6


# errors


def refused(done, *words):
    """One line, no traceback, exit code 2, nothing on stdout."""
    assert done.exit_code == 2, done.output
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("pyarith: error: ")
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr!r}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--operator", "%"), ("operator: expected one of +, -, *, /", "got '%'")),
        (("--corruption", "noise"), ("operator, operand_a, operand_b, operands", "got 'noise'")),
        (("--style", "poem"), ("equation, statement, question", "got 'poem'")),
        (("--dtype", "fp8"), ("dtype: expected one of auto, fp32, bf16", "got 'fp8'")),
        (("--device", "abacus"), ("device: expected auto, cpu, cuda", "got 'abacus'")),
        (("--device", "cuda:77"), ("device: expected one that torch sees, got 'cuda:77'",)),
        (("--mlps", "melted"), ("mlps: expected one of", "'melted'")),
        (("--backend", "fpga"), ("backend: expected one of", "'fpga'")),
        (("--memory-budget", "1KiB"), ("memory_budget: expected at least",)),
        (("--memory-budget", "much"), ("memory_budget: expected bytes",)),
        (("--n", 0), ("n: expected a positive whole number, got 0",)),
        (("--n", 10**6), ("asked for 1000000 pairs",)),
    ],
)
def test_bad_options_are_one_clear_line(checkpoint, arguments, words):
    refused(pyarith("discover", checkpoint, *arguments), *words)


def test_a_wrong_path_is_named(tmp_path):
    refused(pyarith("discover", tmp_path / "nowhere"), f"no folder '{tmp_path}/nowhere'")
    (tmp_path / "file").write_text("x")
    refused(pyarith("discover", tmp_path / "file"), "expected a folder or a hub name, got the file")
    refused(pyarith("discover", tmp_path), "expected a folder with config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(pyarith("discover", tmp_path), "with an adapter of PEFT alone")
    (tmp_path / "adapter_config.json").unlink()
    refused(pyarith("discover", "a/b/c"), "no hub name")


def test_an_uncached_hub_name_without_network_gets_a_clear_word(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ("'no-one/no-model' is no folder here and not in the local Hugging Face cache", "hub cannot be reached")
    refused(pyarith("discover", "no-one/no-model"), *words, "offline mode is enabled", "Give the path of a local")


def test_a_cached_hub_model_is_used_without_network(checkpoint, tmp_path, monkeypatch):
    commit = "a" * 40
    repo = tmp_path / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(checkpoint)
    code = (
        "from pyarith.cli.loading import load; import sys\n"
        "found = load('owner/tiny', note=lambda text: print(text, file=sys.stderr)); print(found.revision)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == commit, done.stderr
    assert "using the copy in the local cache" in done.stderr


def test_errors_of_the_hub_are_told_apart(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def answer(error):
        def model_info(self, name, **options):
            raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)

    def made(kind):
        return kind.__new__(kind, "no")  # their constructors want the response object of an HTTP library

    answer(made(RepositoryNotFoundError))
    with pytest.raises(InputError, match="neither a folder 'x/y' here nor a model of that name"):
        load("x/y")
    answer(made(RevisionNotFoundError))
    with pytest.raises(InputError, match="has no revision 'v9'"):
        load("x/y", revision="v9")
    answer(ConnectionError("cable cut"))
    with pytest.raises(NotAvailableError, match=r"cannot be reached \(cable cut\)"):
        load("x/y")


def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    refused(pyarith("discover", tmp_path / "bert"), "family 'bert' is not supported", *FAMILIES)


def copy(checkpoint, target, **changes):
    """A copy of the checkpoint with files changed; None leaves one out."""
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, content in changes.items():
        path = target / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return target


def test_broken_checkpoints_are_refused(checkpoint, tmp_path):
    broken = copy(checkpoint, tmp_path / "broken", model__safetensors=b"not tensors")
    refused(pyarith("discover", broken), "cannot load the weights")
    empty = copy(checkpoint, tmp_path / "empty", model__safetensors=None)
    refused(pyarith("discover", empty), "cannot load the weights")
    mute = copy(checkpoint, tmp_path / "mute", tokenizer__json=None, tokenizer_config__json=None)
    refused(pyarith("discover", mute), "cannot load the tokenizer")
    wild = copy(checkpoint, tmp_path / "wild", config__json=b"{")
    refused(pyarith("discover", wild), "cannot read the config")


def test_missing_weights_are_never_made_up(checkpoint, tmp_path):
    partial = copy(checkpoint, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    refused(pyarith("discover", partial), "model.layers.1.mlp.up_proj.weight", "which would be random")


def test_code_of_a_model_is_not_run_unless_asked(checkpoint, tmp_path):
    ran = tmp_path / "ran"
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config"}}
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Config(LlamaConfig): pass\n"
    own = copy(checkpoint, tmp_path / "own", config__json=json.dumps(config).encode(), code__py=code.encode())
    refused(pyarith("discover", own), "--trust-remote-code")
    assert not ran.exists()


def test_a_foreign_directory_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    refused(pyarith("discover", "/no/such/model", "--out", tmp_path), "out: expected a new or empty directory")
    refused(pyarith("demo", "--out", tmp_path), "out: expected a new or empty directory")


def test_debug_shows_the_traceback(tmp_path):
    done = pyarith("discover", tmp_path / "nowhere", "--debug")
    assert done.exit_code == 2 and "Traceback" in done.stderr and "pyarith: error: MODEL: no folder" in done.stderr


def test_errors_of_the_program_itself_are_not_hidden(checkpoint, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pyarith.cli.arithmetic.explore", fails)
    done = discover(checkpoint)
    assert isinstance(done.exception, ZeroDivisionError)


# doctor and the rest


def test_doctor_says_what_runs_and_why_not_the_rest():
    done = pyarith("doctor")
    assert done.exit_code == 0, done.output
    for word in (torch.__version__, "transformers", "Devices:", "cpu", "Extension:", *FAMILIES):
        assert word in done.stdout
    table = done.stdout.split("Can it run here")[1]
    native = native_info()
    for op in ("add_norm", "gated_act", "answer_logits", "head_write_rows"):
        assert cells(table, op)[3] == "yes", "the reference runs everywhere"
        assert cells(table, op)[0] == ("yes" if native["built"] or op == "head_write_rows" else "no")
    if not torch.cuda.is_available():
        assert "Why not cuda: " in table
    assert cells(done.stdout.split('What "auto" takes')[1], "add_norm")[2] == "reference"  # fp64


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = "import sys; from pyarith.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    for word in ("demo", "discover", "doctor"):
        assert word in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded & {"torch", "transformers", "numpy", "matplotlib", "scipy", "huggingface_hub"} == set()


def test_version():
    assert pyarith("--version").stdout == f"pyarith {pa.__version__}\n"


def test_a_pipe_gets_plain_text_and_nothing_on_stderr(checkpoint, tmp_path):
    command = [sys.executable, "-m", "pyarith", "discover", str(checkpoint), "--n", "8", "--out", str(tmp_path / "run")]
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not CONTROL.search(done.stdout) and "corruption strength" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:6])) <= 80


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_progress_bar(checkpoint):
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "pyarith", "discover", str(checkpoint), "--n", "8", "--verify", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(leader)
    assert process.returncode == 0, shown.decode()
    assert "Patching every head and MLP: addition +" in shown.decode() and "Loading weights" not in shown.decode()
