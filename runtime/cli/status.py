"""`sagellm status` prints the load of a running server, and its prefill and decode workers."""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request

SAMPLE = re.compile(r"^\w+:(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')
SECONDS = 10.0


def print_status(url: str, api_key: str | None) -> int:
    """Prints to stdout; returns the exit code."""
    try:
        page = read_metrics(url, api_key)
    except (OSError, ValueError) as error:
        print(f"error: cannot read the metrics of {url}: {error}; start a server with `sagellm serve`", file=sys.stderr)
        return 1
    for line in status_lines(page):
        print(line)
    return 0


def read_metrics(url: str, api_key: str | None) -> str:
    """The page of metrics of a server. Raises OSError and ValueError."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(url.rstrip("/") + "/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return str(response.read().decode())


def status_lines(page: str) -> list[str]:
    """The requests, and a line for each worker."""
    lines, workers = list[str](), list[tuple[int, str]]()
    for match in filter(None, map(SAMPLE.match, page.splitlines())):
        labels, value = dict(LABEL.findall(match["labels"])), float(match["value"])
        if match["name"] in ("num_requests_running", "num_requests_waiting"):
            lines.append(f"{match['name'].removeprefix('num_')}: {value:.0f}")
        elif match["name"] == "pd_worker_requests":
            number, role = int(labels["worker"]), labels["role"]
            row = f"worker {number}: {role:<8} {labels['state']:<10} {value:.0f} requests, epoch {labels['epoch']}"
            workers.append((number, row))
    return lines + [row for _, row in sorted(workers)]
