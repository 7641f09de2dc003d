"""``ablation_sweep``: the total effect of ablating heads and MLPs, each set of them in turn, everything recomputed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyarith import ops
from pyarith.ablation_result import Ablation, AblationSweep, parse_sets
from pyarith.engine import oracle
from pyarith.engine.baselines import Baseline, ZeroAblation
from pyarith.engine.batch import Batch, _ids
from pyarith.engine.clock import mark, seconds
from pyarith.engine.guard import untouched
from pyarith.engine.memory import is_out_of_memory, smaller
from pyarith.engine.planner import parse_bytes
from pyarith.engine.readout import Readout, split
from pyarith.engine.references import one_batch
from pyarith.engine.replay import Replay
from pyarith.engine.sweep_end import SharedPrefix, shared_prefix
from pyarith.engine.sweep_inputs import Clean, prepare_all, prepare_end
from pyarith.engine.sweep_layers import Carrier, Chunk, Values, make_chunks
from pyarith.engine.sweep_plan import SweepPlan, SweepPlanner
from pyarith.engine.sweep_verify import verify as verify_literally
from pyarith.errors import BackendError, InputTypeError, NonFiniteError, SelfCheckError, check
from pyarith.models.sites import ModelSites, resolve
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
_VOCAB_ROWS = 256  # rows whose logits over the whole vocabulary exist at a time


@dataclass(frozen=True)
class _Options:
    baseline: Baseline
    end: bool
    predictions: bool
    memory_budget: int | None
    backend: str
    backends: dict[str, str]
    verify: int
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class _Prompts:
    """Left-aligned ids [batch, pos], lengths [batch], targets [batch, 1 + k] on the host."""

    ids: Tensor
    lengths: Tensor
    targets: Tensor

    def batch(self) -> Batch:
        """As the self-check of the replay wants it."""
        return Batch(self.ids, self.ids, self.lengths, self.lengths, self.targets)


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
    progress: bool | Callable[[int, int], None] | None = None,
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

    Returns:
        An ``AblationSweep``; its ``settings`` hold plan, forecast, backends, timings and versions.

    Raises:
        InputError, InputTypeError: an argument is wrong; absent heads are all named.
        UnsupportedModelError: the model's family, wrapping or placement is not supported, and why.
        SelfCheckError: with nothing ablated the sweep does not give the model's own logits, or a literal re-run
            contradicts it.
        NonFiniteError: NaN or infinity met.
        MemoryBudgetError: the budget is too small; the smallest that works is named.
        BackendError: a backend asked for by name cannot run, and why.

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
    check(
        progress is None or isinstance(progress, bool) or callable(progress),
        f"progress: expected None, False or a callable (done, total), got {type(progress).__name__}",
        InputTypeError,
    )
    baseline = ZeroAblation() if baseline is None else baseline
    check(
        isinstance(baseline, Baseline),
        f"baseline: expected ZeroAblation, MeanAblation or ResampleAblation, got {type(baseline).__name__}",
        InputTypeError,
    )
    budget = parse_bytes(memory_budget)
    sites = resolve(model)
    wanted = parse_sets(sets, sites.n_layers, sites.n_heads)
    backends = _backends(sites, backend)
    prompts = _prompts(sites, input_ids, answers, attention_mask, foils)
    baseline.check(sites, len(prompts.ids), prompts.lengths)
    total = len(wanted) * len(prompts.ids)
    with untouched(model), _Bar(progress, total) as bar:
        options = _Options(baseline, positions == "end", predictions, budget, backend, backends, verify, bar.call)
        arrays, verification_error, record = _sweep(sites, prompts, wanted, options)
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


def _prompts(sites: ModelSites, input_ids: Any, answers: Any, mask: Any, foils: Any) -> _Prompts:
    ids, lengths = one_batch(sites, input_ids, mask, "input_ids", "attention_mask")
    targets = _ids(answers, "answers", 1, sites.d_vocab)[:, None]
    check(len(targets) == len(ids), f"answers: expected batch {len(ids)} like input_ids, got {len(targets)}")
    if foils is not None:
        others = _ids(foils, "foils", 2, sites.d_vocab)
        check(len(others) == len(ids), f"foils: expected batch {len(ids)} like input_ids, got {len(others)}")
        targets = torch.cat([targets, others], 1)
    return _Prompts(ids, lengths, targets)


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


def _sweep(
    sites: ModelSites, prompts: _Prompts, sets: tuple[Ablation, ...], options: _Options
) -> tuple[dict[str, Any], float | None, dict[str, Any]]:
    """All blocks of prompts, with half the block size after each out-of-memory."""
    replay = Replay(sites, options.backend, heads=True, mlps=False, frozen=False, log_probs=False)
    oracle.attach(sites, replay, prompts.batch())
    planner = SweepPlanner(sites, replay, prompts.lengths, sets, options.end)
    plan = planner.plan(options.memory_budget)
    collector = _Collector(sites, replay, prompts, len(sets), options)
    timings = {"clean": 0.0, "ablated": 0.0}
    order = prompts.lengths.argsort(stable=True)  # prompts of similar length side by side
    done = 0
    with Carrier(sites, replay, options.backends) as carrier:
        while done < len(order):
            try:
                for block in order[done:].split(plan.prompts):
                    collector.done = done * len(sets)  # a block that ran out of memory is counted anew
                    _block(carrier, prompts, sets, block, plan, collector, timings)
                    done += len(block)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                plan = smaller(plan, sites, error)
                replay.release()
    record = {"plan": vars(plan), "forecast": planner.forecast(plan).record(), "seconds": timings}
    verified = None
    if options.verify:
        start = time.perf_counter()
        verified = verify_literally(
            sites,
            prompts.ids,
            prompts.lengths,
            prompts.targets[:, 0],
            sets,
            collector.arrays,
            options.baseline,
            options.end,
            options.verify,
        )
        timings["verify"] = time.perf_counter() - start
    return collector.arrays, verified, record


def _block(
    carrier: Carrier,
    prompts: _Prompts,
    sets: tuple[Ablation, ...],
    block: Tensor,
    plan: SweepPlan,
    collector: _Collector,
    timings: dict[str, float],
) -> None:
    """All sets on a block of prompts."""
    sites, options = carrier.sites, collector.options
    start = mark(sites.device)
    lengths = prompts.lengths[block]
    prepare = prepare_end if options.end else prepare_all
    # the hooks of the carrier are idle while it carries nothing
    clean = prepare(sites, prompts.ids[block, : int(lengths.max())], lengths, block)
    middle = mark(sites.device)
    prefix = SharedPrefix(sites, clean, options.backends["shared_prefix_attention"]) if options.end else None
    values = Values(sites, options.baseline, clean)
    collector.own(clean)
    chunks = make_chunks(sites, sets, plan.sets)
    keep = {int(chunk.first[0]) for chunk in chunks[1:]}
    with shared_prefix(sites, prefix) if prefix is not None else nullcontext():
        for chunk in chunks:
            rows = carrier.run(clean, chunk, values, plan.tokens, keep, prefix)
            collector.add(clean, chunk, rows)
    timings["clean"] += seconds(start, middle)
    timings["ablated"] += seconds(middle, mark(sites.device))


@dataclass
class _Collector:
    """Scatters rows of blocks and chunks into arrays in the order of sets and prompts."""

    sites: ModelSites
    replay: Replay
    prompts: _Prompts
    n_sets: int
    options: _Options
    arrays: dict[str, Any] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self) -> None:
        n, foils = self.prompts.targets.shape[0], self.prompts.targets.shape[1] - 1
        kind = np.float64 if self.sites.row_dtype == torch.float64 else np.float32
        for name, axes in (("", (self.n_sets, n)), ("identity_", (n,)), ("clean_", (n,))):
            self.arrays[f"{name}logits"] = np.full(axes, np.nan, kind)
            if foils:
                self.arrays[f"{name}foil_logits"] = np.full((*axes, foils), np.nan, kind)
            if self.options.predictions and name != "identity_":
                self.arrays[f"{name}predictions"] = np.full(axes, -1, np.int64)

    def _readout(self, clean: Clean) -> Readout:
        targets = self.prompts.targets[clean.indices].to(self.sites.device)
        return Readout(self.sites, self.replay.final_norm, self.replay.unembed, targets, self.replay.backend)

    def own(self, clean: Clean) -> None:
        """The model's own logits."""
        index = clean.indices.numpy()
        self._put("clean_", (index,), self._readout(clean).of_hidden(clean.hidden).cpu().numpy())
        if self.options.predictions:
            self.arrays["clean_predictions"][index] = self._most_probable(clean.hidden).cpu().numpy()

    def add(self, clean: Clean, chunk: Chunk, rows: Tensor) -> None:
        """rows [1 + set, batch, d_model] after the last block.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
            SelfCheckError: the identity row is not the model's own logit.
        """
        x = self.replay._buffer("x", tuple(rows.shape), self.sites.dtype)
        rows = rows.contiguous()
        if self.options.predictions:
            self.replay.final_norm(rows, None, None, x)
            tokens = self._most_probable(x[1:].flatten(0, 1)).view(len(chunk), clean.batch).cpu().numpy()
            self.arrays["predictions"][chunk.indices[:, None], clean.indices.numpy()] = tokens
        readout = self._readout(clean)
        logits = readout.read(rows, 0, len(rows), 0, None, None, x, False).logits.cpu().numpy()
        index = clean.indices.numpy()
        own = self.arrays["clean_logits"][index]
        if not (np.isfinite(logits).all() and np.isfinite(own).all()):
            bad = ~np.isfinite(logits[..., 0])
            what = "the identity row" if bad[0].any() else f"{int(bad.any(1).sum())} sets of heads"
            raise NonFiniteError(
                f"non-finite values: {what} at the final norm (the model overflows {self.sites.dtype}, or a weight "
                "or baseline holds NaN): load the model in fp32 or bf16"
            )
        self._check_identity(index, logits[0, :, 0], own)
        self._put("identity_", (index,), logits[0])
        self._put("", (chunk.indices[:, None], index), logits[1:])
        self.done += len(chunk) * clean.batch
        if self.options.progress is not None:
            self.options.progress(self.done, self.n_sets * len(self.prompts.ids))

    def _check_identity(self, index: Any, identity: Any, own: Any) -> None:
        error = np.abs(identity - own)
        allowed = oracle.tolerance(self.sites, max(1.0, float(np.abs(own).max())))
        if error.max() > allowed:
            worst = int(error.argmax())
            raise SelfCheckError(
                f"self-check: family {self.sites.spec.name!r}, prompt {int(index[worst])}: with nothing ablated the "
                f"sweep gives logit {identity[worst]:.6g}, the model itself {own[worst]:.6g} (tolerance "
                f"{allowed:.2g}). The model does something that its family spec does not describe; no result is given"
            )

    def _put(self, name: str, at: tuple[Any, ...], logits: Any) -> None:
        self.arrays[f"{name}logits"][at] = logits[..., 0]
        if f"{name}foil_logits" in self.arrays:
            self.arrays[f"{name}foil_logits"][at] = logits[..., 1:]

    def _most_probable(self, hidden: Tensor) -> Tensor:
        """argmax over the vocabulary of decoder outputs [rows, d_model]; a softcap keeps the order."""
        unembed = self.replay.unembed
        found = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        for a, b in split(len(hidden), _VOCAB_ROWS):
            logits = hidden[a:b] @ unembed.matrix
            found[a:b] = (logits if unembed.bias is None else logits + unembed.bias).argmax(-1)
        return found


class _Bar:
    """The bar, or the caller's function, or nothing."""

    def __init__(self, progress: bool | Callable[[int, int], None] | None, total: int) -> None:
        self.total = total
        self._function = progress if callable(progress) else None
        self._show = progress is True or (progress is None and sys.stderr.isatty())
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        if self._show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self.total, unit="prompt", desc="ablation_sweep")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def call(self, done: int, total: int) -> None:
        if self._function is not None:
            self._function(done, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
