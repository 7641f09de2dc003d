"""Tasks of the lm-evaluation-harness, run by its own Python API (extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyarith.engine.guard import untouched
from pyarith.errors import InputError, NotAvailableError, check
from pyarith.models.sites import resolve


def harness_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What ``lm_eval.simple_evaluate`` says of a model, as it is or inside ``pa.ablated`` or ``pa.load_delta``.

    Args:
        model: a supported Hugging Face causal LM, left unchanged.
        tokenizer: its tokenizer.
        tasks: the harness's names of tasks.
        include_path: a folder with tasks of one's own (YAML).
        limit: items per task; None takes all.
        batch_size: of the harness.
        seed: of its few-shot examples and sampling.
    Returns:
        One dictionary a task and metric: task, metric, filter, value, stderr (None where it has none), n.
    Raises:
        NotAvailableError: lm-eval is not installed.
        InputError: no task, or one that the harness does not know.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NotAvailableError(f"lm-eval: not installed ({error}); pip install 'pyarith[eval]'") from error
    check(bool(tasks), "tasks: expected at least one task of the lm-evaluation-harness, got none")
    sites = resolve(model)
    folder = None if include_path is None else str(include_path)
    # reading the harness's own thousands of tasks takes long: only where one of them is asked for
    manager = TaskManager(include_path=folder, include_defaults=False)
    if any(name not in manager.all_tasks for name in tasks):
        manager = TaskManager(include_path=folder)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"tasks: the lm-evaluation-harness does not know {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "what it has, and include_path adds a folder of tasks"
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(sites.device))
    with untouched(model):
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="ERROR",
        )
    rows = []
    for task, metrics in found["results"].items():
        size = found["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            spread = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    **{"task": task, "metric": metric, "filter": kind, "value": float(value)},
                    **{"stderr": float(spread) if isinstance(spread, int | float) else None, "n": size},
                }
            )
    return rows
