"""Time of work on any device, without waiting for the device in the middle of it."""

from __future__ import annotations

import time

import torch


def mark(device: torch.device) -> float | torch.cuda.Event:
    """A point in time: of the host, or of the device's current stream where work is only queued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds between two marks of one device; waits until the second is reached."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
