"""Ablation of heads the literal way: one forward of the whole model per head, or per group in a repeated batch.

z of the head is set to zero at all positions or at END only, everything downstream is recomputed, END's answer logit is
read (SEMANTICS, "total effect"). In the competitors' favour: only END's logits are asked for, hooks are set in the
layers of the group's heads only, z is overwritten in place. All prompts have equal length, no padding, and END last.
"""

from collections.abc import Callable, Sequence

import torch
from baselines import HookPatching, LiteralPatching, NnsightPatching, Sender, TransformerLensPatching
from transformers import LlamaForCausalLM


class LiteralAblation(LiteralPatching):
    """Mixed in before a way to run forwards: what is replaced, instead of what is patched."""

    def __init__(self, model: LlamaForCausalLM, clean: torch.Tensor, answers: torch.Tensor, positions: str) -> None:
        self.model = model
        self.n_heads = model.config.num_attention_heads
        self.d_head = model.config.head_dim
        self.clean, self.answers = clean, answers
        self.place = slice(-1, None) if positions == "end" else slice(None)
        self._prepare()

    def _knock_out(self, z: torch.Tensor, layer: int, group: Sequence[Sender]) -> torch.Tensor:
        """z of all variants, `[variant * batch, pos, ...]`, with the heads of this layer set to zero in place."""
        variants = z.view(len(group), len(self.clean), self.clean.shape[1], self.n_heads, self.d_head)
        for variant, (found, head) in enumerate(group):
            if found == layer:
                variants[variant, :, self.place, head] = 0
        return z


class HookAblation(LiteralAblation, HookPatching):
    """Plain torch hooks on the Hugging Face model."""

    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        handles = []
        for layer in {layer for layer, _ in group}:

            def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], layer: int = layer) -> tuple[torch.Tensor]:
                return (self._knock_out(args[0], layer, group),)

            handles.append(self._o_projs[layer].register_forward_pre_hook(hook))
        return self._forward(ids, handles)


class TransformerLensAblation(LiteralAblation, TransformerLensPatching):
    """TransformerLens 4, `run_with_hooks` on `hook_z`."""

    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        hooks: list[tuple[str, Callable[..., torch.Tensor]]] = []
        for layer in {layer for layer, _ in group}:

            def knock_out(z: torch.Tensor, hook: object, layer: int = layer) -> torch.Tensor:
                return self._knock_out(z, layer, group)

            hooks.append((f"blocks.{layer}.attn.hook_z", knock_out))
        return self._bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)


class NnsightAblation(LiteralAblation, NnsightPatching):
    """nnsight: traces on the wrapped Hugging Face model."""

    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        wrapped, ablating, layers = self._wrapped, self, sorted({layer for layer, _ in group})
        with wrapped.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            for layer in layers:
                o_proj = wrapped.model.layers[layer].self_attn.o_proj
                o_proj.input = ablating._knock_out(o_proj.input, layer, group)
            logits = wrapped.lm_head.output.save()
        return logits


ABLATIONS: dict[str, type[LiteralAblation]] = {
    cls.provider: cls for cls in (HookAblation, TransformerLensAblation, NnsightAblation)
}
