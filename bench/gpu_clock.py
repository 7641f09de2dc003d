"""Time, streams, graphs and memory of one device, the same calls on a GPU and, for the rehearsal, on the CPU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from harness import Timing
from memory import PeakMemory

from pyarith.engine.clock import mark, seconds

# far more than any L2, so that reading it takes longer than the host needs to queue the call that is timed behind it
EVICT_BYTES = 2 * 2**30
WARMUP = 3


class Clock:
    """On a GPU by events; on the CPU, where nothing is queued, by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._cold = torch.ones(EVICT_BYTES // 4 if self.cuda else 1, device=device)
        self._sink = torch.empty((), device=device)

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def rounds(self, calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = WARMUP) -> dict[str, Timing]:
        """Interleaved rounds, each call with a cold L2.

        The L2 is emptied by reading: writing would leave dirty lines, whose way back to memory the next call would pay
        for. The reading also keeps the device busy while the host queues the call, so launch gaps stay out of the time.
        """
        for call in calls.values():
            for _ in range(warmup):
                call()
        names = list(calls)
        marks: dict[str, list] = {name: [] for name in names}
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                torch.sum(self._cold, 0, out=self._sink)
                begin = mark(self.device)
                calls[name]()
                marks[name].append((begin, mark(self.device)))
        return {name: Timing.of([seconds(*pair) for pair in pairs]) for name, pairs in marks.items()}

    def wall(self, call: Callable[[], object], repetitions: int) -> Timing:
        """Host and device together, from an idle device to an idle device."""
        samples = []
        for _ in range(repetitions):
            self.synchronise()
            begin = mark(torch.device("cpu"))
            call()
            self.synchronise()
            samples.append(seconds(begin, mark(torch.device("cpu"))))
        return Timing.of(samples)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """What the call held at most beyond what was held before it."""
        if not self.cuda:
            with PeakMemory() as memory:
                call()
            return memory.private_bytes
        self.synchronise()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronise()
        return torch.cuda.max_memory_allocated(self.device) - before

    @contextmanager
    def other_stream(self) -> Iterator[None]:
        """A stream that is not the default one."""
        if not self.cuda:
            yield
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph to replay; it must have run before, so that nothing is compiled in the capture."""
        if not self.cuda:
            return call
        with self.other_stream():
            call()
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Inside, whatever makes the host wait for the device is an error."""
        if not self.cuda:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
