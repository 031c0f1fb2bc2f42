"""GuideLLM: synthetic prompts at 4 streams, all of which must be completed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_REQUESTS = 40
url, model = sys.argv[1:3]
program = Path(sys.executable).with_name("guidellm")
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder, "report.json")
    options = {
        "backend": f"kind=openai_http,target={url},model=tiny",
        "profile": "kind=concurrent,streams=4",
        "constraint": f"kind=max_requests,count={NUM_REQUESTS}",
        "tokenizer": f"kind=huggingface_auto,model={model}",
        "data": "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
        "output": f"kind=json,path={out}",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    subprocess.run([program, "run", *flags, "--disable-console"], check=True)
    [benchmark] = json.loads(out.read_text())["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0), totals
