"""Takes the README's picture of the graph page, with headless Chromium; `python docs/images/graph_page.py`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MODEL, TRACE, STEP, NODE = "llama", "decode", "fuse_qk", "L0.attention.kc"
WIDTH, HEIGHT, SCALE = 1280, 800, 1.5
SCHEMES = {"light": 1, "dark": 0}  # Chromium's numbers of preferred colour schemes


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("expected Chromium on the path; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(graph_page(), encoding="utf-8")
        address = f"{page.as_uri()}{fragment(page.read_text(encoding='utf-8'))}"
        for theme, scheme in SCHEMES.items():
            picture = HERE / f"graph-page-{theme}.png"
            options = [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}", "--hide-scrollbars"]
            options += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", "--no-sandbox"]
            subprocess.run([chromium, "--headless", *options, address], check=True, capture_output=True)
            print(picture)


def graph_page() -> str:
    """The HTML page that `sagellm graph` writes."""
    command = [sys.executable, "-m", "sageLLM.runtime.cli.main", "graph", MODEL, "--format", "html"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def fragment(page: str) -> str:
    """The `#g9/4` that opens the step and the node."""
    trace = page[page.index(f"<h2>{TRACE}</h2>") :]
    found = re.search(rf'id="t(\d+)"[^>]*><span>{STEP.replace("_", "_<wbr>")}<', trace)
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    if found is None:
        sys.exit(f"expected a step {STEP} under {TRACE} in the page")
    step = int(found[1])
    nodes = [node["node"] for node in data[step]]
    return f"#g{step}/{nodes.index(NODE) if NODE in nodes else 0}"


if __name__ == "__main__":
    main()
