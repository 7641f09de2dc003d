"""Path patching head -> logits and MLP -> logits the literal way: one patched forward of the whole model per sender.

Three competitors with one protocol (SEMANTICS, "Path patching head -> logits"): the sender takes its corrupted value at
END, every other head's z keeps its clean value at all positions, MLPs, norms and unembedding are recomputed. Each takes
`heads_per_forward`: that many senders share one forward by repeating the batch, which is how a user of these tools
would speed them up. In their favour: only END's logits are asked for, captures are stored once and not timed with the
senders, nothing is recorded but the answer's logit. All prompts have equal length, no padding, and END last.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaForCausalLM

Sender = tuple[int, int | None]  # (layer, head), or (layer, None) for the layer's MLP


def with_shared_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """New modules around the same weights, for tools that rearrange or wrap the modules they are given."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


class LiteralPatching(ABC):
    """What the three share: captured values, groups of senders, and the answer's logit. Subclasses run the forwards."""

    provider = "hooks"

    def __init__(
        self, model: LlamaForCausalLM, clean: torch.Tensor, corrupted: torch.Tensor, answers: torch.Tensor
    ) -> None:
        self.model = model
        self.n_layers = model.config.num_hidden_layers
        self.n_heads = model.config.num_attention_heads
        self.d_head = model.config.head_dim
        self.clean, self.answers = clean, answers
        self._prepare()
        with torch.no_grad():
            self.clean_z, _, self.clean_logits = self._capture(clean)
            z, mlp, self.corrupted_logits = self._capture(corrupted)
        self.corrupted_z = [value[:, -1] for value in z]
        self.corrupted_mlp = [value[:, -1] for value in mlp]

    @torch.no_grad()
    def run(self, senders: Sequence[Sender], heads_per_forward: int = 1) -> torch.Tensor:
        """Patched answer logits `[sender, batch]`."""
        groups = [senders[i : i + heads_per_forward] for i in range(0, len(senders), heads_per_forward)]
        return torch.cat([self._run_group(group) for group in groups])

    def _run_group(self, group: Sequence[Sender]) -> torch.Tensor:
        logits = self._patched_forward(self.clean.repeat(len(group), 1), group)
        return self._answer_logits(logits).view(len(group), -1)

    def _answer_logits(self, logits: torch.Tensor) -> torch.Tensor:
        answers = self.answers.repeat(len(logits) // len(self.answers))
        return logits[:, -1].gather(1, answers[:, None])[:, 0].float()

    def _frozen_z(self, layer: int, group: Sequence[Sender]) -> torch.Tensor:
        """Input of the layer's o_proj for all variants, `[variant * batch, pos, n_heads * d_head]`."""
        z = self.clean_z[layer].repeat(len(group), 1, 1)
        variants = z.view(len(group), len(self.clean), z.shape[1], self.n_heads, self.d_head)
        for variant, (sender_layer, head) in enumerate(group):
            if sender_layer == layer and head is not None:
                patch = self.corrupted_z[layer].view(-1, self.n_heads, self.d_head)[:, head]
                variants[variant, :, -1, head] = patch
        return z

    def _mlp_senders(self, layer: int, group: Sequence[Sender]) -> list[int]:
        return [variant for variant, sender in enumerate(group) if sender == (layer, None)]

    def _patch_mlp(self, output: torch.Tensor, layer: int, group: Sequence[Sender]) -> torch.Tensor:
        """The MLP's output with END replaced by the corrupted value in the variants that send from it."""
        patched = output.clone()
        for variant in self._mlp_senders(layer, group):
            patched[variant * len(self.clean) : (variant + 1) * len(self.clean), -1] = self.corrupted_mlp[layer]
        return patched

    @abstractmethod
    def _prepare(self) -> None:
        """Find the modules that the tool needs."""

    @abstractmethod
    def _capture(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """(z per layer, MLP output per layer, answer logits) of an unpatched forward."""

    @abstractmethod
    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        """Logits `[variant * batch, 1, d_vocab]` at END."""


class HookPatching(LiteralPatching):
    """Plain torch hooks on the Hugging Face model."""

    def _prepare(self) -> None:
        self._o_projs = [layer.self_attn.o_proj for layer in self.model.model.layers]
        self._mlps = [layer.mlp for layer in self.model.model.layers]

    def _capture(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        z: list[torch.Tensor] = []
        mlp: list[torch.Tensor] = []
        handles = [m.register_forward_pre_hook(lambda _, args: z.append(args[0])) for m in self._o_projs]
        handles += [m.register_forward_hook(lambda _, __, output: mlp.append(output)) for m in self._mlps]
        logits = self._forward(ids, handles)
        return z, mlp, self._answer_logits(logits)

    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        handles = []
        for layer, (o_proj, mlp) in enumerate(zip(self._o_projs, self._mlps, strict=True)):
            handles.append(o_proj.register_forward_pre_hook(lambda _, __, layer=layer: (self._frozen_z(layer, group),)))
            if self._mlp_senders(layer, group):
                handles.append(
                    mlp.register_forward_hook(lambda _, __, output, layer=layer: self._patch_mlp(output, layer, group))
                )
        return self._forward(ids, handles)

    def _forward(self, ids: torch.Tensor, handles: list[torch.utils.hooks.RemovableHandle]) -> torch.Tensor:
        try:
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        finally:
            for handle in handles:
                handle.remove()


class TransformerLensPatching(LiteralPatching):
    """TransformerLens 4: a TransformerBridge around a copy of the modules that shares the weights."""

    provider = "transformer_lens"

    def _prepare(self) -> None:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        modules = with_shared_weights(self.model)
        modules.set_attn_implementation("eager")  # as boot_transformers does: its hooks need the attention pattern
        self._bridge = build_bridge_from_module(modules, architecture="LlamaForCausalLM", hf_config=modules.config)

    def _capture(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        names = [
            [f"blocks.{layer}.{site}" for layer in range(self.n_layers)] for site in ("attn.hook_z", "hook_mlp_out")
        ]
        logits, cache = self._bridge.run_with_cache(ids, names_filter=[*names[0], *names[1]])
        z = [cache[name].reshape(*ids.shape, -1) for name in names[0]]
        return z, [cache[name] for name in names[1]], self._answer_logits(logits)

    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        hooks: list[tuple[str, Callable[..., torch.Tensor]]] = []
        for layer in range(self.n_layers):

            def freeze(z: torch.Tensor, hook: object, layer: int = layer) -> torch.Tensor:
                return self._frozen_z(layer, group).view(z.shape)

            def patch(output: torch.Tensor, hook: object, layer: int = layer) -> torch.Tensor:
                return self._patch_mlp(output, layer, group)

            hooks.append((f"blocks.{layer}.attn.hook_z", freeze))
            if self._mlp_senders(layer, group):
                hooks.append((f"blocks.{layer}.hook_mlp_out", patch))
        return self._bridge.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False, logits_to_keep=1)


class NnsightPatching(LiteralPatching):
    """nnsight: traces on the wrapped Hugging Face model."""

    provider = "nnsight"

    def _prepare(self) -> None:
        from nnsight import NNsight

        self._wrapped = NNsight(with_shared_weights(self.model))

    def _capture(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        wrapped, n_layers = self._wrapped, self.n_layers
        with wrapped.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            z = list().save()
            mlp = list().save()
            for layer in range(n_layers):
                z.append(wrapped.model.layers[layer].self_attn.o_proj.input)
                mlp.append(wrapped.model.layers[layer].mlp.output)
            logits = wrapped.lm_head.output.save()
        return z, mlp, self._answer_logits(logits)

    def _patched_forward(self, ids: torch.Tensor, group: Sequence[Sender]) -> torch.Tensor:
        wrapped, n_layers, patching = self._wrapped, self.n_layers, self
        with wrapped.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            for layer in range(n_layers):
                block = wrapped.model.layers[layer]
                block.self_attn.o_proj.input = patching._frozen_z(layer, group)
                if patching._mlp_senders(layer, group):
                    block.mlp.output = patching._patch_mlp(block.mlp.output, layer, group)
            logits = wrapped.lm_head.output.save()
        return logits


PEERS = {cls.provider: cls for cls in (TransformerLensPatching, NnsightPatching)}


def available_peers() -> tuple[dict[str, type[LiteralPatching]], dict[str, str]]:
    """(peers that import here, reason per peer that does not)."""
    found, missing = {}, {}
    for name, cls in PEERS.items():
        try:
            __import__(name)
            found[name] = cls
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
