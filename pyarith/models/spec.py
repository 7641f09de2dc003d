"""What pyarith must know about a model family: data only, no code of the family itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """Where a family's MLP keeps its weights, for the fused path.

    ``gate`` and ``up`` are separate projections, or ``gate_up`` holds both (gate rows first); a plain
    MLP names ``up`` only. ``out = down(act(gate) * up)`` or ``down(act(up))``.
    """

    class_name: str
    down: str
    act: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None

    @property
    def first(self) -> str:
        """The projection that feeds the activation."""
        name = self.gate_up or self.gate or self.up
        assert name is not None
        return name


@dataclass(frozen=True, kw_only=True)
class QkvSpec:
    """Where a family's attention keeps the rows of W_Q, W_K and W_V.

    Three projections ``q``, ``k``, ``v``, or one, ``qkv``, whose output features are ordered

    "blocks":   q of all heads, then k, then v of all kv heads
    "by_group": all q that share the first kv head, then its k, then its v, then those of the next
    """

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None
    order: str = "blocks"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Fields of a spec that are others where the config says so.

    Attributes:
        when: config attributes and the values that all of them have.
        then: fields of ``FamilySpec`` and their values.
    """

    when: Mapping[str, Any]
    then: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One family of Hugging Face causal language models.

    Module paths are relative to a decoder block unless said otherwise. The residual stream obeys

    serial:   mid = pre + m * attn_post_norm(o_proj(z));  post = mid + m * mlp_post_norm(mlp(mlp_norm(mid)))
    parallel: post = pre + m * o_proj(z) + m * mlp(mlp_norm(pre))

    with m the residual multiplier (1 in most families), and the logits are
    ``softcap(multiplier / divisor * (final_norm(post_last) @ unembed.weight.T + unembed.bias))``.

    Attributes:
        name: ``config.model_type``.
        model_class: name of the causal-LM class.
        decoder, final_norm, blocks, unembed: paths from the model; ``final_norm`` and ``blocks`` from the decoder.
        o_proj: the attention output projection, whose *input* is every head's z.
        qkv: the projections of queries, keys and values.
        kv_heads: config attribute with the number of key and value heads (as many as heads where it is absent or
            None), or that number.
        mlp_norm, mlp: norm before the MLP (None where the MLP reads the residual stream itself), and the MLP. In a
            parallel block attention may have a norm of its own: nothing here needs it.
        attn_post_norm, mlp_post_norm: norms after attention and MLP, or None.
        norm: "rms" (x * w), "rms1p" (x * (1 + w)) or "layer".
        norm_class: name of the norm's class, for the fused path.
        parallel: attention and MLP read the same residual stream.
        softcap: config attribute of the final logit softcap, or None.
        mlp_spec: where a dense MLP keeps its weights; None where every MLP goes through its own module.
        router: the module inside a mixture-of-experts MLP whose last result is the chosen experts [token, top_k], or
            None. Layers whose MLP has no such module are dense.
        residual_multiplier: config attribute of the factor on what attention and MLP write, or None.
        logit_multiplier, logit_divisor: config attributes of factors on the logits, or None.
        masks_by_layer_type: True when the decoder takes a dict of masks keyed by ``config.layer_types``.
        position_table: what it is called, where positions stand in a table of ``config.max_position_embeddings``
            rows, beyond which prompts cannot go; else None.
        own_attention: True where attention does not go through the ``AttentionInterface`` of transformers: what needs
            to stand in its place or to look on there is refused.
        variants: other values for fields above, by the config; all that hold apply, in order.
        refuse_if: config attributes that must be false, each with the reason why the spec does not cover them.
    """

    name: str
    model_class: str
    decoder: str = "model"
    blocks: str = "layers"
    final_norm: str = "norm"
    unembed: str = "lm_head"
    o_proj: str = "self_attn.o_proj"
    qkv: QkvSpec = QkvSpec()
    kv_heads: str | int = "num_key_value_heads"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm: str
    norm_class: str
    mlp_spec: MlpSpec | None = None
    router: str | None = None
    parallel: bool = False
    softcap: str | None = None
    residual_multiplier: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    masks_by_layer_type: bool = False
    position_table: str | None = None
    own_attention: bool = False
    variants: tuple[Variant, ...] = ()
    refuse_if: tuple[tuple[str, str], ...] = ()

    def of(self, config: Any) -> FamilySpec:
        """The spec of one model: that of the family with the variants of its config applied."""
        spec = self
        for variant in self.variants:
            if all(getattr(config, name, None) == value for name, value in variant.when.items()):
                spec = replace(spec, **variant.then)
        return spec
