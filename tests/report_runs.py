"""Run directories for tests of the report, written by the package's own writers from made-up numbers: no model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny_models

from pyarith import analysis
from pyarith.discovery.discover import Discovery
from pyarith.discovery.knockout import Arm, KnockoutCurve
from pyarith.discovery.profile import Cost, PatchProfile
from pyarith.engine.profiling import HighWater, Roofline
from pyarith.evaluation.transfer_result import Cell, Control, TransferResult
from pyarith.prompts import ROLES, PromptPairs
from pyarith.reporting import RunDirectory, SavedRun, Step, judge
from pyarith.reporting.analyses import Analyses, Looked, record, tables
from pyarith.reporting.comparisons import comparison_record
from pyarith.reporting.knockouts import Chosen, curve_record, curve_rows
from pyarith.reporting.profiles import write_step as write_profile
from pyarith.reporting.tables import write_csv
from pyarith.result import PatchResult
from pyarith.stats import Clusters
from pyarith.tuning.compare import Comparison, Point
from pyarith.tuning.loop import COLUMNS
from pyarith.tuning.sft_result import TuneResult
from pyarith.types import Head

LAYERS, HEADS, PROMPTS, TOKENS = 3, 4, 36, 6
SIGNS = ("+", "*")
KEY = {"+": Head(1, 2), "*": Head(2, 0)}  # the one head with a large effect


class Words:
    """A tokenizer that can only decode; token 0 is whatever is to be foreign text."""

    def __init__(self, foreign: str = "zero") -> None:
        self.foreign = foreign

    def decode(self, ids: list[int]) -> str:
        return self.foreign if ids == [0] else f" t{ids[0]}"


def pairs_of(sign: str, prompt: str, seed: int = 0) -> PromptPairs:
    """Pairs with six values of each factor; the first prompt is ``prompt``, another seed gives other tokens."""
    rows = np.arange(PROMPTS)
    ids = np.arange(PROMPTS * TOKENS).reshape(PROMPTS, TOKENS) % (89 - seed)
    ids[0, 0] = 0
    names = ("other", "operand_a", "operator", "operand_b", "other", "other")
    return PromptPairs(
        prompts=(prompt, *(f"{sign} prompt {i}" for i in rows[1:])),
        corrupted_prompts=tuple(f"corrupted {i}" for i in rows),
        answer_texts=tuple(str(i) for i in rows),
        clean=ids,
        corrupted=ids + 1,
        attention_mask=np.ones_like(ids, bool),
        answers=rows,
        roles=np.tile(np.array([ROLES.index(name) for name in names], np.int8), (PROMPTS, 1)),
        strata={"pair": np.array([f"p{i % 6}" for i in rows]), "template": np.array([f"t{i // 6}" for i in rows])},
        settings={"operator": sign, "corruption": "operator", "dropped": {}},
    )


def discovery(sign: str, prompt: str, seed: int) -> Discovery:
    rng = np.random.default_rng([seed, ord(sign)])
    changes = rng.normal(0, 0.05, (LAYERS, HEADS, PROMPTS))
    changes[KEY[sign]] -= 3.0
    clean = rng.uniform(8, 12, PROMPTS)
    identity = np.tile(clean, (LAYERS, 1))
    result = PatchResult(
        clean_logits=clean,
        corrupted_logits=clean - 5,
        clean_log_probs=np.full(PROMPTS, -0.05),
        corrupted_log_probs=np.full(PROMPTS, -3.0),
        noise_floor=np.full(LAYERS, 3e-6),
        head_logits=identity[:, None] + changes,
        mlp_logits=identity + rng.normal(-1, 0.3, (LAYERS, PROMPTS)),
        identity_logits=identity,
        mlp_identity_logits=identity,
        verification_error=2e-6,
        semantics="path patching head -> logits",
        settings={"n_layers": LAYERS, "n_heads": HEADS, "backends": {"add_norm": "cpu"}, "family": "llama"},
    )
    right = np.arange(PROMPTS) != 5
    return Discovery(pairs_of(sign, prompt, seed), result, right, ~right, 1, 0, {"patching": 0.5})


def write_run(path: Path, *, signs: tuple[str, ...] = SIGNS, prompt: str = "a prompt", seed: int = 0) -> Path:
    """A discovery of made-up numbers."""
    run = RunDirectory(path)
    for sign in signs:
        found = discovery(sign, prompt, seed)
        run.add_discovery(sign, found, folder={"+": "add", "*": "mul"}[sign], judgement=judge(found))
    options: dict[str, Any] = {"settings": {"n": PROMPTS}, "seeds": {"prompts": 0}, "seconds": {"loading": 1.0}}
    run.finish("discover", tiny_models.make("llama"), name="made-up model", **options)
    return path


def add_knockout(path: Path, draws: int = 3) -> None:
    run, rng = SavedRun.open(path), np.random.default_rng(1)
    step = Step(run, "knockout", {"k": [1, 2], "threshold": -0.05})
    ranking = tuple(Head(layer, head) for layer in range(LAYERS) for head in range(HEADS))
    content, rows = {}, []
    for sign in run.signs:
        arms = {}
        for name in ("key", "random", "same_layer", "bottom", "kept"):
            n = draws if name in ("random", "same_layer") else 1
            correct = rng.random((n, 2, PROMPTS)) < {"key": 0.3, "kept": 0.5}.get(name, 0.8)
            sets, logit = ((ranking[:1], ranking[:2]),) * n, rng.normal(9, 1, (n, 2))
            arms[name] = Arm(name, sets, correct.mean(-1), logit, correct)
        found = KnockoutCurve(np.array([1, 2]), ranking, arms, PROMPTS, 1, 10.0, (0.1, 4.0), "knock-out, made up")
        counts = {"drawn": PROMPTS, "operand_pair_in_run": 4}
        content[sign] = curve_record(found, Chosen(pairs_of(sign, "x"), ranking, counts, ""), 0)
        rows += curve_rows(sign, found)
    write_csv(step.file("knockout.csv"), rows)
    step.finish({"curves": content}, {"knockout": 2.0})


def add_analysis(path: Path, *, foreign: str = "zero", prompt: str = "a prompt") -> None:
    """All analyses; the texts of token 0 and of the one prompt are given."""
    run, rng = SavedRun.open(path), np.random.default_rng(2)
    found = Analyses()
    for sign in run.signs:
        heads, roles = (KEY[sign], Head(0, 1)), ("operand_a", "operand_b", "operator", "first", "special", "other")
        mass = rng.dirichlet(np.ones(6), (2, PROMPTS))
        found.attention[sign] = analysis.AttentionMass(heads, roles, mass, np.ones((PROMPTS, 6), int), 1e-7)
        names = ["other", "operand_a", "operator", "operand_b", "other", "other"]
        tokens = [0, 11, 12, 13, 14, 15]
        found.looked[sign] = Looked(prompt, tokens, names, heads, rng.dirichlet(np.ones(TOKENS), 2))
        found.cosines[sign] = analysis.MlpCosines(*rng.normal(0, 0.2, (3, LAYERS, PROMPTS)), {"prompts": PROMPTS})
        found.cosines_left_out[sign] = 0
        ids = rng.integers(1, 80, (LAYERS, 2, 1, 3))
        ids[0, 0, 0, 0] = 0
        chances = np.sort(rng.random((LAYERS, 2, 1, 3)))[..., ::-1]
        found.lens[sign] = analysis.LogitLens(ids, chances, ids[:, 1], 4 * chances[:, 1])
        found.lens_prompts[sign] = prompt, foreign
        parts = [rng.normal(0, 1, shape) for shape in ((LAYERS, HEADS, PROMPTS), (LAYERS, PROMPTS), (PROMPTS,))]
        zero = np.zeros((LAYERS, PROMPTS))
        logits = parts[0].sum((0, 1)) + parts[1].sum(0) + parts[2]
        found.attribution[sign] = analysis.LogitAttribution(*parts, zero, zero[0], logits)
    if len(run.signs) > 1:
        found.overlap = analysis.overlap(run.results)
    else:
        found.reasons["overlap", ""] = "the run has one operator"
    step = Step(run, "analysis", {"top": 5, "prompt": None, "threshold": -0.05})
    for name, rows in tables(found, Words(foreign)).items():
        write_csv(step.file(name), rows)
    step.finish(record(found), {"analysis": 3.0})


def add_transfer(path: Path, task: str = "two-digit sums") -> TransferResult:
    """Three tasks, one of which the model never gets right, by two lists."""
    run, rng = SavedRun.open(path), np.random.default_rng(3)
    tasks, lists = (task, "control", "never right"), ("key +", "key *")
    intact = {name: np.full(20, name != "never right") for name in tasks}
    cells = []
    for name in tasks:
        for heads in lists:
            ok = intact[name] & (rng.random(20) < 0.6)
            drop = ok.sum() / intact[name].sum() - 1 if intact[name].any() else float("nan")
            accuracy = tuple(rng.uniform(0.7, 1, 3).tolist())
            control = Control(((Head(0, 0),),) * 3, accuracy, (-0.1,) * 3, (-0.125,) * 3, 0.25)
            change = float(ok.mean() - intact[name].mean())
            cells.append(
                Cell(
                    *(name, heads, ("1.2",), 20, int(intact[name].sum()), int(ok.sum()), drop, drop),
                    *(change, change - 0.1, change + 0.1, 0.03, int((intact[name] & ~ok).sum()), 0, 0.04),
                    *("bootstrap over items", ok, {"random": control}),
                )
            )
    result = TransferResult(tasks, lists, tuple(cells), intact, {"draws": 3})
    step = Step(run, "transfer", {"draws": 3})
    result.save(step.file("result.json"))
    write_csv(step.file("transfer.csv"), result.rows())
    step.finish({}, {"transfer": 4.0})
    return result


def add_tune(path: Path) -> list[float]:
    """A fine-tuning of 130 steps, more than the curve has points; returns its losses."""
    run, rng = SavedRun.open(path), np.random.default_rng(4)
    losses = np.exp(-np.arange(130) / 60 + rng.normal(0, 0.05, 130))
    zeros = np.zeros(130)
    history = {name: zeros for name in COLUMNS} | {"loss": losses, "task_loss": losses, "completion_tokens": zeros + 4}
    result = TuneResult(
        heads=(Head(1, 2), Head(2, 0)),
        mlps=(2,),
        shared_heads=(Head(1, 3),),
        n_parameters=12345,
        state_bytes={"slices": 49380, "gradients": 49380, "adamw": 98760},
        history=history,
        steps_per_epoch=65,
        resumed_at=None,
        settings={"lr": 0.003, "schedule": "cosine"},
        data={"task": {"source": "/", "examples": 400}},
        base="sha256:0",
        machine={"threads": 1},
        seconds={"training": 5.0},
        memory=2**29,
        prefix_cache=None,
    )
    step = Step(run, "tune", {"heads": ["1.2", "2.0"]})
    step.file("losses.csv").write_text(result.losses_csv())
    step.finish({"result": result.record()}, {"training": 5.0})
    return losses.tolist()


def add_compare(path: Path, arm: str = "full") -> dict[str, Any]:
    """Two arms at two rates with two seeds; returns the record."""
    run, rng = SavedRun.open(path), np.random.default_rng(5)
    tasks = ("target", "validation", "control")
    points = [
        Point(name, rate, seed, "chosen", size, {task: rng.random(40) < 0.8 for task in tasks}, 1.0, 0.3)
        for name, size in (("key heads", 100), (arm, 9000))
        for rate in (0.001, 0.01)
        for seed in (0, 1)
    ]
    base = {task: rng.random(40) < 0.6 for task in tasks}
    clusters = Clusters.of({"item": np.arange(40)})
    found = Comparison(("key heads", arm), "target", "validation", ("control",), base, tuple(points), clusters)
    split = SimpleNamespace(sizes={"train": 80, "target": 40, "validation": 40, "control": 40})
    record = comparison_record(found, found.summary(resamples=200), split)
    step = Step(run, "compare", {"operator": "+"})
    write_csv(step.file("runs.csv"), record["frontier"])
    step.finish({"comparison": record}, {"all": 6.0})
    return record


def add_profile(path: Path) -> PatchProfile:
    """A profile whose figures are easy to tell apart."""
    run = SavedRun.open(path)
    ops = (
        Cost("replay", "aten::mm", 64, 1.5, 3e12, 5 * 2**30, 0.8),
        Cost("capture", "pyarith::add_norm", 32, 0.25, 0.0, 2**30, 0.5),
    )
    phases = tuple(Cost(op.phase, "", 0, op.seconds, op.flop, op.bytes, op.roofline) for op in ops)
    facts = {"model": "tiny", "family": "llama", "n_layers": LAYERS, "n_heads": HEADS, "dtype": "fp32", "device": "cpu"}
    found = PatchProfile(
        result=replace(run.results["+"], settings=facts),
        phases=phases,
        ops=ops,
        seconds={"timed": 1.75, "counted": 4.0},
        unchanged=True,
        high_water=HighWater(3 * 2**20, "replay", {"replay rows": 2 * 2**20, "captured base": 2**20}),
        allocator_bytes=None,
        forecast={"capture_flop": 1e11, "replay_flop": 2.9e12, "bytes": 4 * 2**20, "seconds": 1.6},
        roofline=Roofline(2e12, 10 * 2**30),
    )
    step = Step(run, "profile", {"operator": "+"})
    step.finish(write_profile(step, found), found.seconds)
    return found


def write_all(path: Path, **options: Any) -> Path:
    """A run with every step."""
    write_run(path)
    add_knockout(path)
    add_analysis(path, **options)
    add_transfer(path)
    add_tune(path)
    add_compare(path)
    add_profile(path)
    return path
