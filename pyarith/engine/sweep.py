"""``ablation_sweep``: the total effect of ablating heads and MLPs, each set of them in turn, everything recomputed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pyarith import ops
from pyarith.ablation_result import AblationSweep, parse_sets
from pyarith.engine.baselines import Baseline, ZeroAblation
from pyarith.engine.batch import read_ids
from pyarith.engine.guard import untouched
from pyarith.engine.planner import parse_bytes
from pyarith.engine.progress import Bar, Progress, check_progress
from pyarith.engine.references import one_batch
from pyarith.engine.store import Store, circumstances
from pyarith.engine.sweep_collect import Options, Prompts
from pyarith.engine.sweep_run import run
from pyarith.errors import BackendError, InputTypeError, check
from pyarith.models.sites import ModelSites, refuse_own_attention, resolve
from pyarith.ops._registry import NAMES as BACKENDS
from pyarith.prompts import PromptPairs

_SEMANTICS = {
    "all": "total effect: z of the ablated heads (and the write of ablated MLPs) replaced at all positions, "
    "everything downstream recomputed",
    "end": "total effect of END: z of the ablated heads (and the write of ablated MLPs) replaced at END only, "
    "everything downstream recomputed (keys and values of earlier positions stay clean by causality)",
}
_OPS = ("add_norm", "gated_act", "answer_logits", "head_write_rows")
_OWN_OPS = ("ablate_heads", "shared_prefix_attention")


def ablation_sweep(
    model: Any,
    input_ids: Any,
    answers: Any = None,
    *,
    attention_mask: Any = None,
    sets: Iterable[Any] | None = None,
    baseline: Baseline | None = None,
    positions: str = "all",
    predictions: bool = False,
    foils: Any = None,
    memory_budget: int | str | None = None,
    backend: str = "auto",
    verify: int = 2,
    progress: Progress = None,
    resume: str | Path | None = None,
) -> AblationSweep:
    """Ablate each set of heads and MLPs in turn, everything downstream recomputed, and read the answer's logit.

    For a set that starts in layer l, with z[h] := baseline[h] for its heads at ``positions``:

        row    = clean residual after attention l + sum over its heads (baseline - z_clean)[h] @ W_O[l][:, h].T
        row   += MLP_l(norm(row));  for j > l:  row += attention_j(row);  row += MLP_j(norm(row))
        logit  = final_norm(row at END) . W_U[answer]

    Layers before the first ablated one are the clean run and are not recomputed; many sets share each forward pass.
    With ``positions="end"`` the rows are END's alone: they attend to one stored copy of the clean keys and values. Both
    equal one hooked forward pass per set up to rounding. The model is never changed.

    Args:
        model: a supported Hugging Face causal LM, any device, fp32, fp64, bf16 or fp16.
        input_ids: int64 [batch, pos], or a ``PromptPairs`` (its clean prompts, answers and mask).
        answers: int64 [batch] id of the one token after the prompt.
        attention_mask: 0/1 [batch, pos], padding left or right; None = no padding.
        sets: None = every head alone; or a list of sets, each an ``Ablation``, a head ``(layer, head)``, or a list of
            heads and ``("mlp", layer)``.
        baseline: what replaces z and the MLP's write; None = ``ZeroAblation()``.
        positions: "all" (knock-out) or "end" (at END only).
        predictions: also the most probable next token of every set.
        foils: int64 [batch, k] other answers whose logits are wanted too.
        memory_budget: bytes or a text such as "2GiB" beyond the model; None = half of what is free on its device, on a
            GPU at most 16 GiB.
        backend: "auto" or the name of an op backend; by name it runs or raises. ``ablate_heads`` and
            ``shared_prefix_attention`` run in their automatic backend where they have none of that name.
        verify: number of sets re-run literally with hooks, on at most two prompts; 0 = none.
        progress: None = a bar on a terminal, False = none, or a callable ``(done, total)`` in ablated prompts.
        resume: a folder in which finished chunks of sets are kept as they are done: the same call after a kill goes on
            from there and gives the same bits. They are taken only where model, inputs, sets, baseline, block sizes,
            versions, device and threads are the same, and their file is whole; one folder may serve many calls, also
            of several processes. Without ``memory_budget`` the block sizes of the interrupted run stay as long as they
            fit into what is free. Deleting the folder is the caller's business. None = keep nothing.

    Returns:
        An ``AblationSweep``; its ``settings`` hold plan, forecast, backends, timings and versions.

    Raises:
        InputError, InputTypeError: an argument is wrong; absent heads are all named.
        UnsupportedModelError: the model's family, wrapping or placement is not supported, and why; with
            ``positions="end"`` families whose attention does not go through the ``AttentionInterface``.
        SelfCheckError: with nothing ablated the sweep does not give the model's own logits, or a literal re-run
            contradicts it.
        NonFiniteError: NaN or infinity met.
        MemoryBudgetError: the budget is too small; the smallest that works is named.
        BackendError: a backend asked for by name cannot run, and why.
        StorageError: a finished chunk cannot be written to ``resume``.

    References: Wang et al. 2022, arXiv:2211.00593, sec. 2 (knock-outs); Juravsky et al. 2024, arXiv:2402.05099
        (attention to a shared prefix).
    """
    if isinstance(input_ids, PromptPairs):
        given = [
            name for name, value in (("answers", answers), ("attention_mask", attention_mask)) if value is not None
        ]
        check(not given, f"{given}: expected inside the PromptPairs, not beside it")
        inputs = input_ids.inputs()
        input_ids, answers, attention_mask = inputs["clean"], inputs["answers"], inputs["attention_mask"]
    check(answers is not None, "answers: expected int64 [batch] beside input_ids, got None", InputTypeError)
    check(positions in _SEMANTICS, f"positions: expected one of {sorted(_SEMANTICS)}, got {positions!r}")
    check(
        isinstance(verify, int) and not isinstance(verify, bool) and verify >= 0,
        f"verify: expected a number of sets >= 0, got {verify!r}",
    )
    check_progress(progress)
    baseline = ZeroAblation() if baseline is None else baseline
    check(
        isinstance(baseline, Baseline),
        f"baseline: expected ZeroAblation, MeanAblation or ResampleAblation, got {type(baseline).__name__}",
        InputTypeError,
    )
    budget, store = parse_bytes(memory_budget), Store(resume)
    sites = resolve(model)
    if positions == "end":
        refuse_own_attention(sites, "positions='end'", "use positions='all'")
    wanted = parse_sets(sets, sites.n_layers, sites.n_heads)
    backends = _backends(sites, backend)
    prompts = _prompts(sites, input_ids, answers, attention_mask, foils)
    baseline.check(sites, len(prompts.ids), prompts.lengths)
    total = len(wanted) * len(prompts.ids)
    parts = store.under(
        lambda: {
            "what": ["ablation_sweep", positions, predictions, backends, wanted],
            "prompts": [prompts.ids, prompts.lengths, prompts.targets],
            "baseline": baseline.identity(),
            "circumstances": circumstances(sites),
        }
    )
    with untouched(model), Bar(progress, total, "prompt", "ablation_sweep") as bar:
        end = positions == "end"
        options = Options(baseline, end, predictions, budget, backend, backends, verify, bar.call, parts)
        arrays, verification_error, record = run(sites, prompts, wanted, options)
    return AblationSweep(
        wanted,
        **arrays,
        verification_error=verification_error,
        semantics=f"{_SEMANTICS[positions]}; baseline {baseline.name}",
        settings={
            "model": getattr(sites.config, "_name_or_path", "") or type(sites.model).__name__,
            "family": sites.spec.name,
            "n_layers": sites.n_layers,
            "n_heads": sites.n_heads,
            "device": str(sites.device),
            "dtype": str(sites.dtype).removeprefix("torch."),
            **({} if sites.quantised is None else {"quantised": str(sites.quantised)}),
            "attention": sites.attention,
            "positions": positions,
            "baseline": baseline.name,
            "memory_budget": budget,
            "verify": verify,
            "backends": backends,
            "threads": torch.get_num_threads(),
            "versions": {name: sys.modules[name].__version__ for name in ("torch", "transformers", "numpy")},
            **record,
        },
    )


def _prompts(sites: ModelSites, input_ids: Any, answers: Any, mask: Any, foils: Any) -> Prompts:
    ids, lengths = one_batch(sites, input_ids, mask, "input_ids", "attention_mask")
    targets = read_ids(answers, "answers", 1, sites.d_vocab)[:, None]
    check(len(targets) == len(ids), f"answers: expected batch {len(ids)} like input_ids, got {len(targets)}")
    if foils is not None:
        others = read_ids(foils, "foils", 2, sites.d_vocab)
        check(len(others) == len(ids), f"foils: expected batch {len(ids)} like input_ids, got {len(others)}")
        targets = torch.cat([targets, others], 1)
    return Prompts(ids, lengths, targets)


def _backends(sites: ModelSites, backend: str) -> dict[str, str]:
    """The backend of each op for this run.

    Raises:
        InputError, BackendError: an unknown name, or a backend that cannot run here, with the reasons.
    """
    check(backend in ("auto", *BACKENDS), f"backend: expected one of {['auto', *BACKENDS]}, got {backend!r}")
    chosen = {op: ops.backend_of(op, sites.device, sites.dtype) for op in _OWN_OPS}
    if backend == "auto":
        return {op: ops.backend_of(op, sites.device, sites.row_dtype) for op in _OPS} | chosen
    reasons = {op: ops.why_not(op, backend, sites.device, sites.row_dtype) for op in _OPS}
    failed = {op: reason for op, reason in reasons.items() if reason is not None}
    if failed:
        why = "; ".join(f"{op}: {reason}" for op, reason in failed.items())
        raise BackendError(f"backend: {backend!r} cannot run on {sites.device} ({why}); use backend='auto'")
    own = {op: backend for op in _OWN_OPS if ops.why_not(op, backend, sites.device, sites.dtype) is None}
    return dict.fromkeys(_OPS, backend) | chosen | own
