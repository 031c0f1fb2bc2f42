"""Bugs to be planted in the scheduler, one at a time: each is a piece of a function's text and what replaces it."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sageLLM.runtime.kv.manager import PagedKVManager
from sageLLM.runtime.kv.prefix_cache import PrefixCache
from sageLLM.runtime.scheduler.decode import DecodePhase
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import StepPlan
from sageLLM.runtime.scheduler.prefill import PrefillPhase
from sageLLM.runtime.scheduler.queues import TurnQueue, WaitingLine
from sageLLM.runtime.scheduler.transfer import TransferPhase


@dataclass(frozen=True)
class Bug:
    """In `owner.function` the text `old` becomes `new`."""

    name: str
    owner: type
    function: str
    old: str
    new: str

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compile the changed function in its module and put it in the class, until the test is over."""
        original: Callable[..., Any] = getattr(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(original))
        assert self.old in source, f"{self.name}: {self.function} has no {self.old!r} any more"
        namespace: dict[str, Any] = {}
        code = source.replace(self.old, self.new).replace("super()", f"super({self.owner.__name__}, self)")
        exec(compile(code, f"<{self.name}>", "exec"), original.__globals__, namespace)
        monkeypatch.setattr(self.owner, self.function, namespace[self.function])


S = PDScheduler
BUGS = [
    Bug("a victim keeps its progress", S, "_requeue", "    request.forget_progress()\n", ""),
    Bug("a victim is lost", S, "_go_back", "    self.waiting_queue.push(request)\n", ""),
    Bug("chunks of a victim in flight count", S, "_go_back", "flight.void.add(request.request_id)", "pass"),
    Bug("a dropped victim gives no blocks back", S, "_requeue", "self.kv.release(request, unannounced)", "[]"),
    Bug("blocks are freed before the step in flight ends", S, "_empty_limbo", "last_step < oldest_in_flight and", ""),
    Bug("blocks are freed under a copy", S, "_empty_limbo", "and not is_copied", ""),
    Bug("seats are not counted", S, "_can_admit", "not has_seat or ", ""),
    Bug("a victim comes back to fall again", S, "_headroom", "self._decode.num_blocks_due(", "0 * int("),
    Bug("a copied request is a victim", S, "_pinned", "*self._migration.copying, ", ""),
    Bug("an abort does not see the waiting", S, "_find", "self.waiting_queue.get(request_id) or ", ""),
    Bug("a full request is not ended", S, "_commit", "if is_full(request)", "if False"),
    Bug("a fork without a place is lost", S, "_wait_in_line", "    self.waiting_queue.push(fork)\n", ""),
    Bug("a fork's last block is not copied", S, "_start_forks", "block_copies[fork.request_id] = copies", "num_cached"),
    Bug("a fork starts at its parent's length", S, "_start_forks", "fork.compute_up_to(", "fork.compute_up_to(1 + "),
    Bug("a swap never ends", S, "_finish_swaps", "self.kv.finish_swap(copy.seq_id)", "pass"),
    Bug("a swap's copy back is not told", S, "_swap_in", "plan.tier_copies[request.request_id] = copy", "pass"),
    Bug("a failed step takes its copies with it", S, "_announce_again", "plan.tier_copies[copy.seq_id] = copy", "pass"),
    Bug("a failed step takes given blocks with it", S, "_announce_again", "plan.given = given", "pass"),
    Bug("a failed step keeps its prefill", S, "_take_back", "request.plan_up_to(chunk.start)", "pass"),
    Bug("a dead worker's cache is still used", S, "_forget_cached", "self.kv.prefill.reset_prefix_cache()", "pass"),
    Bug("cached tokens are computed again", S, "_admit", "request.plan_up_to(", "request.compute_up_to("),
    Bug("a second prefill budget", S, "_plan_hybrid", "budget - plan.num_decodes", "budget"),
    Bug("prefill waits for all decodes", S, "_plan_time_share", "is_prefill_due and", "False and"),
    Bug("a preempting step admits", PrefillPhase, "plan", "not plan.preempted", "True"),
    Bug("the token budget never shrinks", PrefillPhase, "plan", "max_tokens -= num_tokens", "pass"),
    Bug("a replay is cut at the prompt", StepPlan, "add_prefill", "request.total_tokens", "request.num_prompt_tokens"),
    Bug("a block too late", DecodePhase, "_has_room", "< len", "<= len"),
    Bug("who sits out advances", DecodePhase, "_fill", "seat.planned_offset -= 1", "pass"),
    Bug("who sat out has computed", DecodePhase, "commit", "seat.computed_offset -= 1", "pass"),
    Bug("a failed decode step counts", DecodePhase, "roll_back", "self.clock.planned -= 1", "pass"),
    Bug("a step in flight counts for who joins", DecodePhase, "join", "plan.skipped.append(seat)", "pass"),
    Bug("nobody's turn comes", TurnQueue, "to_back", "self._members.pop(member.request_id)", "member"),
    Bug("overtaken for ever", WaitingLine, "admit", "self._num_overtakes >= self._max_overtakes", "False"),
    Bug("no length gate", TransferPhase, "_settle", "transfer if transfer.is_complete else None", "transfer"),
    Bug("an old attempt counts", TransferPhase, "sender_of", "piece.attempt == attempt", "True"),
    Bug("two lives share their attempts", TransferPhase, "admit", "next(self._attempts)", "0"),
    Bug("a superseded copy is begun", S, "_withdraw_superseded", "pieces[:] = ", "_ = "),
    Bug("one rank is enough", TransferPhase, "acknowledge", "self._config.num_ranks * self._config.num_layers", "1"),
    Bug("a failed copy is not sent again", TransferPhase, "fail", "self._send_again_from(", "str("),
    Bug("a lease never ends", TransferPhase, "expire", "transfer.lease_end <= now", "False"),
    Bug("a cancelled copy is forgotten", TransferPhase, "ask_again", "transfer.is_cancelling = False", "pass"),
    Bug("the source is kept", KVPlacement, "arrive", "self.prefill.free(request.request_id)", "[]"),
    Bug("the target is not reserved", KVPlacement, "can_admit", "has_room and self.decode", "has_room or self.decode"),
    Bug("what nobody has computed is shared", KVPlacement, "publish", "num_computed_tokens", "num_planned_tokens"),
    Bug("salts are ignored", KVPlacement, "track", "request.salt", "''"),
    Bug("one token too many", SequenceLimits, "is_full", ">= self.max_seq_len", "> self.max_seq_len"),
    Bug("a fork's blocks have one owner", PagedKVManager, "fork", "self.pool.share(parent[:num_full])", "pass"),
    Bug("the whole prompt is a hit", PrefixCache, "_walk", "- 1", "- 0"),
]
