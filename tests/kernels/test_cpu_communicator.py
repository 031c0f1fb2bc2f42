"""Collectives in shared memory: the ranks of a group get the same sums, bit by bit, and the same rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.runtime.kernels.cpu.communicator import make_shared_memory
from sageLLM.runtime.kernels.cpu.compiler import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_collectives_of_several_ranks(num_ranks: int) -> None:
    memory = make_shared_memory(num_ranks)
    script = str(Path(__file__).with_name("communicator_rank.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, str(memory), str(rank), str(num_ranks)], pass_fds=[memory])
        for rank in range(num_ranks)
    ]
    os.close(memory)
    assert [rank.wait(120) for rank in ranks] == [0] * num_ranks
