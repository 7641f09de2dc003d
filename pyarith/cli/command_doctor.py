"""``pyarith doctor``."""

from __future__ import annotations

from typing import Any

from pyarith.cli.options import Debug
from pyarith.cli.terminal import Terminal, reported, table


def doctor(debug: Debug = False) -> None:
    """What is installed and what runs here.

    Versions, devices, the compiled extension, and which backend of each op can run and why not the others.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.doctor import diagnose

        with terminal.step("Looking at this installation"):
            found = diagnose()
        packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.versions.items())
        terminal.line(f"Versions:  {packages}")
        terminal.line(f"Machine:   {', '.join(f'{key} {value}' for key, value in found.machine.items())}")
        terminal.line(f"Devices:   {'; '.join(found.devices)}")
        terminal.line(f"Extension: {_extension(found.native)}")
        terminal.line(f"Families:  {', '.join(found.families)}")
        terminal.line()
        terminal.line("Can it run here, in float32? (- = the op has no such implementation)", style="bold")
        terminal.out.print(_availability(found.ops))
        for backend, reason in found.reasons:
            terminal.line(f"Why not {backend}: {reason}")
        terminal.line()
        terminal.line('What "auto" takes', style="bold")
        terminal.out.print(_chosen(found.chosen))


def _extension(native: dict[str, Any]) -> str:
    if not native["built"]:
        return f"not built: {native['reason']}"
    cuda = f"CUDA {native['cuda_version']} for {native['cuda_archs']}" if native.get("cuda") else "without CUDA"
    threads = f"{'OpenMP' if native['openmp'] else 'no OpenMP'}, threads {native['threads']}"
    levels = f"{native['cpu_level']} (this CPU has {native['cpu_supported']})"
    return f"built by {native['compiler']}, {cuda}; CPU kernels {levels}, {threads}"


def _availability(ops: dict[str, dict[str, str | None]]) -> Any:
    from pyarith.doctor import NONE

    made = table()
    made.add_column("op")
    for backend in next(iter(ops.values())):
        made.add_column(backend)
    for op, backends in ops.items():
        made.add_row(op, *("yes" if why is None else why if why == NONE else "no" for why in backends.values()))
    return made


def _chosen(chosen: dict[tuple[str, str], dict[str, str]]) -> Any:
    made = table()
    made.add_column("op")
    for device, dtype in chosen:
        made.add_column(f"{device} {dtype}")
    for op in next(iter(chosen.values())):
        made.add_row(op, *(backends[op] for backends in chosen.values()))
    return made
