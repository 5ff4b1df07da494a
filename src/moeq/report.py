"""What a load did: bytes, coverage, memory planned and actual, speed, kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moeq.plan import LoadPlan

GB = 1e9
"""Bytes are printed in decimal units: 1 MB is 10^6 bytes, as disks and model cards count."""


@dataclass(frozen=True)
class LoadReport:
    """Printed after every load. Of several ranks each has its own, of its share (see `LoadPlan`).

    Attributes:
        expert_bytes_before: of expert weights in the checkpoint.
        expert_bytes_after: of expert codes and scales in memory.
        total_bytes_before: of all tensors in the checkpoint.
        total_bytes_after: of all weights in memory.
        coverage: share of the expert weights that were quantized, 0 to 1.
        peak_bytes_planned: the most memory that loading was to take.
        peak_bytes_actual: that it took beyond what the process had; None where it cannot be read.
        seconds: from the first byte to the last.
        kernels: layer kind and scheme -> backend.
        notes: what a backend does differently from the letter of a scheme.
        kept: layer -> the rule that kept it unquantized.
        timeline: (seconds, bytes beyond what the process had) while it loaded; none where memory
            cannot be read.
    """

    expert_bytes_before: int
    expert_bytes_after: int
    total_bytes_before: int
    total_bytes_after: int
    coverage: float
    peak_bytes_planned: int
    peak_bytes_actual: int | None
    seconds: float
    kernels: dict[str, str]
    notes: tuple[str, ...]
    kept: dict[str, str]
    timeline: tuple[tuple[float, int], ...] = ()

    @property
    def gb_per_second(self) -> float:
        """Checkpoint bytes over load time."""
        return self.total_bytes_before / GB / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the timeline."""
        entries = dataclasses.asdict(self) | {"gb_per_second": self.gb_per_second}
        del entries["timeline"]
        return entries

    def lines(self) -> list[str]:
        """For a person."""
        actual = self.peak_bytes_actual
        lines = [
            f"experts  {size(self.expert_bytes_before)} -> {size(self.expert_bytes_after)}"
            f"   ({self.coverage:.0%} of expert weights quantized)",
            f"weights  {size(self.total_bytes_before)} -> {size(self.total_bytes_after)}",
            f"peak     {size(self.peak_bytes_planned)} planned,"
            f" {'not measured' if actual is None else size(actual) + ' actual'}",
            f"time     {self.seconds:.2f} s, {self.gb_per_second:.2f} GB/s",
        ]
        lines += [f"kernel   {kind}: {kernel}" for kind, kernel in self.kernels.items()]
        lines += [f"note     {note}" for note in self.notes]
        lines += [f"kept     {line}" for line in by_reason(self.kept)]
        return lines


def by_reason(reasons: dict[str, str]) -> list[str]:
    """Layer -> reason, as a line for each reason."""
    lines = []
    for reason in sorted(set(reasons.values())):
        names = [name for name, why in reasons.items() if why == reason]
        more = f" + {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {reason}")
    return lines


def make_report(
    plan: LoadPlan,
    *,
    model_bytes: int,
    peak: int | None,
    timeline: tuple[tuple[float, int], ...],
    seconds: float,
    kernels: dict[str, str],
    notes: tuple[str, ...],
) -> LoadReport:
    """The report of a load that followed `plan` and made a model of `model_bytes`."""
    return LoadReport(
        expert_bytes_before=plan.expert_bytes,
        expert_bytes_after=plan.final_expert_bytes,
        total_bytes_before=plan.checkpoint_bytes,
        total_bytes_after=model_bytes,
        coverage=plan.coverage,
        peak_bytes_planned=plan.peak_bytes,
        peak_bytes_actual=peak,
        seconds=seconds,
        kernels=kernels,
        notes=notes + tuple(by_reason(plan.filled)),
        kept=plan.kept,
        timeline=timeline,
    )


def size(nbytes: int) -> str:
    """12_345_678 -> '12.3 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"
