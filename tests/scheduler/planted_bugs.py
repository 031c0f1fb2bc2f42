"""Bugs to plant in the scheduler, one at a time: a piece of a function's source text and its replacement."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sageLLM.runtime.kv.manager import PagedKVManager
from sageLLM.runtime.kv.prefix_cache import PrefixCache
from sageLLM.runtime.scheduler.admission import Admission
from sageLLM.runtime.scheduler.commit import StepCommit
from sageLLM.runtime.scheduler.decode_queue import DecodeQueue
from sageLLM.runtime.scheduler.lifecycle import Lifecycle
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.migration import Migration
from sageLLM.runtime.scheduler.modes import Hybrid, TimeShare
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.preemption import Preemption
from sageLLM.runtime.scheduler.prefill import PrefillPhase
from sageLLM.runtime.scheduler.queues import RoundRobinQueue, WaitingQueue
from sageLLM.runtime.scheduler.recovery import Recovery
from sageLLM.runtime.scheduler.swaps import Swaps
from sageLLM.runtime.scheduler.table import RequestTable


@dataclass(frozen=True)
class Bug:
    """In `owner.function` the text `old` becomes `new`."""

    name: str
    owner: type
    function: str
    old: str
    new: str

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compile the changed function in its module and put it in the class until the test ends."""
        original: Callable[..., Any] = getattr(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(original))
        assert self.old in source, f"{self.name}: {self.function} does not contain {self.old!r} any more"
        namespace: dict[str, Any] = {}
        code = source.replace(self.old, self.new).replace("super()", f"super({self.owner.__name__}, self)")
        exec(compile(code, f"<{self.name}>", "exec"), original.__globals__, namespace)
        monkeypatch.setattr(self.owner, self.function, namespace[self.function])


L, C, R, M = Lifecycle, StepCommit, Recovery, Migration
BUGS = [
    Bug("a victim keeps its progress", L, "requeue", "    request.forget_progress()\n", ""),
    Bug("a victim is lost", L, "suspend", "    self._table.waiting.push(request)\n", ""),
    Bug("chunks of a victim in a pending step count", L, "suspend", "self._steps.void(request)", "pass"),
    Bug("a victim's blocks are not freed", L, "requeue", "self._kv.release(request, unannounced)", "[]"),
    Bug("blocks are freed before the pending step ends", L, "free_ended", "last_step < oldest_pending and", ""),
    Bug("blocks are freed during a copy", L, "free_ended", "and not is_copied", ""),
    Bug("a fork without a slot is lost", L, "queue_fork", "    self._table.waiting.push(fork)\n", ""),
    Bug("an outgrown request keeps its KV", L, "requeue_outgrown", "self.requeue_between_steps(request)", "pass"),
    Bug("an outgrown request comes back as it was", Admission, "can_admit", "self._limits.is_long(", "bool(0 and "),
    Bug("an outgrown request is swapped in", L, "requeue_outgrown", "self.lose_swapped(request)", "pass"),
    Bug("KV of short sequences is found by long ones", KVPlacement, "track", "request.kv_salt", "request.salt"),
    Bug(
        "a step ahead decodes an outgrown request",
        SequenceLimits,
        "num_decodes_left",
        "switch_len + 1",
        "switch_len + 2",
    ),
    Bug("the batch size is not bounded", Admission, "can_admit", "not has_slot or ", ""),
    Bug("a victim returns and is preempted again", Admission, "_headroom", "self._decodes.num_blocks_due(", "0 * int("),
    Bug("cached tokens are computed again", Admission, "_allocate", "request.plan_up_to(", "request.compute_up_to("),
    Bug("a migrating request is a victim", Preemption, "_pinned", "*self._migration.copying, ", ""),
    Bug("an abort does not see waiting requests", RequestTable, "find", "self.waiting.get(request_id) or ", ""),
    Bug("a complete request is not ended", C, "commit", "if self._limits.is_complete(request)", "if False"),
    Bug("a fork's last block is not copied", C, "_start_forks", "block_copies[fork.request_id] = copies", "num_cached"),
    Bug("a fork starts past its parent", C, "_start_forks", "fork.compute_up_to(", "fork.compute_up_to(1 + "),
    Bug("a swap never ends", Swaps, "commit", "self._kv.finish_swap(copy.seq_id)", "pass"),
    Bug("a swap-in is not announced", Swaps, "begin_in", "self._begin(copy, step)", "self.copying[copy.seq_id] = None"),
    Bug("a rolled-back step loses its copies", R, "_announce_again", "plan.tier_copies[copy.seq_id] = copy", "pass"),
    Bug("a rolled-back step loses its blocks", R, "_announce_again", "plan.new_blocks = repeated", "pass"),
    Bug("a rolled-back step keeps its prefill", R, "_take_back", "request.plan_up_to(chunk.start)", "pass"),
    Bug("a dead worker's cache is used", R, "_lose_prefix_cache", "self._kv.prefill.reset_prefix_cache()", "pass"),
    Bug("a superseded copy is begun", R, "_withdraw_superseded", "pieces[:] = ", "_ = "),
    Bug("prefill has a second budget", Hybrid, "fill", "budget - step.num_decodes", "budget"),
    Bug("prefill waits for all decodes", TimeShare, "fill", "is_prefill_due and", "False and"),
    Bug("a preempting step admits", PrefillPhase, "add_to", "not step.preempted", "True"),
    Bug("the token budget never shrinks", PrefillPhase, "add_to", "max_tokens -= num_tokens", "pass"),
    Bug("a replay ends with the prompt", StepPlan, "add_prefill", "request.total_tokens", "request.num_prompt_tokens"),
    Bug("a block is allocated too late", DecodeQueue, "has_room", "< len", "<= len"),
    Bug("a skipped slot advances", DecodeQueue, "_advance", "slot.planned_offset -= 1", "pass"),
    Bug("a skipped slot has computed", DecodeQueue, "commit", "slot.computed_offset -= 1", "pass"),
    Bug("a failed decode step counts", DecodeQueue, "roll_back", "self.clock.planned -= 1", "pass"),
    Bug("a pending step counts for a new decode", DecodeQueue, "join", "plan.skipped.append(slot)", "pass"),
    Bug("round robin does not rotate", RoundRobinQueue, "to_back", "self._members.pop(member.request_id)", "member"),
    Bug("overtaking is not bounded", WaitingQueue, "admit", "self._num_overtakes >= self._max_overtakes", "False"),
    Bug("no length gate", M, "_settle", "transfer if transfer.is_complete else None", "transfer"),
    Bug("an old attempt counts", M, "transfer_of", "piece.attempt == attempt", "True"),
    Bug("attempts start again after a preemption", M, "admit", "next(self._attempts)", "0"),
    Bug("one rank is enough", M, "acknowledge", "transfer.num_ranks * self._config.num_layers", "1"),
    Bug("a failed copy is not sent again", M, "fail", "self._send_again_from(", "str("),
    Bug("a lease never ends", M, "_expired", "transfer.lease_end <= now", "False"),
    Bug("a cancellation is lost", M, "renew_cancellations", "transfer.is_cancelling = False", "pass"),
    Bug("the source is kept", KVPlacement, "arrive", "self.prefill.free(request.request_id)", "[]"),
    Bug("the target is not reserved", KVPlacement, "can_admit", "has_room and self.decode", "has_room or self.decode"),
    Bug("uncomputed blocks are shared", KVPlacement, "publish", "num_computed_tokens", "num_planned_tokens"),
    Bug("salts are ignored", KVPlacement, "track", "request.kv_salt", "''"),
    Bug("one token too many", SequenceLimits, "is_complete", ">= self.max_seq_len", "> self.max_seq_len"),
    Bug("a fork's blocks are not counted", PagedKVManager, "fork", "self.pool.share(parent[:num_full])", "pass"),
    Bug("the whole prompt is a cache hit", PrefixCache, "_walk", "- 1", "- 0"),
]
