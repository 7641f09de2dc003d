"""Jobs of several ranks on this machine, all in one script, since a fresh interpreter takes seconds to import torch.

``python rank_jobs.py FOLDER`` runs every job of JOBS, its ranks forked from this process, and prints one JSON object:
job -> one entry per rank, ``{"status": exit status, "seconds": ..., ...}`` with what the rank returned or its error.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import inputs, make, prompts

import pyarith as pa
from pyarith.engine import ranks, run
from pyarith.engine.planner import Plan, Planner
from pyarith.engine.store import digest

LENGTHS = (7, 5, 9, 6, 5, 7, 7, 8, 9, 6, 10)
PLAN = Plan(2, 64, 64)  # six blocks
Act = Callable[[int], dict[str, Any]]


def model() -> torch.nn.Module:
    return make("llama-gqa2", torch.float32)


def given() -> dict[str, Any]:
    return inputs(prompts(LENGTHS), list(range(len(LENGTHS))), "left")


def bits(result: pa.PatchResult) -> str:
    return digest({name: value for name, value in vars(result).items() if isinstance(value, np.ndarray)})


def planned(plan: Plan = PLAN) -> None:
    Planner.plan = lambda self, budget, ranks=1: plan  # type: ignore[method-assign]


def patch(where: torch.nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """``fast_patch`` on this rank: the bits of its result, and how many blocks it computed itself."""
    seen: list[int] = []
    real = run._block

    def counted(*arguments: Any) -> Any:
        seen.append(1)
        return real(*arguments)

    run._block = counted
    options = {"verify": 0, "progress": False, **options}
    try:
        result = pa.fast_patch(where or model(), **{**given(), **options})
    finally:
        run._block = real
    said = {name: result.settings.get(name) for name in ("ranks", "plan", "resumed_blocks")}
    return {"bits": bits(result), "blocks": len(seen), "logits": result.head_logits.tolist(), **said}


def before_block(act: Callable[[int], None]) -> None:
    """``act(number)`` before each block that this rank computes, from 1 on."""
    real, count = run._block, [0]

    def block(*arguments: Any) -> Any:
        count[0] += 1
        act(count[0])
        return real(*arguments)

    run._block = block


def die(_: int) -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def equal(rank: int) -> dict[str, Any]:
    planned()
    before_block(lambda _: time.sleep(0.4 if rank == 0 else 0.02))
    return patch()


def own_plan(rank: int) -> dict[str, Any]:
    return patch(verify=1)


def other_settings(rank: int) -> dict[str, Any]:
    return patch(mlps="frozen" if rank == 1 else "recomputed")


def other_data(rank: int) -> dict[str, Any]:
    return patch(answers=torch.arange(11) + (rank == 2))


def other_model(rank: int) -> dict[str, Any]:
    mine = model()
    with torch.no_grad():
        mine.model.layers[1].mlp.up_proj.weight += 0.5 * (rank == 0)
    return patch(mine)


def other_code(rank: int) -> dict[str, Any]:
    if rank == 1:
        ranks.code = lambda: "9.9 (of another day)"
    return patch()


def broken(rank: int) -> dict[str, Any]:
    planned()

    def fail(number: int) -> None:
        if rank == 1 and number == 2:
            raise ValueError("the third floor is on fire")
        time.sleep(0.3 * (rank != 1))

    before_block(fail)
    return patch()


def killed(rank: int) -> dict[str, Any]:
    planned()
    before_block(lambda number: die(number) if rank == 1 and number == 2 else time.sleep(0.3 * (rank != 1)))
    return patch()


def first_killed(rank: int) -> dict[str, Any]:
    planned()
    before_block(lambda number: die(number) if rank == 0 and number == 2 else time.sleep(0.3))
    return patch()


def absent(rank: int) -> dict[str, Any]:
    ranks.ARRIVAL = 1.0
    if rank == 1:
        time.sleep(2)
        return {}
    return patch()


def out_of_memory(rank: int) -> dict[str, Any]:
    planned()

    def full(number: int) -> None:
        if rank == 1 and number == 1:
            raise torch.OutOfMemoryError("full")
        time.sleep(0.1 * (rank == 0))

    before_block(full)
    return patch()


def twice(rank: int) -> dict[str, Any]:
    planned()
    first, second = patch(), patch(log_probs=True)
    return {"bits": first["bits"], "again": second["bits"]}


def resumed(rank: int) -> dict[str, Any]:
    planned()
    return patch(resume=FOLDER)


def resumed_and_killed(rank: int) -> dict[str, Any]:
    planned()
    before_block(lambda number: die(number) if rank == 1 and number == 2 else time.sleep(0.3 * (rank != 1)))
    return patch(resume=FOLDER)


CHOICE: dict[str, Any] = {"heads": [(0, 1), (1, 2), (2, 3)], "mlps": [2]}


def step(where: torch.nn.Module, tuner: pa.SelectiveTuner, rows: slice) -> None:
    """Three steps on rows of the same eight lines."""
    ids = torch.randint(97, (8, 9), generator=torch.Generator().manual_seed(3))[rows]
    optimizer = tuner.optimizer(lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        where(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def tuned(rank: int) -> dict[str, Any]:
    """A tuner under DDP, each rank with half of the lines: the weights in the end, and how much was reduced."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    mine, reduced = model(), []

    def count(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        reduced.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    with pa.SelectiveTuner(mine, **CHOICE) as tuner:
        wrapped = DistributedDataParallel(mine)
        wrapped.register_comm_hook(None, count)
        step(wrapped, tuner, slice(4 * rank, 4 * rank + 4))
        state = mine.state_dict()
        sizes = {"reduced": reduced, "n_parameters": tuner.n_parameters}
    return {"bits": digest(state), "weights": {name: value.tolist() for name, value in state.items()}, **sizes}


def sharded(_: int) -> dict[str, Any]:
    """What ``fully_shard`` before and after attaching a tuner leads to."""
    from torch.distributed.fsdp import fully_shard

    def refused(call: Callable[[], Any]) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found, ids = {}, torch.arange(12).view(2, 6)
    first = model()
    for layer in first.model.layers:
        fully_shard(layer)
    found["fast_patch"] = refused(lambda: patch(first))
    found["before"] = refused(lambda: pa.SelectiveTuner(first, **CHOICE))
    for name in ("layers", "whole"):
        mine = model()
        tuner = pa.SelectiveTuner(mine, **CHOICE)
        for layer in mine.model.layers:
            fully_shard(layer)
        if name == "whole":
            fully_shard(mine)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)

        def train(mine: Any = mine, optimizer: Any = optimizer) -> None:
            mine(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        found[name] = refused(train)
    return found


JOBS: dict[str, tuple[int, Act]] = {
    "equal": (3, equal),
    "own_plan": (2, own_plan),
    "other_settings": (2, other_settings),
    "other_data": (3, other_data),
    "other_model": (3, other_model),
    "other_code": (3, other_code),
    "broken": (3, broken),
    "killed": (3, killed),
    "first_killed": (2, first_killed),
    "absent": (2, absent),
    "out_of_memory": (2, out_of_memory),
    "twice": (2, twice),
    "resumed_and_killed": (2, resumed_and_killed),
    "resumed": (3, resumed),
    "tuned": (2, tuned),
    "sharded": (2, sharded),
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def rank_of(size: int, rank: int, port: int, act: Act, said: Path) -> None:
    """A forked rank: joins the others, acts, writes what came of it, ends."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    start, status = time.monotonic(), 0
    try:
        dist.init_process_group("gloo")
        found = act(rank)
    except Exception as error:
        found, status = {"error": f"{type(error).__name__}: {error}"}, 1
    said.write_text(json.dumps({**found, "seconds": time.monotonic() - start}))
    os._exit(status)


def start(size: int, act: Act, folder: Path) -> list[dict[str, Any]]:
    port, ranks_ = free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            rank_of(size, rank, port, act, folder / f"{port}-{rank}.json")
        ranks_.append(pid)
    found = []
    for rank, pid in enumerate(ranks_):
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file = folder / f"{port}-{rank}.json"
        found.append({"status": status, "pid": pid, **(json.loads(file.read_text()) if file.exists() else {})})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.BEAT, ranks.SILENCE = 0.1, 1.5
    work = Path(sys.argv[1])
    FOLDER = work / "parts"
    alone = patch()  # all that is imported late is there now, and need not be imported by every rank
    print(json.dumps({"alone": [alone], **{name: start(size, act, work) for name, (size, act) in JOBS.items()}}))
