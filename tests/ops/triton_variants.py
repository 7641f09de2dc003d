"""Compiles the Triton kernels ahead of time, as their launchers would start them at real sizes; needs no GPU.

    python tests/ops/triton_variants.py 90 "80:7B|fp32"

prints one JSON line per variant and architecture; behind a colon, of those variants whose name has that pattern. It
needs a process of its own (the interpreter and the compiler exclude each other) with the Triton that is to be tried and
the repository on PYTHONPATH. Block sizes, warps and stages come from the launchers' own `plan`, called with tensors
that have shapes and strides but no memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyarith.ops._triton import head_write_rows, masked_adamw, shared_prefix_attention, slice_grad, vocab_logsumexp
from pyarith.ops._triton._launch import Launch
from pyarith.ops.masked_adamw import factors_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gate_up_candidate

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Compiled:
    """What one variant became on one architecture.

    `tensor_cores` names the matrix instructions in its machine code, `wanted` those that it should have (one of them),
    `narrow` the places where an offset is computed in 32 bits.
    """

    version: str
    arch: str
    kernel: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    spill_instructions: int
    tensor_cores: list[str]
    wanted: list[str]
    narrow: list[str]


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _writes(batch, head, d_head, dtype, layout="linear", base=True) -> Launch:
    d_model = head * d_head
    weight = empty(d_model, d_model, dtype=dtype)
    w_o = (weight.T if layout == "linear" else weight).view(head, d_head, d_model)
    start = empty(batch, d_model) if base else None
    return head_write_rows.plan(empty(batch, head, d_head), w_o, start, empty(head, batch, d_model))


def _vocab(rows, d_model, d_vocab, dtype, softcap=0.0, bias=False) -> tuple[Launch, Launch]:
    unembed, bias_row = empty(d_vocab, d_model, dtype=dtype), empty(d_vocab) if bias else None
    return vocab_logsumexp.plan(empty(rows, d_model, dtype=dtype), unembed, bias_row, empty(rows), 1.0, softcap)


def _attention(n_variants, n_heads, n_kv_heads, d_head, dtype, softcap=0.0, window=0) -> Launch:
    q, own = (empty(n_variants, 8, heads, d_head, dtype=dtype) for heads in (n_heads, n_kv_heads))
    cache = empty(8, n_kv_heads, 512, d_head, dtype=dtype).transpose(1, 2)
    lengths = torch.empty(8, dtype=torch.int64, device="meta")
    return shared_prefix_attention.plan(
        q, cache, cache, own, own, lengths, empty(*q.shape, dtype=dtype), d_head**-0.5, softcap, window
    )


def _slices(tokens, m, n, dtype, rows=None, columns=None, accumulate=False) -> tuple[Launch, ...]:
    taken = [size if pick is None else sum(pick[1::2]) - sum(pick[::2]) for size, pick in ((m, rows), (n, columns))]
    left, right = empty(tokens, m, dtype=dtype), empty(tokens, n, dtype=dtype)
    return slice_grad.plan(left, right, empty(*taken), rows, columns, accumulate)


def _adamw(size, dim, ranges, dtype, seed=None, scaled=False) -> Launch:
    taken = sum(stop - start for start, stop in ranges)
    slices = [[empty(*((taken, size) if dim == 0 else (size, taken)))] for _ in range(4)]
    bounds = [bound for pair in ranges for bound in pair]
    factors = factors_of(1e-4, 0.9, 0.999, 1e-8, 0.1, 7)._asdict()
    return next(
        masked_adamw.plan(
            *slices, [empty(size, size, dtype=dtype)], bounds, [len(ranges)], [dim],
            empty(1) if scaled else None, step=7, seed=seed, **factors,
        )
    )  # fmt: skip


def variants() -> Iterator[tuple[str, Launch, bool]]:
    """(name, launch, does its work in tensor cores) at the sizes of real models."""
    yield "head_write_rows bf16 7B batch 8", _writes(8, 32, 128, BF16), True
    yield "head_write_rows bf16 7B batch 64", _writes(64, 32, 128, BF16), True
    yield "head_write_rows bf16 conv1d d_head 80", _writes(64, 20, 80, BF16, "conv1d", base=False), True
    yield "head_write_rows fp16 7B batch 64", _writes(64, 32, 128, FP16), False
    yield "head_write_rows fp32 conv1d", _writes(64, 12, 64, FP32, "conv1d"), False
    yield "head_write_rows bf16 odd", _writes(64, 5, 33, BF16), True
    partial, combine = _vocab(4096, 4096, 32000, BF16)
    yield "vocab_logsumexp bf16 7B", partial, True
    yield "vocab_logsumexp combine", combine, False
    yield "vocab_logsumexp bf16 softcap bias 16 rows", _vocab(16, 3584, 256000, BF16, 30.0, True)[0], True
    yield "vocab_logsumexp fp16 odd width", _vocab(512, 2049, 50257, FP16)[0], True
    yield "vocab_logsumexp fp32", _vocab(512, 768, 50257, FP32)[0], False
    yield "shared_prefix_attention bf16 d_head 128", _attention(1024, 32, 32, 128, BF16), True
    yield "shared_prefix_attention bf16 d_head 64 gqa", _attention(512, 32, 8, 64, BF16), True
    yield "shared_prefix_attention bf16 d_head 128 16 rows", _attention(4, 32, 8, 128, BF16), True
    yield "shared_prefix_attention fp16 d_head 80", _attention(512, 32, 32, 80, FP16), True
    yield "shared_prefix_attention bf16 d_head 256 softcap window", _attention(512, 16, 8, 256, BF16, 50.0, 4096), True
    yield "shared_prefix_attention bf16 d_head 512", _attention(512, 8, 2, 512, BF16), True
    yield "shared_prefix_attention fp32 d_head 256", _attention(512, 8, 2, 256, FP32), False
    yield "shared_prefix_attention fp32 d_head 64", _attention(512, 12, 12, 64, FP32), False
    heads = [bound for head in (1, 5, 6, 20, 31) for bound in (128 * head, 128 * head + 128)]
    yield "slice_grad bf16 7B rows of 5 heads", _slices(4096, 4096, 4096, BF16, heads)[0], True
    yield "slice_grad bf16 7B columns accumulated", _slices(4096, 4096, 4096, BF16, None, heads, True)[0], True
    products, combine = _slices(4096, 768, 768, BF16, [64, 128], accumulate=True)
    yield "slice_grad bf16 1 head of 64", products, True
    yield "slice_grad combine", combine, False
    yield "slice_grad fp16 odd ranges", _slices(4096, 4096, 4096, FP16, [1, 130, 200, 333], [5, 90])[0], True
    yield "slice_grad fp32 3 heads", _slices(1024, 768, 768, FP32, [0, 64, 192, 256, 320, 384])[0], False
    heads = [(0, 128), (512, 768), (3968, 4096)]
    yield "masked_adamw bf16 7B rows of 4 heads", _adamw(4096, 0, heads, BF16, scaled=True), False
    yield "masked_adamw bf16 7B columns stochastic", _adamw(4096, 1, heads, BF16, seed=2**40, scaled=True), False
    yield "masked_adamw fp32 columns", _adamw(768, 1, [(64, 128)], FP32), False
    yield "masked_adamw fp16 odd columns", _adamw(769, 1, [(3, 68)], FP16, scaled=True), False
    x, weight = empty(1024, 4096, dtype=BF16), empty(11008, 4096, dtype=BF16)
    out = empty(1024, 11008, dtype=BF16)
    yield "gate_up_candidate bf16 7B", gate_up_candidate.plan(x, weight, weight, None, None, out, "silu"), True


def source(launch: Launch) -> ASTSource:
    """The kernel, its arguments typed and specialised as Triton's launcher does: constants, 1 and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        aligned = isinstance(value, torch.Tensor)  # torch's own allocations are
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    assert set(launch.arguments) == {parameter.name for parameter in launch.kernel.params}
    return ASTSource(launch.kernel, signature, constants, attributes)


def wanted(launch: Launch, matrix: bool, arch: int) -> list[str]:
    """Matrix instructions of which one must appear. Below 64 rows the newer ones do not exist."""
    if not matrix:
        return []
    return [{80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]] if launch.arguments["BLOCK_ROWS"] >= 64 else ["HMMA"]


def narrow(launch: Launch, code: str) -> list[str]:
    """Lines of Triton's intermediate code that use a stride or move a pointer in 32 bits: neither may overflow."""
    tensors = [name for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)]
    steps = [n for n in launch.arguments if any(n.startswith(tensor + "_") for tensor in tensors)]
    stride = re.compile(rf"%({'|'.join(steps)})\b") if steps else None
    found = []
    for line in code.splitlines():
        if "tt.func" in line:
            continue
        moved = "tt.addptr" in line and not re.search(r"i64>?( loc.*)?$", line)
        used = stride and stride.search(line.partition(" = ")[2]) and "i32" in line and "arith.extsi" not in line
        if moved or used:
            found.append(line.strip())
    return found


def disassembled(cubin: bytes) -> str:
    """Resource usage, then machine code, by the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(index: int, arch: int) -> Compiled:
    name, launch, matrix = list(variants())[index]
    kernel = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options())
    code = disassembled(kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"\b{word}:(\d+)", code)[1]) for word in ("REG", "STACK"))
    return Compiled(
        version=triton.__version__,
        arch=f"sm_{arch}",
        kernel=name,
        registers=registers,
        shared_bytes=kernel.metadata.shared,
        spill_bytes=stack,
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        tensor_cores=sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code))),
        wanted=wanted(launch, matrix, arch),
        narrow=narrow(launch, kernel.asm["ttir"]),
    )


def main() -> None:
    asked = [(int(arch), pattern) for arch, _, pattern in (given.partition(":") for given in sys.argv[1:])]
    jobs = [(i, arch) for i, (name, *_) in enumerate(variants()) for arch, wish in asked if re.search(wish, name)]
    with ProcessPoolExecutor(max_workers=2) as pool:
        for result in pool.map(compiled, *zip(*jobs, strict=True)):
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
