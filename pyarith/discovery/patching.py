"""``fast_patch``: exact path patching of every head and MLP to the answer's logit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyarith import ops
from pyarith.engine import guard
from pyarith.engine.batch import Batch, make_batch
from pyarith.engine.collect import Options
from pyarith.engine.planner import parse_bytes
from pyarith.engine.progress import Bar, Progress, check_progress
from pyarith.engine.ranks import common, team
from pyarith.engine.run import run
from pyarith.engine.store import Store, circumstances, digest, versions
from pyarith.errors import BackendError, InputTypeError, check
from pyarith.models.sites import ModelSites, resolve
from pyarith.models.streaming import opened
from pyarith.ops._registry import NAMES as BACKENDS
from pyarith.prompts import PromptPairs
from pyarith.result import PatchResult

_SENDERS = ("heads", "mlps")
_MLPS = {
    "recomputed": (
        "path patching head -> logits: noising, sender patched at END, every other head's z frozen at its clean value, "
        "MLPs and norms recomputed (the paper's; path_patching.path_patch to resid_post with direct_includes_mlps=True)"
    ),
    "frozen": (
        "direct effect head -> logits: noising, sender patched at END, every other head and MLP frozen at its clean "
        "value, final norm recomputed (path_patching.path_patch to resid_post with direct_includes_mlps=False)"
    ),
}
# what a run calls; other ops of the library do not decide whether it can run
_OPS = ("add_norm", "gated_act", "answer_logits", "head_write_rows", "vocab_logsumexp")
_BATCH_KEYS = ("clean", "corrupted", "answers", "attention_mask", "corrupted_attention_mask", "foils")


def fast_patch(
    model: Any,
    clean: Any,
    corrupted: Any = None,
    answers: Any = None,
    *,
    attention_mask: Any = None,
    corrupted_attention_mask: Any = None,
    senders: Iterable[str] = _SENDERS,
    mlps: str = "recomputed",
    foils: Any = None,
    log_probs: bool = False,
    memory_budget: int | str | None = None,
    backend: str = "auto",
    verify: int = 2,
    progress: Progress = None,
    resume: str | Path | None = None,
) -> PatchResult:
    """Path patching of every head and MLP to the answer's logit, exactly, in about the time of a few forward passes.

    For sender (l, h) the head's output z at END takes its value of the corrupted run, every other head's z keeps its
    clean value, MLPs, norms and unembedding are recomputed:

        row(l, h) = resid_mid_clean[l] + (z_corrupted[l, h] - z_clean[l, h]) @ W_O[l][:, h].T
        row      += MLP_l(norm(row));  for j > l:  row += attn_write_clean[j];  row += MLP_j(norm(row))
        logit     = final_norm(row) . W_U[answer]

    The model is never changed: training flags, hooks, grad mode and random state are as before, also after an error.

    Args:
        model: a supported Hugging Face causal LM, any device, fp32, fp64, bf16 or fp16, linears
            perhaps quantised by bitsandbytes or torchao; or the folder of its
            checkpoint, whose weights then never have to fit into memory (``stream_checkpoint``).
        clean, corrupted: int64 [batch, pos] token ids; both prompts of a pair have the same number of real tokens and
            differ somewhere. ``clean`` may also be a ``PromptPairs`` or an iterable of batches (each a ``PromptPairs``
            or a mapping with the names of these arguments); then the other tensors stay None and the result is merged.
        answers: int64 [batch] id of the one token after the prompt.
        attention_mask, corrupted_attention_mask: 0/1 [batch, pos], padding left or right; None = no padding.
        senders: "heads", "mlps" or both.
        mlps: "recomputed" (the paper's quantity) or "frozen" (later MLPs keep their clean output: another quantity).
        foils: int64 [batch, k] other answers whose logits are wanted too.
        log_probs: also log-probabilities of the answer (the vocabulary is run through in chunks).
        memory_budget: bytes or a text such as "2GiB" beyond the model; None = half of what is free on its device, on a
            GPU at most 4 GiB (larger blocks gain nothing there).
        backend: "auto" or the name of an op backend ("cpu", "cuda", "reference"); by name it runs or raises. "cuda" is
            CUDA C++, and the vendor's library for matrix products; "auto" also takes Triton kernels.
        verify: number of senders re-run literally with hooks, on at most two prompts; 0 = none.
        progress: None = a bar on a terminal, False = none, or a callable ``(done, total)`` in prompts.
        resume: a folder in which finished blocks of prompts are kept as they are done: the same call after a kill goes
            on from there and gives the same bits. They are taken only where model, inputs, options, block sizes,
            versions, device and threads are the same, and their file is whole; one folder may serve many calls, also of
            several processes. Without ``memory_budget`` the block sizes of the interrupted run stay as long as they fit
            into what is free. Deleting the folder is the caller's business. None = keep nothing.

    Under torchrun (wherever ``torch.distributed`` is initialised with several ranks) every rank makes the same call;
    the blocks of prompts go to whichever rank is free, and all ranks return the whole result. ``memory_budget`` is each
    rank's. The bar is rank 0's. A folder for ``resume`` that the ranks share serves all of them.

    Returns:
        A ``PatchResult``; its ``settings`` hold blocks, backends, timings and versions.

    Raises:
        InputError, InputTypeError: an argument is wrong; the message names it, what was expected and what came.
        UnsupportedModelError: the model's family, wrapping or placement is not supported, and why.
        SelfCheckError: the recomposed rows, or a literal re-run, contradict the replay.
        NonFiniteError: NaN or infinity met; the first layer and tensor are named.
        MemoryBudgetError: the budget is too small; the smallest that works is named.
        BackendError: a backend asked for by name cannot run, and why.
        StorageError: a finished block cannot be written to ``resume``.
        RankError: ranks differ in code, model, data or settings, or one is gone; it is named.

    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3; Wang et al. 2022, arXiv:2211.00593, sec. 3.1.
    """
    return patch(
        model,
        _batches(clean, corrupted, answers, attention_mask, corrupted_attention_mask, foils),
        senders=senders,
        mlps=mlps,
        log_probs=log_probs,
        memory_budget=memory_budget,
        backend=backend,
        verify=verify,
        progress=progress,
        resume=resume,
    )


def patch(
    model: Any,
    batches: Iterable[dict[str, Any]],
    *,
    senders: Iterable[str] = _SENDERS,
    mlps: str = "recomputed",
    log_probs: bool = False,
    memory_budget: int | str | None = None,
    backend: str = "auto",
    verify: int = 2,
    progress: Progress = None,
    resume: str | Path | None = None,
    chosen: tuple[tuple[int, ...], ...] | None = None,
) -> PatchResult:
    """``fast_patch`` on batches of ``make_batch`` arguments; of the heads only the ``chosen`` of each layer, if given.

    Heads that are not chosen are NaN, as is the identity row of a layer without chosen heads.
    """
    with team() as ranks:
        wanted = _senders(senders)
        check(mlps in _MLPS, f"mlps: expected one of {sorted(_MLPS)}, got {mlps!r}")
        check(
            isinstance(verify, int) and not isinstance(verify, bool) and verify >= 0,
            f"verify: expected a number of senders >= 0, got {verify!r}",
        )
        check_progress(progress)
        budget, store = parse_bytes(memory_budget), Store(resume)
        model = opened(model)
        sites = resolve(model, spread=True)
        backends = _backends(sites, backend)
        checked = [make_batch(sites, **batch) for batch in list(batches)]
        check(len(checked) > 0, "clean: expected at least one batch, got an empty iterable")
        options = Options(
            heads="heads" in wanted if chosen is None else chosen,
            mlps="mlps" in wanted,
            frozen=mlps == "frozen",
            log_probs=log_probs,
            memory_budget=budget,
            backend=backend,
            verify=verify,
            team=ranks,
        )
        what = [options.heads, options.mlps, mlps, log_probs, backends]
        ranks.same(lambda: _facts(sites, checked, budget, verify, what))
        parts = store.under(lambda: ["fast_patch", what, circumstances(sites)])
        results = []
        bar = Bar(ranks.shown(progress), sum(map(len, checked)), "prompt", "fast_patch")
        before = 0
        with guard.untouched(model), bar:
            for batch in checked:
                own = replace(options, progress=partial(bar.call, before=before), parts=parts.under(batch.identity))
                done = run(sites, batch, own)
                before += len(batch)
                results.append(
                    PatchResult(
                        **done.arrays,
                        verification_error=done.verification_error,
                        semantics=_MLPS[mlps],
                        settings=_settings(sites, own, wanted, mlps, backends, done.record),
                    )
                )
        return PatchResult.merge(results)


def _facts(sites: ModelSites, batches: list[Batch], budget: int | None, verify: int, what: list[Any]) -> dict[str, Any]:
    """What the ranks of a run must have in common."""
    names = ("senders: heads", "senders: mlps", "mlps", "log_probs", "backends")
    return {
        **common(sites),
        "data": digest([batch.identity() for batch in batches])[:12],
        "memory_budget": budget,
        "verify": verify,
        **dict(zip(names, what, strict=True)),
    }


def _senders(senders: Iterable[str]) -> tuple[str, ...]:
    names = (senders,) if isinstance(senders, str) else tuple(senders)
    unknown = [name for name in names if name not in _SENDERS]
    check(bool(names) and not unknown, f"senders: expected some of {list(_SENDERS)}, got {list(names)}")
    return tuple(name for name in _SENDERS if name in names)


def _backends(sites: ModelSites, backend: str) -> dict[str, str]:
    """The backend of each op for this run.

    Raises:
        InputError, BackendError: an unknown name, or a backend that cannot run here, with the reasons.
    """
    if backend == "auto":
        return {op: ops.backend_of(op, sites.device, sites.row_dtype) for op in _OPS}
    check(backend in BACKENDS, f"backend: expected one of {['auto', *BACKENDS]}, got {backend!r}")
    reasons = {op: ops.why_not(op, backend, sites.device, sites.row_dtype) for op in _OPS}
    failed = {op: reason for op, reason in reasons.items() if reason is not None}
    if failed:
        why = "; ".join(f"{op}: {reason}" for op, reason in failed.items())
        raise BackendError(f"backend: {backend!r} cannot run on {sites.device} ({why}); use backend='auto'")
    return dict.fromkeys(_OPS, backend)


def _batches(
    clean: Any, corrupted: Any, answers: Any, mask: Any, other_mask: Any, foils: Any
) -> Iterator[dict[str, Any]]:
    """One mapping of ``make_batch`` arguments per batch."""
    given = {
        "corrupted": corrupted,
        "answers": answers,
        "attention_mask": mask,
        "corrupted_attention_mask": other_mask,
        "foils": foils,
    }
    if corrupted is not None or answers is not None:
        for name in ("corrupted", "answers"):
            check(given[name] is not None, f"{name}: expected a tensor beside clean, got None", InputTypeError)
        yield {"clean": clean, **given}
        return
    extra = [name for name, value in given.items() if value is not None]
    check(not extra, f"{extra}: expected inside each batch when clean is PromptPairs or an iterable of batches")
    if isinstance(clean, torch.Tensor) or not isinstance(clean, Iterable | PromptPairs):
        raise InputTypeError(
            "corrupted, answers: expected tensors beside clean (or clean as PromptPairs or an iterable of batches), "
            f"got None with clean of type {type(clean).__name__}"
        )
    for number, item in enumerate([clean] if isinstance(clean, PromptPairs | Mapping) else clean):
        batch = item.inputs() if isinstance(item, PromptPairs) else item
        check(
            isinstance(batch, Mapping),
            f"clean: expected batches as PromptPairs or mappings, got {type(batch).__name__} as batch {number}",
            InputTypeError,
        )
        missing = [name for name in _BATCH_KEYS[:3] if name not in batch]
        unknown = [name for name in batch if name not in _BATCH_KEYS]
        check(
            not missing and not unknown,
            f"clean: batch {number}: expected keys among {list(_BATCH_KEYS)}, missing {missing}, unknown {unknown}",
        )
        yield dict(batch)


def _settings(
    sites: ModelSites,
    options: Options,
    wanted: tuple[str, ...],
    mlps: str,
    backends: dict[str, str],
    record: dict[str, Any],
) -> dict[str, Any]:
    config = sites.config
    return {
        "model": getattr(config, "_name_or_path", "") or type(sites.model).__name__,
        "family": sites.spec.name,
        "n_layers": sites.n_layers,
        "n_heads": sites.n_heads,
        "device": str(sites.device),
        **({"device_name": torch.cuda.get_device_name(sites.device)} if sites.device.type == "cuda" else {}),
        "dtype": str(sites.dtype).removeprefix("torch."),
        **({} if sites.quantised is None else {"quantised": str(sites.quantised)}),
        # torch's default is "highest": fp32 products in fp32; lower settings are the caller's choice, and are kept
        "matmul_precision": torch.get_float32_matmul_precision(),
        "attention": sites.attention,
        "senders": list(wanted),
        "mlps": mlps,
        "memory_budget": options.memory_budget,
        "verify": options.verify,
        "backends": backends,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **record,
    }
