"""Random operations on tiny pools: after any sequence of operations, every block has the contents its owners expect.

A model of the memory holds a token per slot. Computing writes to it and copies copy it; a sequence that is admitted
with a hit, forked or swapped in must find its tokens there.
"""

import random
from dataclasses import dataclass, field

import pytest

from sageLLM.runtime.kv.copies import TierCopy
from sageLLM.runtime.kv.manager import PagedKVManager

BLOCK_SIZE = 3
Memory = dict[tuple[str, int, int], int]


@dataclass
class Living:
    """A sequence: its tokens, and the number of them in the memory."""

    tokens: list[int]
    num_computed: int = 0
    copy: TierCopy | None = None
    outputs: list[int] = field(default_factory=list)  # the last of the tokens, as the manager tracks them


@dataclass
class World:
    """The manager, the memory of all tiers, and the sequences."""

    kv: PagedKVManager
    rng: random.Random
    memory: Memory = field(default_factory=dict)
    living: dict[str, Living] = field(default_factory=dict)
    orphans: list[tuple[str, TierCopy]] = field(default_factory=list)
    step: int = 0
    num_names: int = 0

    def compute(self, seq_id: str, until: int) -> None:
        sequence, table = self.living[seq_id], self.kv.block_table(seq_id)
        for position in range(sequence.num_computed, until):
            slot = ("device", table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            self.memory[slot] = sequence.tokens[position]
        sequence.num_computed = until
        if self.rng.random() < 0.7:
            self.kv.publish(seq_id, until)

    def check(self) -> None:
        on_device = [seq_id for seq_id in self.living if self.kv.holds(seq_id)]
        self.kv.check_integrity(on_device)
        stats = self.kv.stats()
        assert stats.num_free is not None
        assert stats.num_free + stats.num_used + stats.num_cached + stats.num_in_transfer == stats.num_blocks
        for seq_id in on_device:
            sequence, table = self.living[seq_id], self.kv.block_table(seq_id)
            if sequence.copy is not None and sequence.copy.target == "device":
                continue
            for position in range(sequence.num_computed):
                slot = ("device", table[position // BLOCK_SIZE], position % BLOCK_SIZE)
                assert self.memory[slot] == sequence.tokens[position], f"{seq_id} lost token {position}"

    def act(self) -> None:
        ready = [i for i, s in self.living.items() if self.kv.holds(i) and s.copy is None]
        swapped = [i for i in self.living if self.kv.is_swapped(i)]
        moving = [i for i, s in self.living.items() if s.copy is not None]
        actions = [self.arrive] * 3 + [self.end_step]
        actions += [lambda: self.grow(self.rng.choice(ready))] * 4 if ready else []
        actions += [lambda: self.leave(self.rng.choice(ready))] if ready else []
        actions += [lambda: self.fork(self.rng.choice(ready))] if ready else []
        actions += [lambda: self.swap_out(self.rng.choice(ready))] if ready else []
        actions += [lambda: self.swap_in(self.rng.choice(swapped))] * 2 if swapped else []
        actions += [lambda: self.end_copy(self.rng.choice(moving))] * 3 if moving else []
        actions += [lambda: self.leave(self.rng.choice(list(self.living)))] if len(self.living) > 5 else []
        actions += [self.end_orphan] if self.orphans else []
        actions += [lambda: self.promote(ready)] * 2 if self.kv.has_lower_tier and ready else []
        self.rng.choice(actions)()

    def arrive(self) -> None:
        seq_id, self.num_names = f"s{self.num_names}", self.num_names + 1
        length = self.rng.randrange(1, 14)
        start = self.rng.choice([0, 0, 100])
        tokens = [start + i for i in range(length)]
        if self.rng.random() < 0.5:
            tokens[self.rng.randrange(length)] = 999
        salt = self.rng.choice(["", "", "salt"])
        cut = self.rng.randint(1, length)
        outputs = tokens[cut:]
        self.kv.track(seq_id, tokens[:cut], outputs, salt)
        if not self.kv.can_admit(seq_id, length):
            self.kv.forget(seq_id)
            return
        admission = self.kv.admit(seq_id, length)
        assert admission.num_cached_tokens < length
        self.living[seq_id] = Living(tokens, admission.num_cached_tokens, outputs=outputs)
        self.check()
        self.compute(seq_id, self.rng.randint(admission.num_cached_tokens, length))

    def grow(self, seq_id: str) -> None:
        sequence = self.living[seq_id]
        if sequence.num_computed < len(sequence.tokens):
            self.compute(seq_id, self.rng.randint(sequence.num_computed, len(sequence.tokens)))
        elif self.kv.can_allocate(seq_id, len(sequence.tokens) + 1):
            sequence.tokens.append(self.rng.choice([7, 8]))
            sequence.outputs.append(sequence.tokens[-1])
            self.kv.allocate(seq_id, len(sequence.tokens))
            self.compute(seq_id, len(sequence.tokens))

    def leave(self, seq_id: str) -> None:
        sequence = self.living.pop(seq_id)
        if sequence.copy is not None:
            self.orphans.append((seq_id, sequence.copy))
            self.kv.free(seq_id)
        else:
            if self.rng.random() < 0.8:
                self.kv.publish(seq_id, sequence.num_computed)
            self.kv.free(seq_id, until_step=self.step if self.rng.random() < 0.3 else None)
        self.kv.forget(seq_id)

    def fork(self, parent_id: str) -> None:
        parent = self.living[parent_id]
        if not parent.num_computed or not self.kv.can_fork(parent_id, parent.num_computed):
            return
        child_id, self.num_names = f"s{self.num_names}", self.num_names + 1
        for copy in self.kv.fork(parent_id, child_id, parent.num_computed).copies:
            self.copy_block(("device", copy.source), ("device", copy.target))
        tokens = parent.tokens[: parent.num_computed]
        outputs: list[int] = []
        self.kv.track(child_id, list(tokens), outputs)
        self.living[child_id] = Living(tokens, parent.num_computed, outputs=outputs)

    def promote(self, ready: list[str]) -> None:
        limit = self.rng.randint(1, 4)
        copies = [copy for found in self.kv.promote(ready, limit, self.step).values() for copy in found]
        assert len(copies) <= limit
        for copy in copies:
            self.copy_block(("device", copy.source), ("device", copy.target))

    def swap_out(self, seq_id: str) -> None:
        self.living[seq_id].copy = self.kv.begin_swap_out(seq_id, self.living[seq_id].num_computed)

    def swap_in(self, seq_id: str) -> None:
        sequence = self.living[seq_id]
        if self.kv.can_swap_in(seq_id, len(sequence.tokens)):
            sequence.copy = self.kv.begin_swap_in(seq_id, len(sequence.tokens))

    def end_copy(self, seq_id: str) -> None:
        copy, self.living[seq_id].copy = self.living[seq_id].copy, None
        assert copy is not None
        if self.rng.random() < 0.3:
            self.kv.abort_swap(seq_id)
        else:
            self.run(copy)
            self.kv.finish_swap(seq_id)

    def end_orphan(self) -> None:
        seq_id, copy = self.orphans.pop()
        self.run(copy)
        if self.rng.random() < 0.5:
            self.kv.finish_swap(seq_id)
        else:
            self.kv.abort_swap(seq_id)

    def end_step(self) -> None:
        self.kv.end_step(self.step)
        self.step += 1

    def run(self, copy: TierCopy) -> None:
        for source, target in zip(copy.source_blocks, copy.target_blocks, strict=True):
            self.copy_block((copy.source, source), (copy.target, target))

    def copy_block(self, source: tuple[str, int], target: tuple[str, int]) -> None:
        for offset in range(BLOCK_SIZE):
            if (*source, offset) in self.memory:
                self.memory[*target, offset] = self.memory[*source, offset]


@pytest.mark.parametrize("seed", range(60))
def test_random_use_loses_no_token_and_no_block(seed: int) -> None:
    rng = random.Random(seed)
    kv = PagedKVManager(
        rng.randrange(4, 16),
        BLOCK_SIZE,
        enable_prefix_caching=seed % 4 > 0,
        lower_blocks=5 if seed % 3 == 0 else 0,
        host_blocks=rng.randrange(0, 8),
        disk_blocks=rng.randrange(0, 8),
    )
    world = World(kv, rng)
    for _ in range(400):
        world.act()
        world.check()
    for seq_id in list(world.living):
        world.leave(seq_id)
    while world.orphans:
        world.end_orphan()
    world.end_step()
    world.check()
    stats = kv.stats()
    assert (stats.total_promoted > 0) == (seed % 3 == 0), "one seed in three has a tier below"
    assert stats.num_used == stats.num_in_transfer == stats.num_host_used == stats.num_disk_used == 0
