"""A program: runs the checks of the Triton kernels in Triton's interpreter, and writes each finding as a line of JSON.

It is a process of its own, because TRITON_INTERPRET has to be set before Triton is imported.
"""

import json
import os
import sys
from dataclasses import asdict

os.environ["TRITON_INTERPRET"] = "1"

import checks
import numpy as np
import torch

from sageLLM.runtime.kernels.triton_interpreter import mend


def main() -> None:
    np.seterr(all="ignore")
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    mend()
    for finding in checks.findings():
        json.dump(asdict(finding), sys.stdout)
        print()


if __name__ == "__main__":
    main()
