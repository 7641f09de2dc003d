"""Where chosen heads look from END: attention mass per token role, and whole END patterns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyarith.analysis.inputs import TOKENS, Array, Prompts, read_heads, read_prompts, read_tokens
from pyarith.analysis.states import end_states, frame, host
from pyarith.engine import guard
from pyarith.engine.oracle import tolerance
from pyarith.errors import SelfCheckError, UnsupportedModelError, check
from pyarith.models.sites import ModelSites, refuse_own_attention, resolve
from pyarith.prompts import ROLES
from pyarith.types import Head

FIRST = "first"
_LAST_ROLES = ("special", "other")


@dataclass(frozen=True, repr=False)
class AttentionMass:
    """Attention of heads at END, summed over the tokens of each role.

    mass[i, b, r] = sum over tokens p of prompt b with role r of pattern[i, b, p]; the roles of a prompt sum to 1,
    or where a head has a sink (GPT-OSS) to what the sink leaves.

    Attributes:
        heads: the chosen heads, axis n_chosen.
        roles: names along the axis role: operand_a, operand_b, operator and the prompts' own, then "first" (the first
            token of the prompt, where its role is "special" or "other": BOS, or what stands in for it), "special"
            (other special tokens) and "other".
        mass: [n_chosen, batch, role], fp32 (fp64 for fp64 models).
        role_tokens: int64 [batch, role] number of tokens of each role; 0 means the prompt has none.
        check_error: largest |pattern @ v - z| that was found, relative to the layer's largest |z|.
        patterns: [n_chosen, batch, pos] the END rows, 0 on padding, pos as in the prompts that were given; or None.
        settings: model, attention implementation, number of prompts.
    """

    heads: tuple[Head, ...]
    roles: tuple[str, ...]
    mass: Array
    role_tokens: Array
    check_error: float
    patterns: Array | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Array:
        """[n_chosen, role] mean over the prompts, fp64."""
        return np.asarray(self.mass.mean(1, dtype=np.float64))

    @property
    def spread(self) -> Array:
        """[n_chosen, role] standard deviation over the prompts, fp64."""
        return np.asarray(self.mass.std(1, dtype=np.float64))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table of ``to_dataframe`` as dictionaries."""
        mean, spread = self.mean, self.spread
        for i, head in enumerate(self.heads):
            for r, role in enumerate(self.roles):
                place: dict[str, Any] = {"layer": head.layer, "head": head.head, "role": role}
                yield place | {"mass": float(mean[i, r]), "spread": float(spread[i, r])}

    def to_dataframe(self) -> Any:
        """One row per head and role: layer, head, role, mass (mean over prompts), spread (standard deviation)."""
        return frame(self.rows())

    def __repr__(self) -> str:
        width = max(map(len, self.roles)) + 1
        lines = [f"AttentionMass: {self.mass.shape[1]} prompts, mean attention at END"]
        lines.append("   head " + "".join(f"{role:>{width}}" for role in self.roles))
        for head, row in zip(self.heads, self.mean, strict=True):
            lines.append(f"{head!s:>7} " + "".join(f"{value:>{width}.3f}" for value in row))
        return "\n".join(lines)


def attention_mass(
    model: Any,
    prompts: Any,
    heads: Any,
    *,
    attention_mask: Any = None,
    roles: Any = None,
    role_names: tuple[str, ...] = ROLES,
    patterns: bool = False,
    tokens_per_pass: int = TOKENS,
) -> AttentionMass:
    """Attention mass of chosen heads at END per token role.

    pattern = softmax(cap(scaling * q_END @ k.T) + causal and window mask), in fp32 (fp64 for fp64 models), from the
    queries and keys that the model's own attention function gets (after q/k norms and the rotary embedding), with the
    family's scaling, softcap, sliding window, sink and shared keys. Every row is checked: pattern @ v must reproduce z,
    the head's output in the same forward pass.

    Args:
        model: a supported Hugging Face causal LM with any attention implementation of transformers'
            ``AttentionInterface``; never changed, and neither is its config.
        prompts: ``PromptPairs`` with roles (the clean prompts are used), or int64 [batch, pos].
        heads: (layer, head) pairs.
        attention_mask: [batch, pos] for ids that are not ``PromptPairs``; padding at either side.
        roles: integers [batch, pos], index into ``role_names``, for ids that are not ``PromptPairs``.
        role_names: names of the codes in ``roles``.
        patterns: keep the END rows as well.
        tokens_per_pass: about how many tokens go through the model at a time.
    Returns:
        ``AttentionMass``.
    Raises:
        InputError, InputTypeError: heads that do not exist (all are named), prompts without roles, bad ids or mask.
        UnsupportedModelError: family or implementation does not go through ``AttentionInterface``.
        SelfCheckError: pattern @ v is not z: the model's attention does something that is not described above.
    Notes: not for several threads at once: while a pass runs, the implementation's entry in the
        ``AttentionInterface`` is a function that looks on and calls it.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3 (attention of key heads at END).
    """
    sites = resolve(model)
    refuse_own_attention(sites, "attention_mass", "its queries and keys cannot be seen")
    chosen, tokens = read_heads(sites, heads), read_tokens(tokens_per_pass)
    given = read_prompts(sites, prompts, attention_mask, roles=roles, role_names=role_names)
    names, codes = _output_roles(given)
    kind = torch.nn.functional.one_hot(codes + 1, len(names) + 1)[..., 1:]  # -1, after END, is dropped
    shape = (len(chosen), len(given))
    wide = np.float64 if sites.row_dtype == torch.float64 else np.float32
    mass = np.zeros((*shape, len(names)), wide)
    whole = np.zeros((*shape, given.width), wide) if patterns else None
    error = 0.0
    for indices, rows, found in end_patterns(sites, given, chosen, tokens):
        error, length = max(error, found), rows.shape[-1]
        block = kind[indices, :length].to(rows)
        mass[:, indices.numpy()] = host(torch.einsum("hbp,bpr->hbr", rows, block))
        if whole is not None:
            columns = given.starts[indices, None] + torch.arange(length)
            whole[:, indices[:, None].numpy(), columns.numpy()] = host(rows)
    settings = {"model": sites.spec.name, "attention": sites.attention, "prompts": len(given)}
    return AttentionMass(chosen, names, mass, kind.sum(1).numpy(), error, whole, settings)


def _output_roles(prompts: Prompts) -> tuple[tuple[str, ...], Tensor]:
    """Role names of the result and the code of every token in them, -1 after END."""
    codes, given = prompts.need_roles(), prompts.role_names
    check(FIRST not in given, f"roles: the role name {FIRST!r} is taken by the first token of a prompt; rename it")
    own = tuple(name for name in given if name not in _LAST_ROLES)
    names = (*own, FIRST, *_LAST_ROLES)
    table = torch.tensor([names.index(name) for name in given] + [-1])  # code -1 takes the last entry
    new = table[codes]
    start = new[:, 0]
    new[:, 0] = torch.where(start >= len(own), names.index(FIRST), start)
    return names, new


def end_patterns(
    sites: ModelSites, prompts: Prompts, heads: tuple[Head, ...], tokens: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The END rows of attention, checked against z, block by block.

    Yields:
        indices int64 [block]; pattern [n_chosen, block, pos] in row dtype (pos: the tokens of a prompt);
        the largest relative deviation of pattern @ v from z.
    Raises:
        UnsupportedModelError, SelfCheckError: see ``attention_mass``.
    """
    layers = sorted({head.layer for head in heads})
    with guard.untouched(sites.model):
        seen = Observer(sites, {layer: [h.head for h in heads if h.layer == layer] for layer in layers})
        for indices, states in end_states(sites, prompts, ("z",), tokens, beside=lambda _: seen.observing()):
            missing = [layer for layer in layers if layer not in seen.rows]
            if missing:
                raise UnsupportedModelError(
                    f"model: family {sites.spec.name!r} with attention implementation {sites.attention!r}: layers "
                    f"{missing} do not call transformers' AttentionInterface, so their queries and keys cannot be "
                    f"seen{seen.reason()}"
                )
            error = max(seen.check(layer, states["z"][layer], indices) for layer in layers)
            yield indices, torch.stack([seen.row(head) for head in heads]), error
            seen.rows.clear()


class Observer:
    """Looks at what the model hands to its attention function and computes chosen heads' END rows from it."""

    def __init__(self, sites: ModelSites, heads: dict[int, list[int]]) -> None:
        self.sites, self.heads = sites, heads
        path = sites.spec.o_proj.rpartition(".")[0]
        self.layer = {id(sites.blocks[layer].block.get_submodule(path)): layer for layer in heads}
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> pattern and pattern @ v

    def reason(self) -> str:
        known = {"reorder_and_upcast_attn": "config.reorder_and_upcast_attn is set and has an attention of its own"}
        found = [text for name, text in known.items() if getattr(self.sites.config, name, False)]
        return "".join(f" ({text})" for text in found)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Put a function that looks on in the place of the model's attention implementation."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

        name = self.sites.attention
        if name != "eager" and name not in functions:
            raise UnsupportedModelError(
                f"model: family {self.sites.spec.name!r}: attention implementation {name!r} is not in transformers' "
                f"AttentionInterface; expected eager or one of {sorted(functions)}"
            )
        before = functions[name] if name in functions else None
        local = vars(functions).get("_local_mapping", {})
        ours = name in local

        def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            layer = self.layer.get(id(module))
            if layer is not None:
                self.rows[layer] = self.attend(layer, query, key, value, options)
            return (before or _eager_of(module))(module, query, key, value, *args, **options)

        functions[name] = observe
        try:
            yield
        finally:
            del functions[name]
            if ours:
                functions[name] = before

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """END rows [head, batch, pos] and outputs [head, batch, d_head] of the chosen heads, in row dtype.

        query [batch, n_heads, pos, d_head], key and value [batch, n_kv_heads, pos, d_head].
        """
        sites, wide = self.sites, self.sites.row_dtype
        heads = torch.tensor(self.heads[layer], device=query.device)
        shared = heads // (query.shape[1] // key.shape[1])
        q = query[:, heads, -1].to(wide)
        scaling = options.get("scaling")
        scores = torch.einsum("bhd,bhpd->hbp", q, key[:, shared].to(wide))
        scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        cap = options.get("softcap")
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        window = sites.windows[layer]
        if window is not None:
            distance = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
            scores = scores.masked_fill(distance >= window, -torch.inf)
        sinks = options.get("s_aux")  # a score of its own in the softmax, with nothing to read
        if sinks is not None:
            scores = torch.cat([scores, sinks[heads].to(wide)[:, None, None].expand(*scores.shape[:2], 1)], -1)
        pattern = scores.softmax(-1)[..., : key.shape[2]]
        return pattern, torch.einsum("hbp,bhpd->hbd", pattern, value[:, shared].to(wide))

    def row(self, head: Head) -> Tensor:
        return self.rows[head.layer][0][self.heads[head.layer].index(head.head)]

    def check(self, layer: int, z: Tensor, indices: Tensor) -> float:
        """Compare pattern @ v with z, [batch, n_heads * d_head]; returns the deviation relative to the largest |z|."""
        heads = self.heads[layer]
        expected = z.unflatten(-1, (self.sites.n_heads, -1))[:, heads].transpose(0, 1).to(self.sites.row_dtype)
        error = (self.rows[layer][1] - expected).abs()
        scale = max(float(expected.abs().max()), torch.finfo(error.dtype).tiny)
        if not float(error.max()) <= tolerance(self.sites, scale):
            worst = int(error.flatten().argmax())
            head, prompt = (int(i) for i in np.unravel_index(worst, error.shape)[:2])
            raise SelfCheckError(
                f"self-check: family {self.sites.spec.name!r}, attention {self.sites.attention!r}, head "
                f"{Head(layer, heads[head])}, prompt {int(indices[prompt])}: the recomputed attention row gives z = "
                f"{float(self.rows[layer][1].flatten()[worst]):.6g}, the model has "
                f"{float(expected.flatten()[worst]):.6g} (tolerance {tolerance(self.sites, scale):.2g}). Its attention "
                "does something beyond scaling, softcap, causal and window mask and softmax (or a hook changes z); "
                "the masses would be wrong, so none are given"
            )
        return float(error.max()) / scale


def _eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention function that a family's attention falls back on."""
    for kind in type(module).__mro__:
        function: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(f"model: {type(module).__name__} has no eager_attention_forward beside it")
