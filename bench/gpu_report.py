"""What the GPU benchmark says in the end: one outcome per case, figures with their targets, and the table of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

PASSED, FAILED, SKIPPED = "passed", "FAILED", "not measured"
REHEARSED = "a rehearsal at tiny sizes on the CPU: no figure above says anything about speed"


@dataclass(frozen=True)
class Stage:
    """`seconds` is what a stage may take before its remaining cases are left out; a case of it ends after `hangs`."""

    name: str
    title: str
    seconds: float
    hangs: float
    checks: bool = False


STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", "build pyarith for this device", 180, 180, checks=True),
        Stage("kernels", "check every kernel against fp64", 150, 40, checks=True),
        Stage("engine", "check fast_patch against literal hooks, tuning against full gradients", 100, 40, checks=True),
        Stage("ceilings", "copy bandwidth and GEMM rate of this device", 30, 20),
        Stage("ops", "time the kernels at the replay sizes of a 7B model", 90, 40),
        Stage("tuning", "time Precise SFT at LLaMA2-7B shape", 90, 80),
        Stage("fast_patch", "time fast_patch at LLaMA2-7B shape", 150, 100),
        Stage("more", "a Llama-3-8B shape, block sizes", 120, 100),
    )
}
QUICK = ("build", "kernels", "engine")


@dataclass(frozen=True)
class Figure:
    """One line of the table; `reached` is None where there is no target."""

    case: str
    what: str
    text: str
    target: str = ""
    reached: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """How a case ended. `values` are numbers that later cases need, so that they survive a restart."""

    stage: str
    case: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """Everything known so far; can be printed at any time."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    planned: dict[str, str] = field(default_factory=dict)  # case -> stage
    record: str = ""
    rehearsed: bool = False

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.case] = outcome
        self.planned.setdefault(outcome.case, outcome.stage)

    def leave_out(self, reason: str) -> None:
        """Every planned case without an outcome was not measured, for this reason."""
        for case, stage in self.planned.items():
            if case not in self.outcomes:
                self.add(Outcome(stage, case, SKIPPED, reason))

    @property
    def all_well(self) -> bool:
        """Nothing failed, and everything that had to be checked was."""
        done = self.outcomes.values()
        return bool(done) and not any(o.status != PASSED and (o.status == FAILED or _checks(o)) for o in done)

    def lines(self) -> list[str]:
        rows = [("stage", "case", "figure", "target", "reached")]
        for stage in STAGES.values():
            outcomes = [o for o in self.outcomes.values() if o.stage == stage.name]
            if outcomes:
                rows.append((stage.name, "", _summary(outcomes), "", ""))
            figures = [f for f in self.figures if self.planned.get(f.case) == stage.name]
            rows += [(stage.name, f.what, f.text, f.target, _answer(f.reached)) for f in figures]
            for status in (FAILED, SKIPPED):
                rows += [
                    (stage.name, o.case, f"{status}: {o.reason:.160}", "", "") for o in outcomes if o.status == status
                ]
        widths = [max(len(row[i]) for row in rows if i != 2 or row[3] or row[4]) for i in range(5)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        last = f"record: {self.record or 'no row was written'}"
        return [*map(str.rstrip, table), *[REHEARSED] * self.rehearsed, last]


def _checks(outcome: Outcome) -> bool:
    return STAGES[outcome.stage].checks


def _summary(outcomes: Iterable[Outcome]) -> str:
    outcomes = list(outcomes)
    counts = [(status, sum(o.status == status for o in outcomes)) for status in (PASSED, FAILED, SKIPPED)]
    text = ", ".join(f"{n} {status}" for status, n in counts if n)
    return f"{text} in {sum(o.seconds for o in outcomes):.0f} s"


def _answer(reached: bool | None) -> str:
    return "" if reached is None else "yes" if reached else "NO"
