"""Processes that a launcher such as torchrun started: whether this is one, its device, and how it joins the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from pyarith.engine.ranks import ARRIVAL, Team, team
from pyarith.errors import RankError, check

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    there = all(os.environ.get(name) for name in _LAUNCHED)
    return there and os.environ["WORLD_SIZE"].isdigit() and int(os.environ["WORLD_SIZE"]) > 1


def own_device(device: str) -> str:
    """The device of a launched rank: "auto" and "cuda" become the GPU of its own, where there are GPUs.

    Raises:
        RankError: more ranks on this host than GPUs.
    """
    count = torch.cuda.device_count()
    if device not in ("auto", "cuda") or count == 0:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    check(
        local < count,
        f"device: expected a GPU for each rank of a host, got LOCAL_RANK {local} with {count} CUDA devices; start "
        f"--nproc-per-node {count}, or give --device cpu",
        RankError,
    )
    return f"cuda:{local}"


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team of a launched process, in a process group made for it: nccl on CUDA devices, else gloo."""
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=ARRIVAL))
    except (RuntimeError, ValueError) as error:
        where = ", ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED)
        raise RankError(f"cannot join the other ranks ({where}): {' '.join(str(error).split())}") from error
    try:
        with team() as found:
            yield found
    finally:
        dist.destroy_process_group()
