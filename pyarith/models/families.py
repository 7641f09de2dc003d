"""The families that pyarith supports. Adding one is adding a row here and one in tests/tiny_models.py."""

from __future__ import annotations

from pyarith.errors import check
from pyarith.models.spec import FamilySpec, MlpSpec, QkvSpec, Variant


def _gated(class_name: str, act: str = "act_fn") -> MlpSpec:
    return MlpSpec(class_name=class_name, gate="gate_proj", up="up_proj", down="down_proj", act=act)


FAMILIES: dict[str, FamilySpec] = {}


def register_family(spec: FamilySpec) -> FamilySpec:
    """Add a family (also from outside pyarith).

    Raises:
        InputError: a family of that name is registered already.
    """
    check(spec.name not in FAMILIES, f"family: {spec.name!r} is registered already")
    FAMILIES[spec.name] = spec
    return spec


for _spec in (
    FamilySpec(
        name="llama",
        model_class="LlamaForCausalLM",
        norm="rms",
        norm_class="LlamaRMSNorm",
        mlp_spec=_gated("LlamaMLP"),
    ),
    FamilySpec(
        name="mistral",
        model_class="MistralForCausalLM",
        norm="rms",
        norm_class="MistralRMSNorm",
        mlp_spec=_gated("MistralMLP"),
    ),
    FamilySpec(
        name="qwen2",
        model_class="Qwen2ForCausalLM",
        norm="rms",
        norm_class="Qwen2RMSNorm",
        mlp_spec=_gated("Qwen2MLP"),
        masks_by_layer_type=True,
    ),
    FamilySpec(
        name="qwen3",
        model_class="Qwen3ForCausalLM",
        norm="rms",
        norm_class="Qwen3RMSNorm",
        mlp_spec=_gated("Qwen3MLP"),
        masks_by_layer_type=True,
    ),
    FamilySpec(
        name="gemma2",
        model_class="Gemma2ForCausalLM",
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        norm="rms1p",
        norm_class="Gemma2RMSNorm",
        mlp_spec=_gated("Gemma2MLP"),
        softcap="final_logit_softcapping",
        masks_by_layer_type=True,
    ),
    FamilySpec(
        name="phi3",
        model_class="Phi3ForCausalLM",
        norm="rms",
        norm_class="Phi3RMSNorm",
        qkv=QkvSpec(qkv="self_attn.qkv_proj"),
        mlp_spec=MlpSpec(class_name="Phi3MLP", gate_up="gate_up_proj", down="down_proj", act="activation_fn"),
    ),
    FamilySpec(
        name="gpt2",
        model_class="GPT2LMHeadModel",
        decoder="transformer",
        blocks="h",
        final_norm="ln_f",
        o_proj="attn.c_proj",
        qkv=QkvSpec(qkv="attn.c_attn"),
        mlp_norm="ln_2",
        norm="layer",
        norm_class="LayerNorm",
        mlp_spec=MlpSpec(class_name="GPT2MLP", up="c_fc", down="c_proj", act="act"),
        position_table="learned positions",
        refuse_if=(("add_cross_attention", "cross-attention writes to the residual stream are not described"),),
    ),
    FamilySpec(
        name="gpt_neox",
        model_class="GPTNeoXForCausalLM",
        decoder="gpt_neox",
        final_norm="final_layer_norm",
        o_proj="attention.dense",
        qkv=QkvSpec(qkv="attention.query_key_value", order="by_group"),
        norm="layer",
        norm_class="LayerNorm",
        mlp_spec=MlpSpec(class_name="GPTNeoXMLP", up="dense_h_to_4h", down="dense_4h_to_h", act="act"),
        variants=(Variant(when={"use_parallel_residual": True}, then={"parallel": True}),),
    ),
    FamilySpec(
        name="gemma3_text",
        model_class="Gemma3ForCausalLM",
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        norm="rms1p",
        norm_class="Gemma3RMSNorm",
        mlp_spec=_gated("Gemma3MLP"),
        softcap="final_logit_softcapping",
        masks_by_layer_type=True,
        refuse_if=(("use_bidirectional_attention", "END's keys and values would depend on later tokens"),),
    ),
    FamilySpec(
        name="olmo2",
        model_class="Olmo2ForCausalLM",
        attn_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
        norm="rms",
        norm_class="Olmo2RMSNorm",
        mlp_spec=_gated("Olmo2MLP"),
    ),
    FamilySpec(
        name="granite",
        model_class="GraniteForCausalLM",
        norm="rms",
        norm_class="GraniteRMSNorm",
        mlp_spec=_gated("GraniteMLP"),
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    FamilySpec(
        name="cohere",
        model_class="CohereForCausalLM",
        mlp_norm="input_layernorm",
        norm="layer",
        norm_class="CohereLayerNorm",
        mlp_spec=_gated("CohereMLP"),
        parallel=True,
        logit_multiplier="logit_scale",
    ),
    FamilySpec(
        name="cohere2",
        model_class="Cohere2ForCausalLM",
        mlp_norm="input_layernorm",
        norm="layer",
        norm_class="Cohere2LayerNorm",
        mlp_spec=_gated("Cohere2MLP"),
        parallel=True,
        logit_multiplier="logit_scale",
        masks_by_layer_type=True,
    ),
    FamilySpec(
        name="stablelm",
        model_class="StableLmForCausalLM",
        norm="layer",
        norm_class="LayerNorm",
        mlp_spec=_gated("StableLmMLP"),
        variants=(
            Variant(when={"use_parallel_residual": True}, then={"parallel": True, "mlp_norm": "input_layernorm"}),
        ),
    ),
    FamilySpec(
        name="phi",
        model_class="PhiForCausalLM",
        final_norm="final_layernorm",
        o_proj="self_attn.dense",
        mlp_norm="input_layernorm",
        norm="layer",
        norm_class="LayerNorm",
        mlp_spec=MlpSpec(class_name="PhiMLP", up="fc1", down="fc2", act="activation_fn"),
        parallel=True,
    ),
    FamilySpec(
        name="gptj",
        model_class="GPTJForCausalLM",
        decoder="transformer",
        blocks="h",
        final_norm="ln_f",
        o_proj="attn.out_proj",
        qkv=QkvSpec(q="attn.q_proj", k="attn.k_proj", v="attn.v_proj"),
        mlp_norm="ln_1",
        norm="layer",
        norm_class="LayerNorm",
        mlp_spec=MlpSpec(class_name="GPTJMLP", up="fc_in", down="fc_out", act="act"),
        parallel=True,
        position_table="rotary positions in a table",
        own_attention=True,
    ),
    FamilySpec(
        name="falcon",
        model_class="FalconForCausalLM",
        decoder="transformer",
        blocks="h",
        final_norm="ln_f",
        o_proj="self_attention.dense",
        qkv=QkvSpec(qkv="self_attention.query_key_value", order="by_group"),
        kv_heads="num_kv_heads",
        mlp_norm="input_layernorm",
        norm="layer",
        norm_class="LayerNorm",
        mlp_spec=MlpSpec(class_name="FalconMLP", up="dense_h_to_4h", down="dense_4h_to_h", act="act"),
        parallel=True,
        own_attention=True,
        variants=(
            Variant(when={"multi_query": True}, then={"kv_heads": 1}),
            Variant(when={"parallel_attn": False}, then={"parallel": False, "mlp_norm": "post_attention_layernorm"}),
            Variant(
                when={"new_decoder_architecture": True},
                then={"kv_heads": "num_kv_heads", "parallel": True, "mlp_norm": "input_layernorm"},
            ),
            Variant(when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}, then={"mlp_norm": "ln_mlp"}),
        ),
        refuse_if=(("alibi", "its position bias depends on the mask, which is not described"),),
    ),
    # mixtures of experts: read_mlp knows the dense layers by their class, the others go through their own modules
    FamilySpec(
        name="mixtral",
        model_class="MixtralForCausalLM",
        norm="rms",
        norm_class="MixtralRMSNorm",
        router="gate",
    ),
    FamilySpec(
        name="qwen2_moe",
        model_class="Qwen2MoeForCausalLM",
        norm="rms",
        norm_class="Qwen2MoeRMSNorm",
        mlp_spec=_gated("Qwen2MoeMLP"),
        router="gate",
        masks_by_layer_type=True,
    ),
    FamilySpec(
        name="qwen3_moe",
        model_class="Qwen3MoeForCausalLM",
        norm="rms",
        norm_class="Qwen3MoeRMSNorm",
        mlp_spec=_gated("Qwen3MoeMLP"),
        router="gate",
    ),
    FamilySpec(
        name="gpt_oss",
        model_class="GptOssForCausalLM",
        norm="rms",
        norm_class="GptOssRMSNorm",
        router="router",
        masks_by_layer_type=True,
    ),
):
    register_family(_spec)
