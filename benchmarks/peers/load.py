"""Load of the machine by other processes, and memory of this one: from /proc, as Linux has it."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

TICKS = os.sysconf("SC_CLK_TCK")
MAX_FOREIGN = 0.15
"""Cores of other processes from which a figure counts as disturbed."""


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds of processor time at one moment: of the whole machine, and of this process with its descendants."""

    wall: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> Self:
        """Reads the counters."""
        return cls(time.perf_counter(), _machine_seconds(), sum(map(_process_seconds, family(os.getpid()))))

    def foreign_since(self, start: "LoadTimes") -> float:
        """Cores that other processes used on average since `start`."""
        foreign = (self.machine - start.machine) - (self.own - start.own)
        return max(0.0, foreign / max(self.wall - start.wall, 1e-9))


def wait_until_quiet(limit_s: float = 900.0, span_s: float = 1.0) -> bool:
    """Returns True when others use at most MAX_FOREIGN cores for `span_s`, or False after the limit."""
    until = time.perf_counter() + limit_s
    while time.perf_counter() < until:
        start = LoadTimes.now()
        time.sleep(span_s)
        if LoadTimes.now().foreign_since(start) <= MAX_FOREIGN:
            return True
    return False


def memory_mb(field: str) -> float:
    """A field of /proc/PID/status, such as VmRSS or VmHWM, summed over this process and its descendants, in MB."""
    total = 0.0
    for pid in family(os.getpid()):
        for line in _lines(f"/proc/{pid}/status"):
            if line.startswith(f"{field}:"):
                total += int(line.split()[1]) / 1024
    return round(total, 1)


def family(root: int) -> Iterator[int]:
    """The process and its descendants that run."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(path.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    yield from found


def _machine_seconds() -> float:
    """Busy time of all cores: user, nice, system, interrupts, and time stolen by the host."""
    fields = _lines("/proc/stat")[0].split()[1:]
    return sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7)) / TICKS


def _process_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / TICKS if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; empty if the process has ended."""
    lines = _lines(f"/proc/{pid}/stat")
    return lines[0].rpartition(")")[2].split() if lines else []


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
