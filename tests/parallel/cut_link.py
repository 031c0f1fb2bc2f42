"""An engine that copies KV over a link that is cut for a while; runs in a separate network namespace.

    unshare --net python cut_link.py POLICY SECONDS

Prints, as JSON, the answers before, during and after the cut, and the KV blocks in use at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.scheduler.transfer import TransferConfig

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
PROMPTS = [[[start + i % 7 for i in range(40)] for start in starts] for starts in ((10, 30), (50, 70, 90), (110, 130))]
"""Before, during and after the cut."""
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256}


def set_link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


def main(policy: str, seconds: float) -> None:
    set_link("up")
    config = PDSchedulerConfig(mode="strict", transfer=TransferConfig(lease_s=0.5, max_attempts=2))
    workers: dict[str, Any] = {"prefill_workers": 1, "decode_workers": 1, "kv_transport": "tcp"}
    llm = LLM(MODEL, scheduler=config, kv_load_failure_policy=policy, **workers, **OPTIONS)
    answers = []
    for index, prompts in enumerate(PROMPTS):
        timer = threading.Timer(seconds, set_link, ["up"])
        if index == 1:
            set_link("down")
            timer.start()
        outputs = [one.outputs[0] for one in llm.generate(prompts, PARAMS)]
        answers.append([(one.token_ids, one.finish_reason, one.stop_reason) for one in outputs])
        if index == 1:
            timer.join()
    used = llm.engine.scheduler_stats()["kv_blocks_used"]
    llm.close()
    print(json.dumps({"answers": answers, "used": used}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
