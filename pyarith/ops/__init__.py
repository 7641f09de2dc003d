"""Operators of pyarith: one contract per file, backends chosen by one table.

Each op is also ``torch.ops.pyarith.<op>``; the functions here allocate the result and are what callers use.
"""

from pyarith.ops._contract import ACTS, KINDS
from pyarith.ops._native import info as native_info
from pyarith.ops._registry import ReportRow, backend_of, report, why_not
from pyarith.ops.ablate_heads import ablate_heads
from pyarith.ops.add_norm import add_norm
from pyarith.ops.answer_logits import answer_logits
from pyarith.ops.gated_act import gated_act
from pyarith.ops.head_write_rows import head_write_rows
from pyarith.ops.masked_adamw import masked_adamw
from pyarith.ops.shared_prefix_attention import shared_prefix_attention
from pyarith.ops.slice_grad import slice_grad
from pyarith.ops.vocab_logsumexp import chunk_tokens as vocab_chunk_tokens
from pyarith.ops.vocab_logsumexp import scratch_bytes as vocab_scratch_bytes
from pyarith.ops.vocab_logsumexp import vocab_logsumexp

__all__ = [
    "ACTS",
    "KINDS",
    "ReportRow",
    "ablate_heads",
    "add_norm",
    "answer_logits",
    "backend_of",
    "gated_act",
    "head_write_rows",
    "masked_adamw",
    "native_info",
    "report",
    "shared_prefix_attention",
    "slice_grad",
    "vocab_chunk_tokens",
    "vocab_logsumexp",
    "vocab_scratch_bytes",
    "why_not",
]
