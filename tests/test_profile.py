"""profile_patch and forecasts from a config: counts against counts by hand; nothing that they do changes a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from typer.testing import CliRunner

import pyarith as pa
from pyarith.cli import app
from pyarith.engine import phases, profiling
from pyarith.engine.profiling import Account, PhaseTimes, Roofline
from pyarith.engine.sizing import JobShape, expect_room, parse_rate, size_of_job
from pyarith.errors import InputError, InputTypeError, MemoryBudgetError, UnsupportedModelError
from pyarith.models.random_weights import random_model
from pyarith.reporting.profiles import amount, duration

SHAPE = JobShape(prompts=5, tokens=12)
RATES = Roofline(1e11, 1e10)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Rates as if they had been measured: what the tests ask does not depend on them."""
    monkeypatch.setattr(Roofline, "measure", classmethod(lambda *_: RATES))


@pytest.fixture(scope="module")
def model():
    return tiny_models.make("llama-gqa2", torch.float32)


@pytest.fixture(scope="module")
def profile(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Roofline, "measure", classmethod(lambda *_: RATES))
        return pa.profile_patch(model, **SHAPE.inputs(tiny_models.VOCAB), verify=1)


def cost(profile, phase, op=""):
    return next(c for c in (profile.ops if op else profile.phases) if (c.phase, c.op) == (phase, op))


def test_the_result_is_that_of_a_plain_run(model, profile):
    plain = pa.fast_patch(model, **SHAPE.inputs(tiny_models.VOCAB), verify=1, progress=False)
    assert np.array_equal(plain.head_logits, profile.result.head_logits)
    assert np.array_equal(plain.mlp_logits, profile.result.mlp_logits)
    assert profile.unchanged


def test_phases_follow_each_other_and_cover_the_run(profile):
    names = [c.phase for c in profile.phases]
    assert names == ["self-check", "capture", "replay", "readout", "verify", "other"]
    assert sum(c.seconds for c in profile.phases) == pytest.approx(profile.seconds["timed"])
    assert profile.phases[0].seconds > 5e-4  # the model is checked in the timed run too, as in a user's first one


def test_flop_of_the_replay_is_that_of_its_matrices(model, profile):
    config = model.config
    rows = profile.result.settings["rows"]
    mlp = 3 * config.hidden_size * config.intermediate_size
    work = cost(profile, "replay")
    assert work.flop >= 2 * mlp * rows
    products = sum(c.flop for c in profile.ops if c.phase == "replay" and c.op in ("aten::mm", "aten::addmm"))
    assert products == 2 * mlp * rows
    senders = config.num_hidden_layers * config.num_attention_heads * SHAPE.prompts
    assert cost(profile, "replay", "pyarith::head_write_rows").flop == 2 * senders * config.hidden_size * (
        config.hidden_size // config.num_attention_heads
    )


def test_flop_and_bytes_of_ops_are_those_of_their_shapes():
    a, b, table = torch.ones(4, 8), torch.ones(8, 16), torch.ones(100, 8)
    out = torch.empty(4, 16)
    account = Account(torch.device("cpu"))
    with account, FlopCounterMode(display=False) as known:
        a @ b
        torch.mm(a, b, out=out)
        torch.nn.functional.embedding(torch.tensor([1, 2]), table)
        a[:, None].expand(4, 3, 8) + 1.0
        a.add_(1.0)
        a.view(8, 4)
        torch.empty(1000)
    found = {op: total for (_, op), total in account.totals.items()}
    assert found["aten::mm"].flop == 2 * 2 * 4 * 8 * 16 == known.get_total_flops()
    assert found["aten::mm"].bytes == 2 * 4 * (32 + 128 + 64) and found["aten::mm"].calls == 2
    assert found["aten::embedding"].bytes == 2 * 8 + 2 * (2 * 8 * 4)  # ids, the rows read, the rows written
    assert found["aten::add"].bytes == 4 * 32 + 4 * 96  # what is repeated is read once
    assert found["aten::add_"].bytes == 2 * 4 * 32
    assert found["aten::empty"].bytes == 0 and "aten::view" not in found


def test_attention_of_the_cpu_counts_two_products():
    q = torch.ones(1, 2, 8, 16)
    account = Account(torch.device("cpu"))
    with account, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert sum(total.flop for total in account.totals.values()) == 4 * 2 * 8 * 8 * 16


def test_the_high_water_mark_names_what_is_alive_then():
    account = Account(torch.device("cpu"))
    with phases.listening(account), account:
        with phases.phase("first"):
            rows = torch.ones(1000)
            phases.label("rows", rows)
            torch.ones(500)
        with phases.phase("second"):
            kept = torch.ones(800)
            first = account.high_water
            del rows
            torch.ones(100)
        assert account.high_water is first and (first.bytes, first.phase) == (7200, "second")
        assert first.held == {"rows": 4000, "second: ones [800] float32": 3200}
        more = torch.ones(1500)
    water = account.high_water
    assert (water.bytes, water.phase) == (9200, "other") and len(kept) + len(more) == 2300
    assert water.held == {"second: ones [800] float32": 3200, "other: ones [1500] float32": 6000}


def test_memory_of_a_run_is_within_its_forecast(profile):
    forecast, found = profile.compared["bytes beyond the model"]
    assert 0 < found <= forecast
    assert sum(profile.high_water.held.values()) == found
    assert any(name.startswith(("captured ", "replay ")) for name in profile.high_water.held)


@pytest.mark.parametrize("quantity", ["capture FLOP", "replay FLOP"])
def test_the_forecast_is_near_what_was_counted(profile, quantity):
    forecast, found = profile.compared[quantity]
    # attention scores and W_O rows are in no forecast, and large beside matrices of 32 columns; biases are in it
    assert 0.97 * forecast <= found <= 1.5 * forecast


def test_of_a_mixture_of_experts_only_those_count_that_a_token_meets():
    found = pa.profile_patch(tiny_models.make("mixtral", torch.float32), **SHAPE.inputs(tiny_models.VOCAB), verify=0)
    for quantity in ("capture FLOP", "replay FLOP"):
        forecast, counted = found.compared[quantity]
        assert 0.97 * forecast <= counted <= 1.5 * forecast, quantity


def test_a_share_of_the_roofline_is_the_longer_of_both_times():
    assert RATES.ceiling(2e11, 1e9) == 2.0 and RATES.ceiling(1e9, 3e10) == 3.0


def test_a_phase_costs_nothing_to_speak_of_and_hears_nobody_else():
    heard = []
    listener = SimpleNamespace(begin=heard.append, end=heard.append, label=None)
    with phases.phase("unheard"):
        pass
    with phases.listening(listener), pytest.raises(ValueError), phases.phase("failing"):
        raise ValueError
    with phases.phase("unheard"):
        pass
    assert heard == ["failing", "failing"]


def test_phases_are_ranges_of_nvtx_on_a_gpu(monkeypatch):
    calls = []
    fake = SimpleNamespace(range_push=calls.append, range_pop=lambda: calls.append("pop"))
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setattr(profiling, "mark", lambda device: 1.0)
    with phases.listening(PhaseTimes(torch.device("cuda"))), phases.phase("replay"):
        pass
    assert calls == ["pyarith replay", "pop"]


def test_a_trace_holds_the_phases(model, tmp_path):
    path = tmp_path / "new" / "trace.json"
    inputs = JobShape(2, 4).inputs(tiny_models.VOCAB)
    found = pa.profile_patch(model, **inputs, verify=0, memory_budget="8MiB", trace=path)
    assert found.result.settings["memory_budget"] == 8 * 2**20
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert {"pyarith capture", "pyarith replay", "aten::mm", "pyarith::add_norm"} <= names


def test_a_run_that_counting_changed_is_told(model, monkeypatch):
    from pyarith.discovery import profile as module

    real, runs = module.fast_patch, []

    def drifting(*arguments, **options):
        result = real(*arguments, **options)
        result.head_logits[0, 0, 0] += len(runs)
        runs.append(options["memory_budget"])
        return result

    monkeypatch.setattr(module, "fast_patch", drifting)
    found = pa.profile_patch(model, **JobShape(2, 4).inputs(tiny_models.VOCAB), verify=0)
    assert not found.unchanged
    assert len(set(runs)) == 1 and runs[0] > 0  # one budget, so the same blocks


def test_several_batches_are_refused(model):
    with pytest.raises(InputTypeError, match="clean: expected one batch"):
        pa.profile_patch(model, [SHAPE.inputs(tiny_models.VOCAB)])


# random weights


@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_random_weights_run_like_any_other(name):
    config = tiny_models.make(name, torch.float32).config
    before = torch.random.get_rng_state()
    made = random_model(config, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing was initialised to be overwritten
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} and not made.training
    again = random_model(config, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    other = random_model(config, torch.bfloat16, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))
    result = pa.fast_patch(made, **JobShape(2, 6).inputs(tiny_models.VOCAB), verify=1, progress=False)
    assert np.isfinite(result.head_logits).all() and result.head_logits.std() > 0


# forecast from a config


def test_a_forecast_from_a_config_is_that_of_the_run(model, profile):
    settings = profile.result.settings
    size = size_of_job(
        model.config, SHAPE, torch.float32, rate=1e9, memory_budget=settings["memory_budget"], device="cpu"
    )
    assert vars(size.plan) == settings["plan"]
    for name in ("capture_flop", "replay_flop", "bytes"):
        assert getattr(size.forecast, name) == settings["forecast"][name], name
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.forecast.seconds == pytest.approx(size.flop / 1e9)


def test_a_model_larger_than_any_machine_has_a_forecast():
    config = AutoConfig.for_model(
        "llama", hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    size = size_of_job(config, JobShape(100, 16), torch.bfloat16, rate=780e12, memory_budget=8 * 2**30, device="cuda")
    assert size.parameters == 405_853_388_800 and size.weight_bytes == 2 * size.parameters
    layers, heads = 126, 128
    rows = sum((heads + 1) * (j + 1) + j for j in range(layers))
    assert size.forecast.replay_flop == 2.0 * 3 * 16384 * 53248 * rows * 100
    assert size.forecast.bytes <= 8 * 2**30
    with pytest.raises(MemoryBudgetError, match=r"MODEL: weights of 756\.0 GiB in bfloat16 do not fit"):
        expect_room(config, torch.bfloat16, torch.device("cpu"))


def test_unknown_families_and_impossible_shapes_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"config: expected one of the families .*, got 'bert'"):
        size_of_job(AutoConfig.for_model("bert"), SHAPE, torch.float32, rate=1.0, memory_budget=2**30)
    with pytest.raises(UnsupportedModelError, match="got 'bert'"):
        random_model(AutoConfig.for_model("bert"), torch.float32)
    with pytest.raises(InputError, match="at least two tokens behind the prefix, got tokens=8, prefix=7"):
        JobShape(1, 8, 7)
    with pytest.raises(InputError, match="at least one prompt"):
        JobShape(0, 8)


@pytest.mark.parametrize(
    "text, rate", [("780T", 7.8e14), ("1.5e14", 1.5e14), ("120 GFLOP/s", 1.2e11), ("2PFLOPS", 2e15)]
)
def test_rates_are_read(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "0", "-1T", "1.2.3G", "780 TB"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(InputError, match="rate: expected FLOP per second"):
        parse_rate(text)


def test_sizes_and_times_have_three_digits():
    assert [amount(n) for n in (0, 900, 1536, 2.3 * 2**30, 999.4 * 2**20)] == [
        *("0 B", "900 B", "1.5 KiB", "2.3 GiB", "999 MiB")
    ]
    assert [amount(n, "FLOP") for n in (5e8, 999_600_000, 5.15e14)] == ["500 MFLOP", "1 GFLOP", "515 TFLOP"]
    times = (0, 0.0123, 0.9999, 5.678, 119.9, 200, 3 * 3600, 30 * 86400)
    assert [duration(t) for t in times] == [
        *("0 ms", "12.3 ms", "1000 ms", "5.68 s", "120 s", "3.33 min", "3 h", "30 days")
    ]


# the command


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_models.make("llama", torch.float32, vocab_size=50).config.save_pretrained(folder)
    return folder / "config.json"


def pyarith(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], prog_name="pyarith")


def test_a_config_is_enough(config, tmp_path):
    out = tmp_path / "profile.json"
    done = pyarith(config, "--random", "--shape", "prompts=3,tokens=6", "--out", out, "--dtype", "fp32")
    assert done.exit_code == 0, done.output
    for text in (
        "3 layers x 4 heads in float32 on cpu, 3 prompts",
        "By phase",
        "By op",
        "Most memory beyond",
        "Forecast",
    ):
        assert text in done.stdout
    record = json.loads(out.read_text())
    assert record["prompts"] == 3 and record["unchanged"] and record["ops"]
    printed = pyarith(config, "--random", "--shape", "prompts=3,tokens=6", "--dtype", "fp32", "--json")
    assert {cost["phase"] for cost in json.loads(printed.stdout)["phases"]} >= {"capture", "replay"}


def test_a_forecast_alone_runs_nothing(config, monkeypatch):
    monkeypatch.setattr("pyarith.discovery.profile.profile_patch", None)
    done = pyarith(config, "--forecast-only", "--rate", "1G", "--dtype", "bf16")
    assert done.exit_code == 0, done.output
    assert "Computed, not measured" in done.stdout and "at 1 GFLOP/s" in done.stdout
    record = json.loads(pyarith(config.parent, "--forecast-only", "--rate", "1G", "--json").stdout)
    assert record["shape"] == {"prompts": 100, "tokens": 16, "prefix": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a folder or a hub name, got the file"),
        (["--random", "--shape", "prompts=many"], "shape: expected prompts=N,tokens=N,prefix=N"),
        (["--random", "--shape", "heads=3"], "got 'heads=3'"),
        (["--random", "--dtype", "int4"], "dtype: expected one of auto"),
        (["--random", "--rate", "1G"], "rate: expected --forecast-only"),
        (["--forecast-only", "--rate", "much"], "rate: expected FLOP per second"),
        (["--forecast-only", "--trace", "x.json"], "trace: expected a run"),
        (["--random", "--operator", "+"], "operator: expected a RUN_DIR"),
    ],
)
def test_wrong_options_are_one_line(config, arguments, message):
    done = pyarith(config, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_run_is_profiled_with_its_own_model_and_prompts(tmp_path):
    run = tmp_path / "run"
    made = CliRunner().invoke(app, ["discover", "demo", "--n", "6", "--verify", "0", "--out", str(run)])
    assert made.exit_code == 0, made.output
    done = pyarith(run)
    assert done.exit_code == 0, done.output
    record = json.loads((run / "profile" / "profile.json").read_text())
    assert record["profile"]["prompts"] == json.loads((run / "run.json").read_text())["runs"]["+"]["summary"]["prompts"]
    assert "Done already" in pyarith(run).stdout
    for arguments, message in (
        (["--operator", "%"], "operator: expected one of the run's (+), got '%'"),
        (["--shape", "prompts=3"], "shape: expected none with the RUN_DIR"),
        (["--random"], "is a RUN_DIR; give its model instead"),
    ):
        refused = pyarith(run, *arguments)
        assert refused.exit_code == 2 and message in refused.stderr
