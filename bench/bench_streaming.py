"""`fast_patch` on weights that stay in their files, against the same model in memory.

    python bench/bench_streaming.py [--quick] [--rounds N] [--out FILE]
    python bench/bench_streaming.py --large FOLDER [--prompts 2] [--cast] [--out FILE]

Providers of the first form: ``in memory`` (every weight copied into the process), ``streamed`` (views of the mapped
file, layer by layer) and ``streamed, cast`` (two buffers, from a file in bf16; its own rival is the fp32 model of those
weights in memory). Peaks are private memory above the bare process, each in a new process with a budget of 64 MiB.

The second form makes (once, 13.5 GB) a random bf16 checkpoint of the LLaMA2-7B shape in FOLDER and searches it in a
process whose private memory is limited to a quarter of the model: all 1,024 heads and 32 MLPs on a few prompts. With
``--cast`` it computes in fp32, layer by layer, which is faster on a CPU without bf16 instructions.
"""

import argparse
import copy
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from case_speed import run_fast_patch, sender_logits
from harness import RESULTS, Check, Record, Row, Timing, relative_error, time_rounds
from memory import PeakMemory, status_bytes
from workloads import FULL, Workload, build_inputs, build_model, quick

MIB = 2**20
BUDGET = 64 * MIB
BOUND = 1e-5
SEVEN_B = Workload("llama2_7b", 32, 32, 4096, 11008, 32000, batch=2, pos=16, dtype="bfloat16")
LARGE_BUDGET = 2**30
LEAST_LIMIT = 256 * MIB  # of a smoke test, whose model is smaller than what threads and libraries need


def in_memory(folder: Path, dtype: torch.dtype) -> Any:
    """The checkpoint with every weight owned by the process: transformers too maps files where it can."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def peak(folder: Path, workload: Workload, dtype: torch.dtype | None) -> dict[str, Any]:
    """Private peak of opening and searching a streamed checkpoint, after a search of the demo model."""
    import pyarith

    inputs = build_inputs(workload)
    warm, _ = pyarith.load_demo()
    small = {"clean": inputs["clean"][:2] % 600, "corrupted": (inputs["clean"][:2] + 1) % 600}
    run_fast_patch(warm, {**small, "answers": inputs["answers"][:2] % 600}, memory_budget=BUDGET)
    with PeakMemory() as memory:
        model = pyarith.stream_checkpoint(folder, device="cpu", dtype=dtype)
        run_fast_patch(model, inputs, memory_budget=BUDGET)
    return {"private": memory.private_bytes, "resident": memory.resident_bytes}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run(record: Record, workload: Workload, rounds: int) -> None:
    import pyarith

    inputs = build_inputs(workload)
    with tempfile.TemporaryDirectory() as made:
        wide, narrow = Path(made) / "fp32", Path(made) / "bf16"
        model = build_model(workload)
        model.save_pretrained(wide)
        copy.deepcopy(model).bfloat16().save_pretrained(narrow)
        layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
        weights = sum(p.nbytes for p in model.parameters())
        models = {
            "in memory": in_memory(wide, torch.float32),
            "streamed": pyarith.stream_checkpoint(wide, device="cpu"),
            "in memory, cast": in_memory(narrow, torch.float32),
            "streamed, cast": pyarith.stream_checkpoint(narrow, device="cpu", dtype=torch.float32),
        }
        logits = {name: sender_logits(run_fast_patch(one, inputs)) for name, one in models.items()}
        rivals = {name: name.replace("streamed", "in memory") for name in models}
        checks = {
            name: Check(rival, relative_error(logits[name], logits[rival]), BOUND).require(name)
            for name, rival in rivals.items()
        }
        calls = {name: (lambda one=one: run_fast_patch(one, inputs)) for name, one in models.items()}
        samples = {name: Timing.of(values) for name, values in time_rounds(calls, rounds).items()}
        peaks = {
            "streamed": in_new_process(peak, wide, workload, None),
            "streamed, cast": in_new_process(peak, narrow, workload, torch.float32),
        }
        for name, rival in rivals.items():
            extra: dict[str, Any] = {
                "same_bits": bool(torch.equal(logits[name], logits[rival])),
                "weight_bytes": weights,
            }
            if name != rival:
                allowed = 2 * layer_bytes + BUDGET
                extra |= {
                    "over_in_memory": samples[name].median / samples[rival].median,
                    "budget_bytes": BUDGET,
                    "layer_bytes": layer_bytes,
                    "resident_peak_bytes": peaks[name]["resident"],
                    "over_two_layers_and_budget": peaks[name]["private"] / allowed,
                }
            record.write(
                Row(
                    name=f"streaming {workload.name}",
                    provider=name,
                    shape=workload.shape,
                    dtype=workload.dtype,
                    check=checks[name],
                    seconds=samples[name],
                    flop=workload.flop,
                    bytes=workload.bytes,
                    peak_private_bytes=peaks[name]["private"] if name in peaks else None,
                    extra=extra,
                )
            )


def make_checkpoint(folder: Path, workload: Workload) -> None:
    """A random Llama, shard by shard, each layer a file; never more than one layer in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=workload.d_vocab,
        hidden_size=workload.d_model,
        intermediate_size=workload.d_mlp,
        num_hidden_layers=workload.n_layers,
        num_attention_heads=workload.n_heads,
        num_key_value_heads=workload.n_heads,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=workload.dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    dtype, d, deviation = getattr(torch, workload.dtype), workload.d_model, 0.6 / workload.d_model**0.5

    def noise(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).normal_(std=deviation, generator=generator)

    parts = {
        "embed": {"model.embed_tokens.weight": noise(workload.d_vocab, d)},
        "head": {"lm_head.weight": noise(workload.d_vocab, d), "model.norm.weight": torch.ones(d, dtype=dtype)},
    }
    placed = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, f"{name}.safetensors"))

    for name, tensors in parts.items():
        write(name, tensors)
    for layer in range(workload.n_layers):
        shapes = {f"self_attn.{part}_proj": (d, d) for part in "qkvo"}
        shapes |= {"mlp.gate_proj": (workload.d_mlp, d), "mlp.up_proj": (workload.d_mlp, d)}
        shapes |= {"mlp.down_proj": (d, workload.d_mlp)}
        tensors = {f"model.layers.{layer}.{name}.weight": noise(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(d, dtype=dtype)
        write(f"layer{layer}", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config.save_pretrained(folder)  # last: a folder with a config is whole


def search_limited(folder: Path, workload: Workload, at_least: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """Search the checkpoint with private memory limited to what the bare process has and a quarter of the weights."""
    import pyarith

    inputs = build_inputs(workload)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    limit = max(weights // 4, at_least)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + limit,) * 2)
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = pyarith.stream_checkpoint(folder, device="cpu", dtype=dtype)
        opened = time.perf_counter() - start
        start = time.perf_counter()
        result = run_fast_patch(model, inputs, memory_budget=LARGE_BUDGET, verify=1)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "private": memory.private_bytes,
        "verification_error": result.verification_error,
        "largest_logit": float(abs(result.clean_logits).max()),
        "noise_floor": float(result.noise_floor.max()),
        "extra": {
            "open_seconds": opened,
            "weight_bytes": weights,
            "private_limit_bytes": limit,
            "resident_peak_bytes": memory.resident_bytes,
            "settings": {**result.settings, "model": folder.name},  # where it lies is no part of a record
        },
    }


def run_large(record: Record, folder: Path, workload: Workload, cast: bool) -> None:
    if not (folder / "config.json").is_file():
        make_checkpoint(folder, workload)
    found = in_new_process(search_limited, folder, workload, LEAST_LIMIT, torch.float32 if cast else None)
    settings = found["extra"]["settings"]
    took = settings["seconds"]
    searched = found["seconds"] - took["verify"]  # what is forecast, and the self-check that comes once for a model
    record.write(
        Row(
            name=f"streaming {workload.name}",
            provider="streamed, cast" if cast else "streamed",
            shape=workload.shape,
            dtype="float32" if cast else workload.dtype,
            # the strongest sender again, literally, with hooks
            check=Check("literal re-run", found["verification_error"] / found["largest_logit"], 0.1),
            seconds=Timing.of([searched]),
            flop=workload.flop,
            bytes=workload.bytes,
            peak_private_bytes=found["private"],
            extra={
                **found["extra"],
                "noise_floor": found["noise_floor"],
                "forecast_over_measured": settings["forecast"]["seconds"] / (took["capture"] + took["replay"]),
                "self_check_seconds": took["self-check"],
                "flop_per_second": workload.flop / searched,
                "private_peak_over_weights": found["private"] / found["extra"]["weight_bytes"],
            },
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--large", type=Path, metavar="FOLDER", help="where the checkpoint of the 7B shape is or goes")
    parser.add_argument("--prompts", type=int, default=SEVEN_B.batch, help="pairs of the large case")
    parser.add_argument("--cast", action="store_true", help="compute the large case in fp32")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    path = arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "streaming.jsonl")
    record = Record(path, arguments.quick)
    if arguments.large:
        large = replace(SEVEN_B, batch=arguments.prompts)
        run_large(record, arguments.large, replace(quick(large), batch=2) if arguments.quick else large, arguments.cast)
    else:
        work = FULL["llama12x12"]
        run(record, quick(work) if arguments.quick else work, arguments.rounds)
