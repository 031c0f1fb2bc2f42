"""Candidates of the planner: modes, degrees and ratios that use all devices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.sim.modes import RoleName, RoleSetup, Setup, SimMode, make_cluster
from sageLLM.runtime.sim.pipeline import WHOLE, equal_shares
from sageLLM.runtime.sim.planner import Candidate

CHUNK_SIZES = (512, 2048)


class Workers(Protocol):
    """Costs of workers by their degrees; None if the model does not fit them."""

    def worker(self, tp: int, pp: int) -> RoleSetup | None:
        """A worker of `tp` x `pp` devices."""
        ...

    def transfer_s(self, tp: int, num_tokens: int) -> float:
        """Seconds to transfer the KV of tokens from or to a worker."""
        ...

    def attention_ffn(self, num_attention: int, num_ffn: int, num_ubatches: int) -> RoleSetup | None:
        """An attention worker with so many others, and FFN workers."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers of one role: their number, and the degrees of each."""

    count: int
    tp: int = 1
    pp: int = 1

    @property
    def num_devices(self) -> int:
        return self.count * self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.count} x tp{self.tp}" + (f" pp{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """A deployment: its workers by role, the mode of the scheduler, and the options that belong to it."""

    roles: Mapping[str, Shape]
    mode: SimMode
    chunk_size: int | None = None
    num_ubatches: int = 1

    @property
    def name(self) -> str:
        workers = ", ".join(f"{name} {shape}" for name, shape in self.roles.items())
        chunk = f" {self.chunk_size}" if self.chunk_size else ""
        parts = f", {self.num_ubatches} micro-batches" if self.num_ubatches > 1 else ""
        return f"{self.mode}{chunk}: {workers}{parts}"


@dataclass(frozen=True, slots=True)
class Space:
    """The space of the search: devices, degrees, and the settings that all candidates share.

    `forms` selects from "together", "disaggregated" and "attention_ffn"; `max_pp` bounds the stages.
    """

    num_devices: int
    degrees: Sequence[int]
    workers: Workers
    scheduler: PDSchedulerConfig
    forms: Sequence[str] = ("together", "disaggregated", "attention_ffn")
    max_pp: int = 1

    def candidates(self) -> dict[str, tuple[Candidate, Choice]]:
        """The candidates by name, each with the deployment that it stands for."""
        found: dict[str, tuple[Candidate, Choice]] = {}
        for form, choices in (
            ("together", self._together),
            ("disaggregated", self._disaggregated),
            ("attention_ffn", self._attention_ffn),
        ):
            for choice, candidate in choices() if form in self.forms else ():
                found[choice.name] = candidate, choice
        return found

    def _workers(self) -> Iterator[Shape]:
        """Single workers in which the model fits."""
        for tp in self.degrees:
            pp = 1
            while tp * pp <= self.num_devices and pp <= self.max_pp:
                if self.workers.worker(tp, pp) is not None:
                    yield Shape(1, tp, pp)
                pp *= 2

    def _together(self) -> Iterator[tuple[Choice, Candidate]]:
        modes: list[tuple[SimMode, int | None]] = [("time_share", None), *(("hybrid", size) for size in CHUNK_SIZES)]
        for one in self._workers():
            shape = replace(one, count=self.num_devices // one.num_devices)
            worker = self.workers.worker(one.tp, one.pp)
            assert worker is not None
            for mode, size in modes:
                choice = Choice({"both": shape}, mode, size)
                setup = self._setup(self._role(one), size, num_workers=shape.count)
                yield choice, _candidate(choice, "together", setup, worker, worker)

    def _disaggregated(self) -> Iterator[tuple[Choice, Candidate]]:
        for first in self._workers():
            for second in self._workers():
                for num_prefill in range(1, self.num_devices // first.num_devices + 1):
                    left = self.num_devices - num_prefill * first.num_devices
                    if left >= second.num_devices and left % second.num_devices == 0:
                        yield self._pair(
                            replace(first, count=num_prefill), replace(second, count=left // second.num_devices)
                        )

    def _pair(self, prefill: Shape, decode: Shape) -> tuple[Choice, Candidate]:
        choice = Choice({"prefill": prefill, "decode": decode}, "strict")
        costs: dict[RoleName, RoleSetup] = {"prefill": self._role(prefill), "decode": self._role(decode)}
        slower = min(prefill.tp, decode.tp)  # KV moves between all devices of the two workers at once
        setup = Setup(
            costs["decode"].cost,
            lambda num_tokens: self.workers.transfer_s(slower, num_tokens),
            num_prefill=prefill.count,
            num_decode=decode.count,
            scheduler=self.scheduler,
            roles=costs,
        )
        return choice, _candidate(choice, "disaggregated", setup, costs["prefill"], costs["decode"])

    def _role(self, shape: Shape) -> RoleSetup:
        worker = self.workers.worker(shape.tp, shape.pp)
        assert worker is not None
        return replace(worker, stage_shares=worker.stage_shares or equal_shares(shape.pp))

    def _attention_ffn(self) -> Iterator[tuple[Choice, Candidate]]:
        for num_ffn in range(1, self.num_devices):
            num_attention = self.num_devices - num_ffn
            for num_ubatches in (2, 3):
                worker = self.workers.attention_ffn(num_attention, num_ffn, num_ubatches)
                if worker is None:
                    continue
                roles = {"attention": Shape(num_attention), "ffn": Shape(num_ffn)}
                choice = Choice(roles, "hybrid", CHUNK_SIZES[0], num_ubatches)
                setup = self._setup(worker, CHUNK_SIZES[0], num_workers=num_attention)
                yield choice, _candidate(choice, "attention_ffn", setup, worker, worker)

    def _setup(self, worker: RoleSetup, chunk_size: int | None, num_workers: int) -> Setup:
        """Equal workers that do both prefill and decode."""
        size = chunk_size or self.scheduler.prefill_chunk_size
        return Setup(
            worker.cost,
            _no_transfer,
            worker.kv_budget,
            scheduler=replace(self.scheduler, prefill_chunk_size=size),
            num_workers=num_workers,
            stage_shares=worker.stage_shares or WHOLE,
        )


def _no_transfer(num_tokens: int) -> float:
    raise AssertionError("workers that do both phases transfer no KV")


def _candidate(choice: Choice, form: str, setup: Setup, prefill: RoleSetup, decode: RoleSetup) -> Candidate:
    return Candidate(
        name=choice.name,
        form=form,  # type: ignore[arg-type]
        num_devices=sum(shape.num_devices for shape in choice.roles.values()),
        make_cluster=lambda: make_cluster(choice.mode, setup),
        prefill=prefill.cost,
        decode=decode.cost,
    )
