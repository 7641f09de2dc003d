"""Random bits as a pure function of counters: every backend and every number of threads draws the same ones.

References: Salmon et al. 2011, doi:10.1145/2063384.2063405 (Philox).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

MASK = 0xFFFFFFFF


def noise(seed: int, step: int, number: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of the ``count`` elements of slice ``number``, by Philox4x32-10.

    Elements 8q ... 8q + 7 take the 16-bit halves, the lower one first, of the four words that the generator with the
    64-bit key ``seed`` gives for the counter (q, q / 2^32, step, number).
    """
    group = torch.arange(-(-count // 8), device=device)
    word = [group & MASK, group >> 32, torch.full_like(group, step), torch.full_like(group, number)]
    key = [seed & MASK, seed >> 32]
    for _ in range(10):
        left, right = word[0] * 0xD2511F53, word[2] * 0xCD9E8D57  # modulo 2^64, so that all 64 bits are there
        word = [
            ((right >> 32) & MASK) ^ word[1] ^ key[0],
            right & MASK,
            ((left >> 32) & MASK) ^ word[3] ^ key[1],
            left & MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    halves = [half for one in word for half in (one & 0xFFFF, one >> 16)]
    return torch.stack(halves, 1).flatten()[:count]


def rounded_by(value: Tensor, drawn: Tensor) -> Tensor:
    """fp32 to bf16, away from zero where the 16 bits that are cut off and the 16 drawn ones overflow."""
    bits = (value.view(torch.int32) + drawn.to(torch.int32).view(value.shape)) & -(2**16)
    return torch.where(value.isnan(), value, bits.view(torch.float32)).to(torch.bfloat16)
