"""The demo model with its linears quantised against itself in fp32: are the same heads found, in how many bytes?

    python bench/bench_quantised.py [--quick] [--n PROMPTS] [--out FILE]
    python bench/bench_quantised.py --page          # writes the record's table into docs/quantised.md

For every kind of quantisation and every operator: Spearman's rank correlation of the mean relative effects of all 48
heads with those of the fp32 model on the same prompts, and Jaccard overlap of the 5 and the 10 lowest heads and of the
key heads (below -5 %). Bytes are those of the tensors as they are stored, of the whole model and of the linears in its
blocks. Checked first: senders rerun literally, with hooks, on the quantised model. Targets, set before: int8 with a
rank correlation of at least 0.95 and an overlap of the top 5 of at least 0.8. What misses them is written as well.
``int8-weights`` and ``int4-groups`` (of 32 weights) are of torchao, ``LLM.int8``, ``nf4`` and ``fp4`` of bitsandbytes.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import BENCH, RESULTS, Check, Record, Row, Timing

PAGE = BENCH.parent / "docs" / "quantised.md"
START, END = "<!-- record -->\n", "<!-- end of record -->"
OPERATORS = ("+", "-", "*", "/")
TARGETS = {"spearman": 0.95, "jaccard_5": 0.8}
# relative to the largest logit; the second where activations are int8 (as the engine's own self-check)
BOUNDS = (1e-3, 0.2)


def kinds() -> dict[str, Callable[[], Any]]:
    """Name -> quantisation config; bf16 stands beside them as the usual way to halve a model."""
    from torchao import quantization as ao
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def four(quant_type: str) -> Any:
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
        )

    def groups() -> Any:
        return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))

    return {
        "fp32": lambda: None,
        "bf16": lambda: None,
        "LLM.int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "int8-weights": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
        "int4-groups": lambda: TorchAoConfig(groups()),
        "nf4": lambda: four("nf4"),
        "fp4": lambda: four("fp4"),
    }


def load(kind: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from pyarith.demo import MODEL_DIR

    options = {} if config is None else {"quantization_config": config}
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype, local_files_only=True, **options).eval()


def stored_bytes(model: Any) -> dict[str, int]:
    """Bytes of all tensors, and of the linears inside the blocks with their scales."""
    from pyarith.models.quantised import plain_tensors

    sizes = {"bytes_model": 0, "bytes_linears": 0}
    for name, whole in model.state_dict().items():
        for _, tensor in plain_tensors(name, whole):
            sizes["bytes_model"] += tensor.nbytes
            sizes["bytes_linears"] += tensor.nbytes if "_proj" in name else 0
    return sizes


def compare(found: Any, truth: Any) -> dict[str, float]:
    """Ranking and overlap of two results on the same prompts."""
    from pyarith.analysis import overlap

    results = {"fp32": truth, "found": found}
    shared = {k: float(overlap(results, k=k).jaccard[0, 1]) for k in (5, 10)}
    whole = overlap(results)
    return {
        "spearman": float(whole.spearman[0, 1]),
        "jaccard_5": shared[5],
        "jaccard_10": shared[10],
        "jaccard_key": float(whole.jaccard[0, 1]),
    }


def rows(
    kind: str, model: Any, pairs: dict[str, Any], truth: dict[str, Any] | None
) -> tuple[list[Row], dict[str, Any]]:
    """One row per operator, and one of the means over operators."""
    from pyarith import discover

    made, results, extras = [], {}, []
    for operator, chosen in pairs.items():
        done = discover(model, chosen, progress=False, verify=4)
        result = results[operator] = done.result
        quantised = result.settings.get("quantised", "")
        bound = BOUNDS["activations" in quantised] if kind != "bf16" else 0.1
        scale = max(1.0, float(np.abs(result.clean_logits).max()))
        extra: dict[str, Any] = {
            "accuracy": float(done.correct.mean()),
            "key_heads": [str(head) for head in result.key_heads()],
            "noise_floor": float(result.noise_floor.max()),
            **({} if truth is None else compare(result, truth[operator])),
        }
        extras.append(extra)
        made.append(
            Row(
                "quantised",
                kind,
                shape={"operator": operator, "prompts": len(chosen), "heads": int(result.head_effects.size)},
                dtype=str(model.dtype).removeprefix("torch."),
                check=Check("literal re-runs", result.verification_error / scale, bound),
                seconds=Timing.of([done.seconds["patching"]]),
                extra=extra | ({"quantised": quantised} if quantised else {}),
            )
        )
    means = {key: float(np.mean([e[key] for e in extras])) for key in extras[0] if key != "key_heads"}
    met = {f"{key}_meets_{least}": means[key] >= least for key, least in TARGETS.items() if key in means}
    worst = max((row.check for row in made), key=lambda check: check.error / check.bound)
    total = sum(row.seconds.median for row in made if row.seconds)
    extra = {**means, **met, **stored_bytes(model)}
    shape = {"operator": "all", "prompts": sum(map(len, pairs.values())), "heads": made[0].shape["heads"]}
    made.append(Row("quantised", kind, shape, made[0].dtype, worst, Timing.of([total]), extra=extra))
    return made, results


def table(lines: list[str]) -> str:
    """The table of docs/quantised.md from the lines of a record; kinds in the order in which they ran, fp32 last."""
    found: dict[str, list[Any]] = {}
    for line in lines:
        one = json.loads(line)
        found.setdefault(one["provider"], []).append(one)
    shown = [
        "| weights | Spearman (lowest) | top 5 | top 10 | key heads | accuracy | noise floor | linears | model, KiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in [*(kind for kind in found if kind != "fp32"), "fp32"]:
        *each, whole = found[kind]
        extra = whole["extra"]
        agrees = ["", "", "", ""]
        if kind != "fp32":
            lowest = min(one["extra"]["spearman"] for one in each)
            agrees = [
                f"{extra['spearman']:.3f} ({lowest:.3f})",
                *(f"{extra[f'jaccard_{k}']:.2f}" for k in (5, 10, "key")),
            ]
        sizes = [f"{extra[name] / 1024:,.0f}" for name in ("bytes_linears", "bytes_model")]
        cells = [kind, *agrees, f"{extra['accuracy']:.1%}", f"{extra['noise_floor']:.1e}", *sizes]
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown) + "\n"


def write_page() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    made = table((RESULTS / "quantised.jsonl").read_text(encoding="utf-8").splitlines())
    PAGE.write_text(before + START + made + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 prompts and one operator, to see that everything runs")
    parser.add_argument("--n", type=int, help="prompts per operator [400, or 16 with --quick]")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    parser.add_argument("--page", action="store_true", help="write the committed record's table into docs/quantised.md")
    arguments = parser.parse_args()
    if arguments.page:
        return write_page()
    import pyarith as pa

    logging.getLogger("transformers").setLevel(logging.ERROR)  # that a CPU is slow for this is known
    _, tokenizer = pa.load_demo()
    n = arguments.n or (16 if arguments.quick else 400)
    operators = OPERATORS[:1] if arguments.quick else OPERATORS
    pairs = {operator: pa.tasks.arithmetic(tokenizer, operator, n=n) for operator in operators}
    record = Record(
        arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "quantised.jsonl"), arguments.quick
    )
    truth = None
    for kind, config in kinds().items():
        made, results = rows(kind, load(kind, config()), pairs, truth)
        truth = results if truth is None else truth
        for row in made:
            record.write(row)


if __name__ == "__main__":
    main()
