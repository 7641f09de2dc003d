"""The floor of a run: its floating-point work at the matrix-product rate of this machine, measured in the same run.

    floor      = 2 batch f / rate_f + (r + r_mlp) / rate_r
    rate_f     all projections of all layers (q k v o gate up down), each layer its own weights, at the row count
               of the captures: 2 * batch * pos
    rate_r     the MLP projections of all layers, each its own weights, at the replay's row count of each layer,
               cut into blocks of at most `REPLAY_BLOCK` rows
    floor_best the same work at the best rates found over `ROW_COUNTS`; never above floor

Outputs go to buffers that exist already and nothing but the products is timed: norms, activations, attention and
allocation all count as time above the floor. A run gets below it only by computing less (shared tokens once).
Both sequences hold exactly the FLOP of the formula, so their seconds are the floor's two terms.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from harness import Check, relative_error
from transformers import LlamaForCausalLM
from workloads import Workload

REPLAY_BLOCK = 1024
ROW_COUNTS = (128, 256, 512, 1024, 2048)


class Floor:
    """Matrix-product sequences with a model's own weights; `capture` and `replay` are the two terms of the floor."""

    def __init__(self, workload: Workload, model: LlamaForCausalLM) -> None:
        self.workload = workload
        self._layers = [
            (
                [getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")],
                [getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")],
            )
            for layer in model.model.layers
        ]
        most = max(2 * workload.batch * workload.pos, REPLAY_BLOCK, *ROW_COUNTS)
        dtype = getattr(torch, workload.dtype)
        self._rows = torch.randn(most, workload.d_model, dtype=dtype)
        self._out = torch.empty_like(self._rows)
        self._gate = torch.randn(most, workload.d_mlp, dtype=dtype)
        self._up = torch.empty_like(self._gate)

    def capture(self) -> None:
        """The projections of both captures: FLOP of 2 batch f."""
        for attention, mlp in self._layers:
            self._attention(attention, 2 * self.workload.batch * self.workload.pos)
            self._mlp(mlp, 2 * self.workload.batch * self.workload.pos)

    def replay(self) -> None:
        """The MLPs of all replayed rows: FLOP of r + r_mlp."""
        for layer, (_, mlp) in enumerate(self._layers):
            for rows in _blocks(self.workload.replay_rows(layer)):
                self._mlp(mlp, rows)

    def at_rows(self, rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """(attention projections, MLP projections) of all layers at one row count, to find the best rates."""

        def attention() -> None:
            for weights, _ in self._layers:
                self._attention(weights, rows)

        def mlp() -> None:
            for _, weights in self._layers:
                self._mlp(weights, rows)

        return attention, mlp

    def best_seconds(self, seconds: Mapping[tuple[str, int], float], capture: float, replay: float) -> float:
        """Floor at the best rates: `seconds` of `at_rows` per (kind, rows), and the measured terms themselves."""
        work = self.workload
        per_row = {
            kind: min(s / rows for (k, rows), s in seconds.items() if k == kind) for kind in ("attention", "mlp")
        }
        tokens = 2 * work.batch * work.pos
        replay_rows = work.replay_flop / work.mlp_flop / work.n_layers
        best_capture = tokens * (per_row["attention"] + per_row["mlp"])
        return min(best_capture, capture) + min(replay_rows * per_row["mlp"], replay)

    def check(self) -> Check:
        """The timed products against fp64, for the last layer and a few rows."""
        mlp = self._layers[-1][1]
        self._mlp(mlp, 8)
        oracle = self._rows[:8].double() @ mlp[1].double().T
        bound = 16 * torch.finfo(self._rows.dtype).eps
        return Check("fp64 product", relative_error(self._up[:8], oracle), bound)

    def _attention(self, weights: list[torch.Tensor], rows: int) -> None:
        for weight in weights:
            torch.mm(self._rows[:rows], weight.T, out=self._out[:rows])

    def _mlp(self, weights: list[torch.Tensor], rows: int) -> None:
        gate, up, down = weights
        torch.mm(self._rows[:rows], gate.T, out=self._up[:rows])
        torch.mm(self._rows[:rows], up.T, out=self._up[:rows])
        torch.mm(self._gate[:rows], down.T, out=self._out[:rows])


def _blocks(rows: int) -> Iterator[int]:
    while rows > 0:
        yield min(rows, REPLAY_BLOCK)
        rows -= REPLAY_BLOCK
