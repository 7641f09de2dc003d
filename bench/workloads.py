"""Models, prompts and the count of their floating-point work.

Counts of one run over all heads and MLPs (gated MLP; 2 FLOP per multiply-add):

    f       = S * n_layers * (8 d^2 + 6 d d_mlp)                          one forward of one prompt of S tokens
    r       = n_heads * n_layers (n_layers + 1) / 2 * 6 d d_mlp           rows of head senders, per prompt
    r_mlp   = n_layers (n_layers - 1) / 2 * 6 d d_mlp                     rows of MLP senders, per prompt

Left out of every count, for all competitors alike: attention scores, norms, activations, embedding, output head, and
the rows `(z_corrupted - z_clean) @ W_O`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Workload:
    """A Llama-shaped random model and a batch of prompt pairs that differ in one token.

    `prefix` tokens at the start are the same in all prompts; the differing token is the middle one of the rest.
    """

    name: str
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    d_vocab: int
    batch: int
    pos: int
    prefix: int = 0
    dtype: str = "float32"

    @property
    def shape(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("name", "dtype")}

    @property
    def n_senders(self) -> int:
        return self.n_layers * self.n_heads + self.n_layers

    @property
    def mlp_flop(self) -> int:
        """One row through one MLP."""
        return 6 * self.d_model * self.d_mlp

    @property
    def forward_flop(self) -> int:
        """f: one forward of one prompt."""
        return self.pos * self.n_layers * (8 * self.d_model**2 + self.mlp_flop)

    def replay_rows(self, layer: int) -> int:
        """Rows that go through the MLP of `layer`: heads of this and earlier layers, MLPs of earlier layers."""
        return self.batch * (self.n_heads * (layer + 1) + layer)

    @property
    def replay_flop(self) -> int:
        """r + r_mlp of all prompts."""
        return sum(self.replay_rows(layer) for layer in range(self.n_layers)) * self.mlp_flop

    @property
    def flop(self) -> int:
        return 2 * self.batch * self.forward_flop + self.replay_flop

    @property
    def literal_flop(self) -> int:
        """One forward per head and per MLP."""
        return self.batch * self.n_senders * self.forward_flop

    @property
    def bytes(self) -> int:
        """Weights once for the captures, MLPs once more for the replay; each row read and written twice a layer."""
        item = getattr(torch, self.dtype).itemsize
        mlp_weights = 3 * self.d_model * self.d_mlp
        weights = self.n_layers * (4 * self.d_model**2 + 2 * mlp_weights) * item
        rows = sum(self.replay_rows(layer) for layer in range(self.n_layers))
        tokens = 2 * self.batch * self.pos * self.n_layers
        return weights + 4 * 4 * rows * self.d_model + 4 * item * tokens * self.d_model


FULL = {
    workload.name: workload
    for workload in (
        Workload("llama12x12", 12, 12, 768, 2048, 32000, batch=8, pos=24),
        Workload("llama12x12_long", 12, 12, 768, 2048, 32000, batch=2, pos=256),
        Workload("llama12x12_bf16", 12, 12, 768, 2048, 32000, batch=8, pos=24, dtype="bfloat16"),
        Workload("small8x8", 8, 8, 512, 1376, 32000, batch=4, pos=24),
        Workload("fewshot", 12, 12, 768, 2048, 32000, batch=64, pos=512 + 24, prefix=512),
        Workload("memory", 12, 12, 768, 2048, 32000, batch=64, pos=64),
    )
}


def quick(workload: Workload) -> Workload:
    """The same case small enough for a smoke test; its figures say nothing about speed."""
    prefix = min(workload.prefix, 16)
    return replace(
        workload,
        n_layers=3,
        n_heads=4,
        d_model=64,
        d_mlp=176,
        d_vocab=128,
        batch=min(workload.batch, 4),
        pos=prefix + 8,
        prefix=prefix,
    )


def build_model(workload: Workload, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in eval mode; the bf16 model is the fp32 one of the same seed, rounded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=workload.d_vocab,
        hidden_size=workload.d_model,
        intermediate_size=workload.d_mlp,
        num_hidden_layers=workload.n_layers,
        num_attention_heads=workload.n_heads,
        num_key_value_heads=workload.n_heads,
        max_position_embeddings=1024,
        # Writes of attention and MLP as large as the residual: effects far above rounding at every size.
        initializer_range=0.6 / workload.d_model**0.5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(getattr(torch, workload.dtype))


def build_inputs(workload: Workload, seed: int = 1) -> dict[str, torch.Tensor]:
    """`clean`, `corrupted` and `answers`: one differing token in the middle of what is not the shared prefix."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, workload.d_vocab, (workload.batch, workload.pos), generator=generator)
    clean[:, : workload.prefix] = clean[:1, : workload.prefix]
    corrupted = clean.clone()
    middle = workload.prefix + (workload.pos - workload.prefix) // 2
    corrupted[:, middle] = clean[:, middle] % (workload.d_vocab - 1) + 1
    answers = torch.randint(1, workload.d_vocab, (workload.batch,), generator=generator)
    return {"clean": clean, "corrupted": corrupted, "answers": answers}


def sample_senders(workload: Workload, n: int) -> list[tuple[int, int | None]]:
    """`n` head senders spread evenly over layers and heads: `(layer, head)`; an MLP sender would be `(layer, None)`."""
    count = workload.n_layers * workload.n_heads
    flat = [index * count // n for index in range(n)]
    return [(i // workload.n_heads, (i + n_th) % workload.n_heads) for n_th, i in enumerate(flat)]


def all_senders(workload: Workload) -> list[tuple[int, int | None]]:
    """Every head, layer by layer, then every MLP."""
    heads = [(layer, head) for layer in range(workload.n_layers) for head in range(workload.n_heads)]
    return [*heads, *((layer, None) for layer in range(workload.n_layers))]
