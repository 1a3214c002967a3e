"""What a run of trials found: one line of JSON a trial, a table of cells, a last line. Pieces of one plan add up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.types import Stage
from tests.chaos.plan import STAGES, Fault, Victim


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a trial."""

    seed: int
    number: int
    victim: Victim
    stage: Stage
    fault: Fault
    landed: bool
    """The fault fell before the stage it was meant for had ended."""
    pause_s: float
    """The longest of the replies that had begun when it fell."""
    took_s: float
    failed: int
    """Replies that ended with an error; those below did not."""
    duplicated: int
    """Longer than expected."""
    missing: int
    """Other than expected, and no longer."""
    died: bool
    """The engine that changed its role did not survive it, or did not have it in time."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        found = json.loads(line)
        kinds = {"victim": Victim(found["victim"]), "stage": Stage(found["stage"]), "fault": Fault(found["fault"])}
        return cls(**found | kinds)


def read_pieces(paths: Iterable[Path]) -> list[Outcome]:
    """By number. Raises ValueError for pieces of several plans, or a trial that is in two."""
    outcomes = [Outcome.from_json(line) for path in paths for line in path.read_text().splitlines()]
    counts = Counter(outcome.number for outcome in outcomes)
    twice = [number for number, count in counts.items() if count > 1]
    if len({outcome.seed for outcome in outcomes}) > 1 or twice:
        raise ValueError(f"these are no pieces of one plan: trials {twice} are there twice, or seeds differ")
    return sorted(outcomes, key=lambda outcome: outcome.number)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Faults that landed, by victim and stage: kills + freezes; below, changes of roles, and how long requests wait on
    this machine when nothing happens to them.
    """
    counts = Counter((o.victim, o.stage, o.fault) for o in outcomes if o.landed)
    lines = ["landed (kill+freeze)  " + "".join(f"{stage:>12}" for stage in STAGES)]
    for victim in Victim:
        cells = [f"{counts[victim, stage, Fault.KILL]}+{counts[victim, stage, Fault.FREEZE]}" for stage in STAGES]
        lines.append(f"{victim:<22}" + "".join(f"{cell:>12}" for cell in cells))
    if any(outcome.fault is Fault.SWITCH for outcome in outcomes):
        for victim in (Victim.PREFILL, Victim.DECODE):
            cells = [f"{counts[victim, stage, Fault.SWITCH]}" for stage in STAGES]
            lines.append(f"{f'{victim} changes role':<22}" + "".join(f"{cell:>12}" for cell in cells))
    if bystanders := [outcome for outcome in outcomes if outcome.victim is Victim.PLANNER]:
        lines.append(f"pause p99 beside faults of the planner, which stop no request: {_pauses(bystanders)}")
    if died := sum(outcome.died for outcome in outcomes):
        lines.append(f"{died} engines did not come through a change of roles")
    return lines


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last line."""
    failed, duplicated, missing = (
        sum(getattr(o, name) for o in outcomes) for name in ("failed", "duplicated", "missing")
    )
    return (
        f"chaos: {len(outcomes)} trials, {failed} failed, {duplicated} duplicated, {missing} missing, "
        f"pause p99 {_pauses(outcomes)}"
    )


def _pauses(outcomes: Sequence[Outcome]) -> str:
    """The 99th percentiles."""
    pauses = {fault: [o.pause_s for o in outcomes if o.fault is fault] for fault in Fault}
    p99 = {fault: f"{_quantile(found, 0.99):.1f} s" if found else "-" for fault, found in pauses.items()}
    return f"kill {p99[Fault.KILL]} freeze {p99[Fault.FREEZE]}"


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def passed(outcomes: Sequence[Outcome]) -> bool:
    return not any(outcome.failed or outcome.duplicated or outcome.missing or outcome.died for outcome in outcomes)
