"""The examples of docs/serving.md run against a server."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import NAME, TestServer

from sageLLM.codegen.driver import PACKAGE

PAGE = Path(PACKAGE, "docs", "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="requires curl")
def test_curl_commands(server: TestServer) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        command = line.replace("http://localhost:8000", server.url)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout and '"error":{' not in done.stdout, done.stdout + done.stderr


def test_openai_example(server: TestServer) -> None:
    code = blocks("python")[0]
    assert f'model="{NAME}"' in code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("http://localhost:8000", server.url), "docs/serving.md", "exec"), {})
    assert len(printed.getvalue()) > 10
