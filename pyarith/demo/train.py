"""Train the demo model: `python -m pyarith.demo.train --out DIR`.

A Llama of 1.4 million parameters, on lines of one to four problems with the loss on all tokens. The weak
operator is held weak by a thermostat: it is drawn only while its accuracy is below `--weak-target`; tasks that
are mastered are drawn at `--mastered-share` of their share. The attention of the first `--early-layers` layers
learns at `--early-rate` of the rate: without that everything sits in the heads of layer 0, with it the heads that
read operands and operators form in the middle layers, as they do in large models.

Writes the checkpoint, `log.csv` and `accuracy.json`. Same seed and thread count, same weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarith.demo.data import SHARES, TASKS, UNSCORED, Problem
from pyarith.demo.vocabulary import build_tokenizer
from pyarith.errors import check

if TYPE_CHECKING:
    from torch import Tensor

EVALUATION_SEED = 10_000_019  # its stream of problems is not the training stream
POOL = 1024  # lines drawn at a time
SETTINGS: dict[str, Any] = {
    **{"seed": 0, "steps": 4000, "tokens": 2048, "lr": 2e-3, "warmup": 200, "weight_decay": 0.1, "clip": 1.0},
    # kv_heads: key-value heads, fewer than heads share them in groups (GQA); 0 = as many as heads
    **{"layers": 6, "heads": 8, "kv_heads": 0, "d_model": 128, "d_mlp": 384, "weak": "/", "weak_target": 0.5},
    **{"threads": 1, "early_layers": 2, "early_rate": 0.05, "mastered_share": 0.5},
}


def padded(rows: list[list[int]]) -> Tensor:
    """Right-padded ids `[batch, pos]`, -100 on the padding."""
    import torch

    out = torch.full((len(rows), max(map(len, rows))), -100)
    for place, ids in zip(out, rows, strict=True):
        place[: len(ids)] = torch.tensor(ids)
    return out


def draw_batches(rng: random.Random, shares: dict[str, float], tokenizer: Any, tokens: int) -> Iterator[Tensor]:
    """Endless batches of about `tokens` tokens; lines of one to four problems, of like length within a batch.

    A pool of lines is drawn with the shares of the moment, sorted by length, cut into batches and shuffled.
    """
    names = list(shares)
    while True:
        pool = []
        for _ in range(POOL):
            drawn = rng.choices(names, [shares[name] for name in names], k=rng.randint(1, 4))
            pool.append("\n".join(" ".join(TASKS[name](rng)) for name in drawn))
        rows = sorted(([*ids, tokenizer.eos_token_id] for ids in tokenizer(pool)["input_ids"]), key=len)
        batches: list[list[list[int]]] = [[]]
        for row in rows:
            if len(row) * (len(batches[-1]) + 1) > tokens:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        for batch in batches:
            yield padded(batch)


def accuracy(model: Any, tokenizer: Any, problems: list[Problem]) -> float:
    """Share of problems whose every answer token is the model's first choice, given the tokens before it."""
    import torch

    with torch.no_grad():
        prompts = tokenizer([p.prompt for p in problems])["input_ids"]
        full = tokenizer([f"{p.prompt} {p.answer}" for p in problems])["input_ids"]
        width = max(map(len, full))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in full])
        guesses = model(ids).logits.argmax(-1)
    right = 0
    for row, (start, end) in enumerate(zip(map(len, prompts), map(len, full), strict=True)):
        right += bool((guesses[row, start - 1 : end - 1] == ids[row, start:end]).all())
    return right / len(problems)


def accuracy_table(model: Any, tokenizer: Any, count: int = 500, seed: int = EVALUATION_SEED) -> dict[str, float]:
    """Accuracy per scored task on `count` single problems each."""
    table = {}
    for name, draw in TASKS.items():
        if name not in UNSCORED:
            rng = random.Random(f"{seed} {name}")
            table[name] = accuracy(model, tokenizer, [draw(rng) for _ in range(count)])
    return table


def build_model(tokenizer: Any, settings: dict[str, Any]) -> Any:
    """An untrained model of the demo's shape.

    Raises:
        InputError: the heads do not divide the model's width, or the key-value heads do not divide the heads.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads = settings["heads"], settings["kv_heads"] or settings["heads"]
    fits = min(heads, kv_heads) > 0 and settings["d_model"] % heads == 0 and heads % kv_heads == 0
    check(
        fits,
        f"kv_heads, heads, d_model: expected each to divide the next, got {kv_heads}, {heads}, {settings['d_model']}",
    )

    torch.manual_seed(settings["seed"])
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings["d_model"],
            intermediate_size=settings["d_mlp"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def parameter_groups(model: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Weight decay on matrices only; the attention of the first `early_layers` layers learns slowly."""
    groups: dict[tuple[bool, bool], list[Any]] = {(a, b): [] for a in (False, True) for b in (False, True)}
    early = tuple(f"model.layers.{layer}.self_attn." for layer in range(settings["early_layers"]))
    for name, parameter in model.named_parameters():
        groups[name.startswith(early) if early else False, parameter.ndim > 1].append(parameter)
    rate, decay = settings["lr"], settings["weight_decay"]
    return [
        {
            "params": parameters,
            "lr": rate * (settings["early_rate"] if slow else 1.0),
            "peak": rate * (settings["early_rate"] if slow else 1.0),
            "weight_decay": decay if decayed else 0.0,
        }
        for (slow, decayed), parameters in groups.items()
        if parameters
    ]


def train(out: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Train with `settings`, save everything to `out`, return the accuracy table."""
    import torch

    torch.set_num_threads(settings["threads"])
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings)
    rng = random.Random(settings["seed"])
    steps, weak = settings["steps"], settings["weak"]
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=(0.9, 0.98), fused=True)
    weak_problems = [TASKS[weak](random.Random(f"{EVALUATION_SEED} weak {i}")) for i in range(400)]
    shares, log, began, running = dict(SHARES), [], time.time(), 0.0
    batches = draw_batches(rng, shares, tokenizer, settings["tokens"])
    for step in range(1, steps + 1):
        warm = min(1.0, step / settings["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        labels = next(batches)
        logits = model(labels.clamp(min=0)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % 25 == 0:
            weak_accuracy = accuracy(model, tokenizer, weak_problems)
            shares[weak] = SHARES[weak] if weak_accuracy < settings["weak_target"] else 0.0
        if step % 250 == 0 or step == steps:
            row = {"step": step, "seconds": round(time.time() - began), "loss": round(running / (step % 250 or 250), 4)}
            scores = accuracy_table(model, tokenizer, 200)
            row |= {"weak_share": shares[weak], **scores}
            for name in scores.keys() - {weak}:
                shares[name] = SHARES[name] * (settings["mastered_share"] if scores[name] >= 0.97 else 1.0)
            log.append(row)
            running = 0.0
            print(row, flush=True)
            model.save_pretrained(out)  # so that a run can be looked at, and is not lost, before its end
            tokenizer.save_pretrained(out)
    return save(out, model, tokenizer, settings, log)


def save(out: Path, model: Any, tokenizer: Any, settings: dict[str, Any], log: list[Any]) -> dict[str, float]:
    """Write checkpoint, tokenizer, log and accuracy table."""
    model.eval()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with open(out / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[0]))
        writer.writeheader()
        writer.writerows(log)
    table = accuracy_table(model, tokenizer)
    record = {"settings": settings, "problems_per_task": 500, "accuracy": table}
    (out / "accuracy.json").write_text(json.dumps(record, indent=2) + "\n")
    return table


def command_of(folder: Path) -> str:
    """The command that trained the model in a folder, from what `save` left there; empty for any other model."""
    try:
        settings = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))["settings"]
        changed = {name: settings[name] for name, value in SETTINGS.items() if settings.get(name, value) != value}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    return f"python -m pyarith.demo.train --out {folder.as_posix()}{options}"


def main() -> None:
    """Command line: one option per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    print(json.dumps(train(options.pop("out"), options), indent=2))


if __name__ == "__main__":
    main()
