"""The tables of docs/sizing.md: what jobs cost by the planner, and beside it what committed records measured.

    python bench/sizing.py            print the tables
    python bench/sizing.py --write    write them into docs/sizing.md

Needs no weights, no network and no GPU. tests/test_sizing_page.py makes the tables again and compares.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from workloads import FULL, Workload

from pyarith.engine.sizing import JobShape, JobSize, size_of_job
from pyarith.reporting.profiles import amount, duration

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "sizing.md"
RECORD = ROOT / "bench" / "results" / "discovery.jsonl"
STREAMED = ROOT / "bench" / "results" / "streaming.jsonl"
START, END = "<!-- {} -->\n", "<!-- end of {} -->"
SHAPE = JobShape(prompts=100, tokens=16)
BUDGET = 4 * 2**30
GPU_RATE = 780e12  # stated for an H200 in bf16 (bench/NOTES.md), not measured
CPU_CASE = "llama12x12_bf16"  # whose measured rate, all costs included, stands for two CPU cores
MEASURED = ("small8x8", "llama12x12", "llama12x12_bf16", "llama12x12_long")

# sizes of published models: hidden, MLP, layers, heads, key-value heads, vocabulary
MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "1B (Llama-3.2)": ("llama", (2048, 8192, 16, 32, 8, 128256), {"head_dim": 64, "tie_word_embeddings": True}),
    "3B (Llama-3.2)": ("llama", (3072, 8192, 28, 24, 8, 128256), {"head_dim": 128, "tie_word_embeddings": True}),
    "7B (Llama-2)": ("llama", (4096, 11008, 32, 32, 32, 32000), {}),
    "8B (Llama-3.1)": ("llama", (4096, 14336, 32, 32, 8, 128256), {}),
    "13B (Llama-2)": ("llama", (5120, 13824, 40, 40, 40, 32000), {}),
    "32B (Qwen2.5)": ("qwen2", (5120, 27648, 64, 40, 8, 152064), {}),
    "70B (Llama-3.1)": ("llama", (8192, 28672, 80, 64, 8, 128256), {}),
    "405B (Llama-3.1)": ("llama", (16384, 53248, 126, 128, 8, 128256), {}),
}
_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def config_of(name: str) -> Any:
    kind, sizes, more = MODELS[name]
    return AutoConfig.for_model(kind, **{"tie_word_embeddings": False, **dict(zip(_NAMES, sizes, strict=True)), **more})


def config_of_workload(work: Workload) -> Any:
    sizes = (work.d_model, work.d_mlp, work.n_layers, work.n_heads, work.n_heads, work.d_vocab)
    return AutoConfig.for_model("llama", tie_word_embeddings=False, **dict(zip(_NAMES, sizes, strict=True)))


def records(file: Path = RECORD) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, provider) -> its last row."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {(row["name"], row["provider"]): row for row in rows}


def achieved(rows: dict[tuple[str, str], dict[str, Any]], case: str) -> float:
    """FLOP per second of a measured run: the planner's count over the measured time, in which all costs are."""
    return size_of_work(FULL[case]).flop / rows[case, "fast_patch"]["seconds"]["median"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def computed() -> str:
    rate = achieved(records(), CPU_CASE)
    header = [
        *("model", "parameters", "weights, bf16", "work", "of it captures", "one forward per sender"),
        *("prompts a block in 4 GiB", "all prompts in one block", "at 780 TFLOP/s"),
        f"at {amount(rate, 'FLOP')}/s",
    ]
    rows = []
    for name in MODELS:
        size = size_of_job(config_of(name), SHAPE, torch.bfloat16, rate=GPU_RATE, memory_budget=BUDGET, device="cuda")
        rows.append(
            [
                name,
                f"{size.parameters / 1e9:.2f} B",
                amount(size.weight_bytes),
                amount(size.flop, "FLOP"),
                f"{size.forecast.capture_flop / size.flop:.1%}",
                f"{size.literal_flop / size.flop:.0f} times",
                str(size.plan.prompts),
                amount(size.one_sweep_bytes),
                duration(size.forecast.seconds),
                duration(size.flop / rate),
            ]
        )
    return table(header, rows)


def measured() -> str:
    rows, lines = records(), []
    for case in MEASURED:
        run, floor, work = rows[case, "fast_patch"], rows[case, "floor"]["extra"], FULL[case]
        size = size_of_work(work)
        cost = size.forecast
        seconds = cost.capture_flop / floor["capture_flop_per_s"] + cost.replay_flop / floor["replay_flop_per_s"]
        took = run["seconds"]["median"]
        lines.append(
            [
                case,
                f"{work.batch} x {work.pos}",
                work.dtype,
                amount(size.flop, "FLOP"),
                duration(seconds),
                f"**{duration(took)}**",
                f"{took / seconds:.2f}",
                amount(cost.bytes),
                f"**{amount(run['peak_private_bytes'])}**",
            ]
        )
    header = [
        *("case", "prompts x tokens", "weights", "work", "time, computed", "time, measured", "measured / computed"),
        *("memory, computed", "memory, measured"),
    ]
    return table(header, lines)


def size_of_work(work: Workload) -> JobSize:
    """A case of the benchmark; its prompts differ in the middle token, as those of ``JobShape`` do."""
    dtype = getattr(torch, work.dtype)
    return size_of_job(
        config_of_workload(work), JobShape(work.batch, work.pos), dtype, rate=1.0, memory_budget=2**40, device="cpu"
    )


def streamed() -> str:
    """The 7B shape searched in less private memory than its weights take."""
    lines = []
    for (case, _), row in records(STREAMED).items():
        if case != "streaming llama2_7b":
            continue
        extra = row["extra"]
        seconds = extra["settings"]["seconds"]
        lines.append(
            [
                f"7B, {row['shape']['batch']} x {row['shape']['pos']}",
                f"{amount(extra['weight_bytes'])} bf16",
                row["dtype"],
                amount(extra["private_limit_bytes"]),
                f"**{amount(row['peak_private_bytes'])}**",
                f"**{duration(seconds['self-check'])}**",
                duration(extra["settings"]["forecast"]["seconds"]),
                f"**{duration(seconds['capture'] + seconds['replay'])}**",
                f"{1 / extra['forecast_over_measured']:.2f}",
            ]
        )
    header = [
        *("prompts x tokens", "weights", "computed in", "private memory allowed", "private peak, measured"),
        *("self-check, measured", "time, forecast", "time, measured", "measured / forecast"),
    ]
    return table(header, lines)


TABLES = {"computed": computed, "measured": measured, "streamed": streamed}


def rendered(page: str) -> str:
    """The page with all tables made anew."""
    for name, make in TABLES.items():
        start, end = START.format(name), END.format(name)
        before, rest = page.split(start)
        page = before + start + make() + end + rest.split(end)[1]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/sizing.md")
    if parser.parse_args().write:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"Wrote {PAGE}")
        return
    for make in TABLES.values():
        print(make())


if __name__ == "__main__":
    main()
