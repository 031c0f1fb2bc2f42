"""Reference implementation of the running-first policy, as simple as possible, to compare the policy with.

Shares only the config with `runtime/sim/baselines/running_first.py`: lists are searched, and prefixes are compared
token by token.
"""

from dataclasses import dataclass, field

from sageLLM.runtime.sim.baselines.running_first import RunningFirstConfig


@dataclass(eq=False)
class Item:
    """A request: its known tokens, the number of them that steps have planned, and its blocks."""

    name: str
    tokens: list[int]
    priority: int
    arrival: int
    num_planned: int = 0
    table: list[int] = field(default_factory=list)


@dataclass
class Decision:
    """Decision of a step: tokens by request, victims in order, tokens found in the cache."""

    scheduled: dict[str, int] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)


class Oracle:
    """Decides steps over `num_blocks` blocks of `size` tokens."""

    def __init__(self, config: RunningFirstConfig, num_blocks: int, size: int) -> None:
        self.config = config
        self.size = size
        self.waiting: list[Item] = []
        self.running: list[Item] = []
        self.free = list(range(num_blocks))
        self.contents: list[tuple[list[int], int]] = []  # the tokens up to the end of a full block, and the block

    def add(self, item: Item) -> None:
        self.waiting.append(item)
        self._sort()

    def end(self, name: str) -> None:
        """A request has ended. With steps planned ahead it may wait, preempted after its last token was planned."""
        queue = next(queue for queue in (self.running, self.waiting) if any(item.name == name for item in queue))
        item = next(item for item in queue if item.name == name)
        queue.remove(item)
        self._release(item)

    def step(self) -> Decision:
        decision = Decision()
        budget = self._serve_running(decision, self.config.max_num_batched_tokens)
        if not decision.preempted:
            self._admit(decision, budget)
        for item in self.running:
            item.num_planned += decision.scheduled.get(item.name, 0)
        return decision

    def _serve_running(self, decision: Decision, budget: int) -> int:
        for item in list(self.running):
            num_tokens = min(self._num_tokens(item, item.num_planned), budget)
            if item not in self.running or num_tokens == 0:
                continue
            while not self._fits(item, [], item.num_planned + num_tokens):
                budget += self._preempt(decision)
                if item not in self.running:
                    return budget
            self._extend(item, [], item.num_planned + num_tokens)
            decision.scheduled[item.name] = num_tokens
            budget -= num_tokens
        return budget

    def _preempt(self, decision: Decision) -> int:
        """Preempt a victim; returns the tokens of this step that return to the budget."""
        victim = self.running[-1]
        if self.config.policy == "priority":
            victim = max(self.running, key=lambda item: (item.priority, item.arrival))
        self.running.remove(victim)
        self._release(victim)
        victim.num_planned = 0
        self.waiting.insert(0, victim)
        self._sort()
        decision.preempted.append(victim.name)
        return decision.scheduled.pop(victim.name, 0)

    def _admit(self, decision: Decision, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            item = self.waiting[0]
            hits = self._hits(item)
            num_cached = len(hits) * self.size
            num_tokens = self._num_tokens(item, num_cached)
            if num_tokens > budget and not self.config.enable_chunked_prefill:
                return
            num_tokens = min(num_tokens, budget)
            must_fit = len(item.tokens) if self.config.full_sequence_must_fit else num_cached + num_tokens
            if not self._fits(item, hits, must_fit):
                return
            self.running.append(self.waiting.pop(0))
            self._extend(item, hits, num_cached + num_tokens)
            item.num_planned = num_cached
            decision.cached[item.name] = num_cached
            decision.scheduled[item.name] = num_tokens
            budget -= num_tokens

    def _num_tokens(self, item: Item, num_planned: int) -> int:
        num_tokens = len(item.tokens) - num_planned
        threshold = self.config.long_prefill_token_threshold
        return min(num_tokens, threshold) if threshold else num_tokens

    def _sort(self) -> None:
        if self.config.policy == "priority":
            self.waiting.sort(key=lambda item: (item.priority, item.arrival))

    # --- blocks ---

    def _fits(self, item: Item, hits: list[int], num_tokens: int) -> bool:
        num_missing = -(-num_tokens // self.size) - len(item.table) - len(hits)
        return num_missing <= len([block for block in self.free if block not in hits])

    def _hits(self, item: Item) -> list[int]:
        hits: list[int] = []
        for end in range(self.size, len(item.tokens), self.size):
            found = [block for tokens, block in self.contents if tokens == item.tokens[:end]]
            if not found or not self.config.enable_prefix_caching:
                break
            hits.append(found[0])
        return hits

    def _extend(self, item: Item, hits: list[int], num_tokens: int) -> None:
        self.free = [block for block in self.free if block not in hits]
        item.table += hits
        while len(item.table) * self.size < num_tokens:
            block = self.free.pop(0)
            self.contents = [entry for entry in self.contents if entry[1] != block]
            item.table.append(block)
        known = {block for _, block in self.contents}
        for index, block in enumerate(item.table[: num_tokens // self.size]):
            if block not in known:
                self.contents.append((item.tokens[: (index + 1) * self.size], block))

    def _release(self, item: Item) -> None:
        """The last block first; those that others use stay."""
        table, item.table = item.table, []
        used = {block for other in self.running for block in other.table}
        self.free += [block for block in reversed(table) if block not in used]
