"""Messages between two processes in shared memory: tensors of the kernels `send` and `recv`, and arrays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.point_to_point import make_link_memory, make_pair_memory

PAIR_BYTES = 2**17  # as in point_to_point_rank.py
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def test_messages_between_two_ranks() -> None:
    memory, pair = make_link_memory(2), make_pair_memory(PAIR_BYTES)
    script = str(Path(__file__).with_name("point_to_point_rank.py"))
    files = [str(memory), str(pair)]
    ranks = [
        subprocess.Popen([sys.executable, script, *files, str(rank)], pass_fds=[memory, pair]) for rank in range(2)
    ]
    os.close(memory)
    os.close(pair)
    assert [rank.wait(120) for rank in ranks] == [0, 0]
