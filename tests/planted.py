"""Llama models whose weights are written by hand, so that the right answer of every sender is known.

``adder``: tokens ``BOS a + b =`` with operands 0..4 and the sum as answer.

=========  ==================================================================================
0.1        copies operand a from its token to ``+`` (an earlier position than END: it reaches
           the logits only through 1.2, so with the other heads frozen its effect is exactly 0)
0.3        writes the same constant at END in every prompt: effect exactly 0
1.2        moves operand a from ``+`` to END
2.0        moves operand b from its token to END
MLP 3      reads both, writes the sum: ``relu(a_i + b_j - 1.5)`` as ``silu`` of a large number
the rest   random q, k, v or gate and up, but the output projection is 0: effect exactly 0
=========  ==================================================================================

Every code is a unit vector of its own, so the residual's norm at END is sqrt(2), sqrt(3), sqrt(4) after
layers 0, 1, 2 and sqrt(5) at the end, in clean and patched runs alike. A patched 1.2, 2.0 or MLP 3 leaves the
clean answer's logit at 0 where it was ``LOGIT``: the relative effect is -1.

``voters``: attention only. Head h of layer l adds ``w[l, h]`` times the operand's code; the logit after a patch
is ``(W - w) / rms`` with ``rms**2 = (1 + (W - w)**2 + w**2) / d_model`` and W the sum of w.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DIGITS, SUMS = 5, 9
# token ids
A, B, PLUS, EQUALS, BOS, SUM0 = 0, 5, 10, 11, 12, 13
FILLER = SUM0 + SUMS
VOCAB = FILLER + 3
# residual dimensions: the tokens' own codes are dimensions 0..12
MID, AT_A, AT_B, OUT, CONST, FILL = 13, 18, 23, 28, 37, 38
D_MODEL, D_HEAD = 48, 16
LOGIT = 10.0
KEY_HEADS = {"a": [(1, 2)], "b": [(2, 0)], "ab": [(1, 2), (2, 0)]}
KEY_MLP = 3


def _config(n_layers: int, n_heads: int, d_mlp: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=d_mlp, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_heads, head_dim=D_HEAD, rms_norm_eps=0.0,
        # so large a base that the last rotary pairs, where the codes of q and k lie, do not turn at all
        rope_parameters={"rope_type": "default", "rope_theta": 1e24},
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip


def _blank(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Random q, k, v, gate and up; output projections 0, norms 1; each token embedded as its own dimension."""
    model = LlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            elif any(part in name for part in ("o_proj", "down_proj", "embed", "lm_head")):
                weight.zero_()
            else:
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(0.3 * noise)
        embedding = model.model.embed_tokens.weight
        embedding[:SUM0, :SUM0] = torch.eye(SUM0, dtype=torch.float64)
        for i in range(FILLER, VOCAB):
            embedding[i, FILL + i - FILLER] = 1.0
    return model


def _norm_scale(squared_norm: float) -> float:
    """What RMSNorm multiplies by: sqrt(d_model) / |x|."""
    return (D_MODEL / squared_norm) ** 0.5


def _mover(
    model: LlamaForCausalLM, layer: int, head: int, *, query: int, keys: list[int], read: int, write: int,
    width: int, squared_norm: float, gain: float = 1.0,
) -> None:  # fmt: skip
    """A head whose ``query`` token attends to the ``keys`` tokens and copies ``width`` codes, others attend BOS.

    ``squared_norm`` is the squared norm of the residual at the position that is read.
    """
    attention = model.model.layers[layer].self_attn
    rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
    sharp = 400.0
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] = 0.0
        q, k, v = (p.weight[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        for token in [*range(SUM0), FILL, FILL + 1, FILL + 2]:
            q[7 if token == query else 6, token] = sharp**0.5
        k[7, keys] = sharp**0.5
        k[6, BOS] = sharp**0.5
        for i in range(width):
            v[i, read + i] = 1.0
            attention.o_proj.weight[write + i, head * D_HEAD + i] = gain / _norm_scale(squared_norm)


def adder(seed: int = 0) -> LlamaForCausalLM:
    """The four-layer, four-head addition circuit above, in fp64."""
    model = _blank(_config(4, 4, DIGITS * DIGITS), seed)
    digits = list(range(DIGITS))
    operand_a, operand_b = [A + i for i in digits], [B + i for i in digits]
    _mover(model, 0, 1, query=PLUS, keys=operand_a, read=A, write=MID, width=DIGITS, squared_norm=1)
    _mover(model, 0, 3, query=EQUALS, keys=[EQUALS], read=EQUALS, write=CONST, width=1, squared_norm=1)
    _mover(model, 1, 2, query=EQUALS, keys=[PLUS], read=MID, write=AT_A, width=DIGITS, squared_norm=2)
    _mover(model, 2, 0, query=EQUALS, keys=operand_b, read=B, write=AT_B, width=DIGITS, squared_norm=1)
    mlp, scale, steep = model.model.layers[KEY_MLP].mlp, _norm_scale(4), 100.0
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.zero_()
        for i in digits:
            for j in digits:
                neuron = DIGITS * i + j
                mlp.gate_proj.weight[neuron, AT_A + i] = steep / scale
                mlp.gate_proj.weight[neuron, AT_B + j] = steep / scale
                mlp.gate_proj.weight[neuron, EQUALS] = -1.5 * steep / scale
                mlp.up_proj.weight[neuron, EQUALS] = 1.0 / scale
                mlp.down_proj.weight[OUT + i + j, neuron] = 2.0 / steep  # silu(steep / 2) = steep / 2
        for total in range(SUMS):
            model.lm_head.weight[SUM0 + total, OUT + total] = LOGIT / _norm_scale(5)
    return model


def problem(a: int, b: int, fill: int = 0) -> list[int]:
    """``BOS (filler)* a + b =`` as token ids."""
    return [BOS, *[FILLER + i % 3 for i in range(fill)], A + a, PLUS, B + b, EQUALS]


WEIGHTS = torch.tensor([[0.5, 0.0, 1.25], [-0.75, 0.25, 0.0]], dtype=torch.float64)  # [layer, head]


def voters(seed: int = 0) -> LlamaForCausalLM:
    """Attention only: head h of layer l adds ``WEIGHTS[l, h]`` times operand a's code to the answer's dimension."""
    n_layers, n_heads = WEIGHTS.shape
    model = _blank(_config(n_layers, n_heads, 7), seed)
    for layer in range(n_layers):
        for head in range(n_heads):
            _mover(
                model, layer, head, query=EQUALS, keys=[A + i for i in range(DIGITS)], read=A, write=OUT,
                width=DIGITS, squared_norm=1, gain=float(WEIGHTS[layer, head]),
            )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[SUM0 : SUM0 + DIGITS, OUT : OUT + DIGITS] = torch.eye(DIGITS, dtype=torch.float64)
    return model


def voters_logit(weight: torch.Tensor) -> torch.Tensor:
    """The clean answer's logit when a head of this weight votes for the corrupted operand instead."""
    rest = WEIGHTS.sum() - weight
    return rest * (D_MODEL / (1 + rest**2 + weight**2)) ** 0.5
