"""What pyarith must know about a model family: data only, no code of the family itself."""

from __future__ import annotations

from dataclasses import dataclass


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
    "per_head": q, k, v of the first head, then of the next (as many kv heads as heads)
    """

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None
    order: str = "blocks"


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One family of Hugging Face causal language models.

    Module paths are relative to a decoder block unless said otherwise. The residual stream obeys

    serial:   mid = pre + attn_post_norm(o_proj(z));  post = mid + mlp_post_norm(mlp(mlp_norm(mid)))
    parallel: post = pre + o_proj(z) + mlp(mlp_norm(pre))

    and the logits are ``softcap(final_norm(post_last) @ unembed.weight.T)``.

    Attributes:
        name: ``config.model_type``.
        model_class: name of the causal-LM class.
        decoder, final_norm, blocks, unembed: paths from the model; ``final_norm`` and ``blocks`` from the decoder.
        o_proj: the attention output projection, whose *input* is every head's z.
        qkv: the projections of queries, keys and values.
        mlp_norm, mlp: norm before the MLP, and the MLP.
        attn_post_norm, mlp_post_norm: norms after attention and MLP, or None.
        norm: "rms" (x * w), "rms1p" (x * (1 + w)) or "layer".
        norm_class: name of the norm's class, for the fused path.
        parallel: True, False, or the name of the config attribute that says.
        softcap: config attribute of the final logit softcap, or None.
        mlp_spec: where a dense MLP keeps its weights; None where every MLP goes through its own module.
        router: the module inside a mixture-of-experts MLP whose last result is the chosen experts [token, top_k], or
            None. Layers whose MLP has no such module are dense.
        masks_by_layer_type: True when the decoder takes a dict of masks keyed by ``config.layer_types``.
        learned_positions: True where prompts cannot be longer than ``config.max_position_embeddings``.
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
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm: str
    norm_class: str
    mlp_spec: MlpSpec | None = None
    router: str | None = None
    parallel: bool | str = False
    softcap: str | None = None
    masks_by_layer_type: bool = False
    learned_positions: bool = False
    refuse_if: tuple[tuple[str, str], ...] = ()
