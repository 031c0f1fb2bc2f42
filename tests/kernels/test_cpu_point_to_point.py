"""Messages between two processes in shared memory: tensors of the kernels `send` and `recv`, and arrays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.point_to_point import make_link_memory

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def test_messages_between_two_ranks() -> None:
    memory = make_link_memory(2)
    script = str(Path(__file__).with_name("point_to_point_rank.py"))
    ranks = [subprocess.Popen([sys.executable, script, str(memory), str(rank)], pass_fds=[memory]) for rank in range(2)]
    os.close(memory)
    assert [rank.wait(120) for rank in ranks] == [0, 0]
