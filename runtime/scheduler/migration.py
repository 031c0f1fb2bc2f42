"""Follows the requests of strict mode from the prefill worker to the decode worker.

A request that is prefilled waits here; the next step hands out its copy; it may decode once the copy is confirmed. From
hand-out to confirmation both its block tables are pinned: it is no victim, and aborting it frees nothing yet.
"""

from sageLLM.runtime.scheduler.base import KVMigration, Request
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import StepPlan


class MigrationPhase:
    """`waiting`: prefilled, copy not handed out. `copying`: copy handed out, not confirmed."""

    def __init__(self, kv: KVPlacement) -> None:
        self.waiting: dict[str, Request] = {}
        self.copying: dict[str, Request] = {}
        self._kv = kv

    def __len__(self) -> int:
        return len(self.waiting) + len(self.copying)

    def plan(self, plan: StepPlan) -> None:
        """Hand out the copies of all that wait."""
        for request_id, request in self.waiting.items():
            migration, table = self._kv.start_migration(request)
            plan.migrations.append(migration)
            plan.given[request_id] = table
            self.copying[request_id] = request
        self.waiting = {}

    def cancel(self, migration: KVMigration) -> Request | None:
        """Take back a copy that was not confirmed; returns its request, which is in no line now."""
        request = self.copying.pop(migration.request_id, None)
        if request is not None:
            self._kv.cancel_migration(migration.request_id)
        return request
