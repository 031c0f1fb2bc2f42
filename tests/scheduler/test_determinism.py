"""Decisions depend on the seed only, not on the iteration order of sets."""

import os
import subprocess
import sys

NUM_SCHEDULES = 80
DIGEST = f"""
import hashlib, fuzz
digest = hashlib.sha256()
for seed in range({NUM_SCHEDULES}):
    world = fuzz.World(seed)
    world.play()
    for out in world.engine.steps:
        copies = out.kv_migrations, out.block_copies, out.tier_copies, out.migrations_to_cancel
        blocks = out.kv_blocks_to_allocate, out.kv_blocks_to_free, out.prefill_blocks_to_free
        victims = [request.request_id for request in out.preempted_requests]
        digest.update(repr((list(out.num_scheduled_tokens.items()), blocks, victims, copies)).encode())
print(digest.hexdigest())
"""


def test_decisions_do_not_depend_on_the_order_of_sets() -> None:
    digests = {_digest(hash_seed) for hash_seed in ("1", "2")}
    assert len(digests) == 1


def _digest(hash_seed: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=env)
    return done.stdout
