"""Two network namespaces, joined by a link, as two hosts."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A namespace with its address; `prefix` runs a command in it."""

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]


def why_not_permitted() -> str | None:
    """The reason why this process cannot make network namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces require root"
    try:
        done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
        made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"the command {error.filename} is missing"
    return done.stderr.strip() or made.stderr.strip() or None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a link between them; they have no other network, and end with the block."""
    mark = f"sage{os.getpid()}"
    hosts = (Host(f"{mark}a", "10.213.7.1"), Host(f"{mark}b", "10.213.7.2"))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        # Names of interfaces have at most 15 characters, and exist outside the namespaces for a moment.
        links = (f"{mark[-12:]}x", f"{mark[-12:]}y")
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for host, link in zip(hosts, links, strict=True):
            _ip("link", "set", link, "netns", host.name)
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", link)
            _ip("-n", host.name, "link", "set", link, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)
