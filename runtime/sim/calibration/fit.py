"""Fits efficiencies and links to measured times by minimizing the mean absolute logarithm of the ratio.

Kernels are weighted by the square root of their time, so that short ones, of which the tables have most, do not
outweigh those that a step spends its time in.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.cost import Efficiency, Hardware, Link
from sageLLM.runtime.sim.calibration.kernel_times import AllReduce, KernelTimes, Measured

Vector = npt.NDArray[np.float64]
MAX_ROWS = 3000
NO_OVERLAP = 30.0
"""Exponent from which the longer of the two times is taken."""
MAX_MEMORY = 4.0
FREE = {
    "gemm": ("compute", "memory", "overlap", "launch_us"),
    "experts": ("compute", "memory", "overlap", "launch_us"),
    "prefill_attn": ("compute", "memory", "overlap", "launch_us", "context_ns"),
    "decode_attn": ("compute", "memory", "overlap", "launch_us"),
    "mixed_attn": ("compute", "memory", "overlap", "launch_us", "context_ns", "sequence_us"),
    "sample": ("memory", "launch_us"),
    "default": ("memory", "launch_us"),
}
"""The fields that are fitted, by family; the others keep their defaults."""
MIN_INTENSITY = 4.0
"""Operations per byte from which a kernel of an op without its own entry above can be bound by arithmetic."""
START = {"compute": 0.5, "memory": 0.7, "overlap": 2.0, "launch_us": 4.0, "context_ns": 10.0, "sequence_us": 0.5}


def fit(measured: Measured, hardware: Hardware) -> Hardware:
    """The device with efficiencies, and a link, fitted to the measurements; families without any keep theirs."""
    efficiency = dict(hardware.efficiency)
    for family, times in measured.families().items():
        prompts = efficiency.get("prefill_attn", Efficiency())
        efficiency[family] = _fit_family(family, times.sample(MAX_ROWS), hardware, prompts)
    link = _fit_link(measured.all_reduces, hardware) if measured.all_reduces else hardware.link
    return replace(hardware, efficiency=efficiency, link=link)


def _fit_family(family: str, times: KernelTimes, hardware: Hardware, prompts: Efficiency) -> Efficiency:
    names = FREE.get(family) or FREE["gemm" if times.max_intensity > MIN_INTENSITY else "default"]
    weights = np.sqrt(times.seconds)

    def loss(point: Vector) -> float:
        predicted = times.predicted_s(hardware, _efficiency(names, point), prompts)
        return float(np.average(np.abs(np.log(predicted / times.seconds)), weights=weights))

    best = min((minimize(loss, start) for start in _starts(names)), key=loss)
    return _rounded(_efficiency(names, best))


def _starts(names: Sequence[str]) -> list[Vector]:
    """Starting points: the times of arithmetic and memory traffic added, and overlapped; fast and slow decodes."""
    starts = [START, START | {"overlap": 1.1}, START | {"compute": 0.02, "memory": 0.3}]
    return [np.array([_to_free(name, start[name]) for name in names]) for start in starts]


def _to_free(name: str, value: float) -> float:
    if name == "compute":
        return float(np.log(value / (1 - value)))
    return float(np.log(value - 1 if name == "overlap" else value))


def _from_free(name: str, x: float) -> float:
    """The field for an unbounded coordinate: `compute` is below 1, `overlap` above 1, the others are positive.

    `memory` is at most MAX_MEMORY, which a kernel reaches that is never bound by memory traffic.
    """
    x = min(max(x, -30.0), 30.0)
    if name == "compute":
        return float(1 / (1 + np.exp(-x)))
    if name == "memory":
        return float(min(np.exp(x), MAX_MEMORY))
    return float(np.exp(x)) + (1.0 if name == "overlap" else 0.0)


def _efficiency(names: Sequence[str], point: Vector) -> Efficiency:
    return Efficiency(**{name: _from_free(name, x) for name, x in zip(names, point, strict=True)})


def _rounded(fitted: Efficiency) -> Efficiency:
    """Three digits; an exponent that makes no difference becomes None."""
    fields = {name: float(f"{getattr(fitted, name):.3g}") for name in START if getattr(fitted, name) is not None}
    if fields.get("overlap", 0.0) > NO_OVERLAP:
        del fields["overlap"]
    return Efficiency(**fields)


def _fit_link(measured: Sequence[AllReduce], hardware: Hardware) -> Link:
    def link(point: Vector) -> Link:
        return Link(*(float(f"{value:.3g}") for value in np.exp(point)))

    def loss(point: Vector) -> float:
        ratios = [one.predicted_s(hardware, link(point)) / one.seconds for one in measured]
        return float(np.abs(np.log(ratios)).mean())

    return link(minimize(loss, np.log([hardware.link.bandwidth, max(hardware.link.latency_us, 0.1)])))


def minimize(loss: Callable[[Vector], float], start: Vector, num_steps: int = 1500) -> Vector:
    """The point of the smallest loss that the simplex method of Nelder and Mead (1965) finds from `start`."""
    points = [start, *(start + 0.5 * axis for axis in np.eye(len(start)))]
    simplex = sorted(((loss(point), i, point) for i, point in enumerate(points)), key=lambda one: one[:2])
    for number in range(len(points), len(points) + num_steps):
        center = np.mean([point for _, _, point in simplex[:-1]], axis=0)
        worst = simplex[-1]
        reflected = center + (center - worst[2])
        found = loss(reflected)
        if found < simplex[0][0]:
            expanded = center + 2 * (center - worst[2])
            reached = loss(expanded)
            best = (reached, number, expanded) if reached < found else (found, number, reflected)
        elif found < simplex[-2][0]:
            best = (found, number, reflected)
        else:
            contracted = center + 0.5 * ((reflected if found < worst[0] else worst[2]) - center)
            best = (loss(contracted), number, contracted)
        if best[0] < worst[0]:
            simplex[-1] = best
        else:  # shrink towards the best
            first = simplex[0][2]
            halved = [first + 0.5 * (point - first) for _, _, point in simplex]
            simplex = [(loss(point), i, point) for i, point in enumerate(halved)]
        simplex.sort(key=lambda one: one[:2])
        if simplex[-1][0] - simplex[0][0] < 1e-7:
            break
    return simplex[0][2]
