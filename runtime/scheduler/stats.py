"""Counters of the scheduler."""

from dataclasses import asdict, dataclass

from sageLLM.runtime.scheduler.batch import ScheduleOutput


@dataclass(slots=True)
class SchedulerCounters:
    """Counters that only increase; steps, batches and tokens are counted when they are planned."""

    total_steps: int = 0
    total_prefill_batches: int = 0
    total_decode_batches: int = 0
    total_prefill_tokens: int = 0
    total_decode_tokens: int = 0
    total_preemptions: int = 0
    total_recomputed_tokens: int = 0
    total_swaps: int = 0
    total_cached_tokens: int = 0
    total_migrations: int = 0
    total_finished: int = 0
    total_aborted: int = 0

    def count_plan(self, output: ScheduleOutput) -> None:
        """Count a step handed out."""
        self.total_steps += 1
        self.total_migrations += len(output.kv_migrations)
        if output.prefill_batch:
            self.total_prefill_batches += 1
            self.total_prefill_tokens += output.prefill_batch.total_tokens
        if output.decode_batch:
            self.total_decode_batches += 1
            self.total_decode_tokens += len(output.decode_batch.requests)

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)
