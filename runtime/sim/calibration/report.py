"""Errors of a device's entry against measured kernel times, as a table, and fitted entries as YAML."""

from collections.abc import Iterable
from dataclasses import fields
from typing import NamedTuple

import numpy as np

from sageLLM.runtime.core.cost import Efficiency, Hardware
from sageLLM.runtime.sim.calibration.kernel_times import Measured, Vector


class FamilyError(NamedTuple):
    """Errors of a family: predicted / measured - 1 in total and on average, and percentiles of the absolute error."""

    family: str
    num_rows: int
    total: float
    mean: float
    p50: float
    p90: float

    @classmethod
    def of(cls, family: str, predicted: Vector, measured: Vector) -> "FamilyError":
        """The errors of these predictions."""
        errors = predicted / measured - 1
        p50, p90 = np.percentile(np.abs(errors), (50, 90))
        total = predicted.sum() / measured.sum() - 1
        return cls(family, len(errors), float(total), float(errors.mean()), float(p50), float(p90))


def family_errors(measured: Measured, hardware: Hardware) -> list[FamilyError]:
    """The errors of every measured family."""
    found = []
    known = hardware.efficiency
    prompts = known.get("prefill_attn", Efficiency())
    for family, times in measured.families().items():
        efficiency = known.get(family) or known.get("default", Efficiency())
        found.append(FamilyError.of(family, times.predicted_s(hardware, efficiency, prompts), times.seconds))
    if measured.all_reduces:
        predicted = np.array([one.predicted_s(hardware, hardware.link) for one in measured.all_reduces])
        seconds = np.array([one.seconds for one in measured.all_reduces])
        found.append(FamilyError.of("all_reduce", predicted, seconds))
    return found


def as_table(errors: Iterable[FamilyError]) -> str:
    """A line per family."""
    lines = [f"{'family':14}{'kernels':>8}{'total':>9}{'mean':>9}{'p50 |e|':>9}{'p90 |e|':>9}"]
    for one in errors:
        figures = f"{one.total:>+9.1%}{one.mean:>+9.1%}{one.p50:>9.1%}{one.p90:>9.1%}"
        lines.append(f"{one.family:14}{one.num_rows:>8}{figures}")
    return "\n".join(lines)


def as_yaml(hardware: Hardware, measured: Measured) -> str:
    """The fitted part of the entry, to paste into its file."""
    lines = []
    if measured.all_reduces:
        link = hardware.link
        lines.append(f"link: {{bandwidth: {link.bandwidth:g}, latency_us: {link.latency_us:g}}}")
    lines.append("efficiency:")
    for family in measured.families():
        one = hardware.efficiency[family]
        changed = {f.name: getattr(one, f.name) for f in fields(one) if getattr(one, f.name) != f.default}
        lines.append(f"  {family}: {{{', '.join(f'{name}: {value:g}' for name, value in changed.items())}}}")
    return "\n".join(lines)
