"""Tiny random Hugging Face models, one row per family, and prompt pairs to run them on.

Weights are scaled so that every head and MLP matters, and norms and biases are random too: a dropped
bias or a norm weight taken for 1 changes the numbers by far more than any tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

VOCAB = 97

# What most families call their sizes; GPT-2 has its own words.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Tiny:
    """One row: the class prefix in transformers and what its config gets on top of the common sizes."""

    prefix: str
    extra: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: dict(_SIZES))


_GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_inner": 44,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
_GEMMA2 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 4,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 8.0,
    "tie_word_embeddings": False,
}

_QWEN_MOE = {"num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT_OSS = {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
_GPTJ_SIZES = {**_GPT2_SIZES, "rotary_dim": 4}
_FALCON_SIZES = {**{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, "ffn_hidden_size": 44}
_GEMMA3 = {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "final_logit_softcapping": 8.0,
    "tie_word_embeddings": False,
}
_COHERE = {"num_key_value_heads": 2, "use_qk_norm": True, "logit_scale": 0.8, "attention_bias": True}
_GRANITE = {
    "num_key_value_heads": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.3,
}

FAMILIES: dict[str, Tiny] = {
    "llama": Tiny("Llama", {"num_key_value_heads": 4}),
    "llama-gqa2": Tiny("Llama", {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True}),
    "llama-gqa4": Tiny("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": Tiny("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": Tiny("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": Tiny("Qwen3", {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma2": Tiny("Gemma2", _GEMMA2),
    "phi3": Tiny("Phi3", {"num_key_value_heads": 2}),
    "gpt2": Tiny("GPT2", {}, _GPT2_SIZES),
    "neox": Tiny("GPTNeoX", {"rotary_pct": 0.5, "use_parallel_residual": True}),
    "neox-serial": Tiny("GPTNeoX", {"rotary_pct": 0.25, "use_parallel_residual": False}),
    "mixtral": Tiny("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 24}),
    "qwen2-moe": Tiny("Qwen2Moe", _QWEN_MOE | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    "qwen3-moe": Tiny("Qwen3Moe", _QWEN_MOE | {"head_dim": 12, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "gpt-oss": Tiny("GptOss", _GPT_OSS),
    "olmo2": Tiny("Olmo2", {"num_key_value_heads": 2}),
    "phi": Tiny("Phi", {"num_key_value_heads": 2, "qk_layernorm": True}),
    "gptj": Tiny("GPTJ", {"tie_word_embeddings": False}, _GPTJ_SIZES),
    "gemma3": Tiny("Gemma3", _GEMMA3),
    "granite": Tiny("Granite", _GRANITE),
    "cohere": Tiny("Cohere", _COHERE),
    "cohere2": Tiny("Cohere2", {"num_key_value_heads": 2, "sliding_window": 4, "sliding_window_pattern": 2}),
    "stablelm": Tiny("StableLm", {"num_key_value_heads": 2, "qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm-parallel": Tiny("StableLm", {"num_key_value_heads": 2, "use_parallel_residual": True}),
    "falcon": Tiny("Falcon", {"bias": True}, _FALCON_SIZES),
    "falcon-serial": Tiny("Falcon", {"parallel_attn": False, "multi_query": False}, _FALCON_SIZES),
    "falcon-new": Tiny("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, _FALCON_SIZES),
}
# mixtures of experts cost ten times the time of the others: tests/test_moe.py runs them through fewer cases
MOE = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]
# the same for further dense families: tests/test_more_families.py
MORE = ["olmo2", "phi", "gptj", "gemma3", "granite", "cohere", "cohere2", "stablelm", "stablelm-parallel"]
MORE += ["falcon", "falcon-serial", "falcon-new"]
NAMES = [name for name in FAMILIES if name not in (*MOE, *MORE)]
# transformers has no sdpa for Gemma-2's softcap
SDPA = [name for name in NAMES if name != "gemma2"]


def make(
    name: str,
    dtype: torch.dtype = torch.float64,
    *,
    attn: str = "eager",
    seed: int = 0,
    **overrides: Any,
) -> torch.nn.Module:
    """A seeded tiny model of a family, in eval mode; ``overrides`` go to its config."""
    import transformers

    row = FAMILIES[name]
    settings = {**row.sizes, **_NO_TOKENS, **row.extra, **overrides}
    kind = "Gemma3TextConfig" if row.prefix == "Gemma3" else f"{row.prefix}Config"
    config = getattr(transformers, kind)(**settings)
    config._attn_implementation = attn
    if name in MOE:  # their usual implementation has no fp64
        config._experts_implementation = "eager" if dtype == torch.float64 else "grouped_mm"
    suffix = "LMHeadModel" if row.prefix == "GPT2" else "ForCausalLM"
    # the same numbers inside and outside ``true_fp64``, which would keep the rotary tables from being rounded to fp32
    with torch._C.DisableTorchFunction():
        model = getattr(transformers, f"{row.prefix}{suffix}")(config)
        randomise(model, seed)
        return model.to(dtype).eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter from one generator, so that weights do not depend on torch's global state."""
    generator = torch.Generator().manual_seed(seed)
    one_plus = "Gemma" in type(model).__name__  # its norms multiply by 1 + w, its embedding by sqrt(d_model)
    gains = {"embed_out": 2.5, "lm_head": 2.5, "emb": 0.2 if one_plus else 1.0, "wte": 0.6, "wpe": 0.4}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name or ".ln_" in name:
                centre = 0.0 if name.endswith("bias") or one_plus else 1.0
                value = centre + 0.3 * noise
            elif parameter.ndim == 1:
                value = 0.3 * noise
            else:
                embedding = ("emb" in name and "embed_out" not in name) or "wte" in name or "wpe" in name
                # Conv1D keeps [in, out], Linear [out, in]; for these sizes the wider guess is close enough
                fan_in = 1 if embedding else min(parameter.shape[-1], parameter.shape[0])
                gain = next((g for key, g in gains.items() if key in name), 2.0)
                value = gain * noise / fan_in**0.5
            parameter.copy_(value)


class Prompt(NamedTuple):
    """One clean / corrupted pair without padding."""

    clean: list[int]
    corrupted: list[int]


class Batch(NamedTuple):
    """What ``fast_patch`` takes, padded."""

    clean: torch.Tensor
    corrupted: torch.Tensor
    attention_mask: torch.Tensor | None
    corrupted_attention_mask: torch.Tensor | None


def prompts(
    lengths: tuple[int, ...] = (7, 5, 9),
    *,
    shared: int = 2,
    differ: tuple[int, ...] | str = "middle",
    seed: int = 1,
    vocab: int = VOCAB,
) -> list[Prompt]:
    """Random pairs: the first ``shared`` ids are common to all prompts, ``differ`` names the changed positions.

    ``differ`` is "middle", "first", "end", "all", or positions (negative ones count from the end).
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(vocab, (shared,), generator=generator).tolist()
    rows = []
    for length in lengths:
        tail = torch.randint(vocab, (length - shared,), generator=generator).tolist()
        clean = head + tail
        named = {"middle": (length // 2,), "first": (0,), "end": (-1,), "all": tuple(range(length))}
        places = named[differ] if isinstance(differ, str) else differ
        corrupted = list(clean)
        for place in places:
            step = int(torch.randint(1, vocab, (1,), generator=generator))
            corrupted[place] = (clean[place] + step) % vocab
        rows.append(Prompt(clean, corrupted))
    return rows


def pad(rows: list[list[int]], side: str, filler: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and attention mask padded on ``side``; with "none" all rows must be equally long."""
    if side == "none":
        return torch.tensor(rows), None
    width = max(map(len, rows)) + 1  # even the longest row gets one pad
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


def batch(pairs: list[Prompt], side: str = "none", corrupted_side: str | None = None) -> Batch:
    """Pairs as padded tensors; the corrupted prompts may be padded on another side."""
    clean, mask = pad([p.clean for p in pairs], side)
    corrupted, corrupted_mask = pad([p.corrupted for p in pairs], corrupted_side or side)
    return Batch(clean, corrupted, mask, corrupted_mask)


def inputs(pairs: list[Prompt], answers: Any, side: str = "none") -> dict[str, Any]:
    """Keyword arguments for ``fast_patch``."""
    return {**batch(pairs, side)._asdict(), "answers": torch.as_tensor(answers)}
