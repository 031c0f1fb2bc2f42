"""`sagellm serve` at capacity, at ten times its capacity, and with 1,000 posts at once.

    python tests/server/overload.py [--model FOLDER] [--seconds 10]

prints the goodput of the admitted requests and the latency of refusals. The client is one loop over sockets in this
process, which costs a tenth of the server, and reports by how much it was late itself.
"""

from __future__ import annotations

import argparse
import itertools
import random
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from servers import MODEL
from soak import resources, wait_until_idle
from test_process import ServeProcess

from sageLLM.runtime.server.http_client import Address

NUM_TOKENS = 32
NUM_POSTS = 1000
NUM_BODIES = 512
WARM_UP_SECONDS = 2.0
REFUSED_MS = 50
ANSWER_SECONDS = 60.0


@dataclass(slots=True)
class Post:
    """A request on its socket. Times are those of `perf_counter`; `due` is when it should have been sent."""

    due: float
    sent: float = 0.0
    first: float = 0.0
    end: float = 0.0
    data: bytearray = field(default_factory=bytearray)

    @property
    def status(self) -> int:
        return int(self.data[9:12])

    @property
    def is_whole(self) -> bool:
        """Whether the response has arrived; an event stream ends with its last chunk."""
        if b"content-length" in self.data[:400]:
            return b"}}" in self.data[-4:]
        return self.data.endswith(b"0\r\n\r\n")


@dataclass(slots=True)
class Peer:
    """A connection, with its request if one is open."""

    sock: socket.socket
    post: Post | None = None


class Client:
    """Sends posts on sockets and reads the answers, in one thread. Connections are kept, as clients do.

    It shares the processors with the server, so bodies are made before the run, and sockets stay in the poll.
    """

    def __init__(self, address: Address, seed: int) -> None:
        self._address, self._draw = address, random.Random(seed)
        self._poll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._idle: list[Peer] = []
        self._requests = itertools.cycle([self._request() for _ in range(NUM_BODIES)])
        self._starts = itertools.product(range(1000, 2000), repeat=2)
        self.posts: list[Post] = []
        self.num_open = 0

    def connection(self) -> Peer:
        return self._idle.pop() if self._idle else self.connect()

    def connect(self) -> Peer:
        sock = socket.create_connection((self._address.host, self._address.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        peer = self._peers[sock.fileno()] = Peer(sock)
        self._poll.register(sock, select.EPOLLIN)
        return peer

    def _request(self) -> bytes:
        """A post of 32 random ids, answered by 32 tokens; the first two ids are to be filled in."""
        ids = ", ".join(str(self._draw.randrange(2000)) for _ in range(30))
        body = f'{{"prompt": [%d, %d, {ids}], "max_tokens": {NUM_TOKENS}, "ignore_eos": true, "stream": true}}'
        size = len(body % (1000, 1000))
        return f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {size}\r\n\r\n{body}".encode()

    def send(self, due: float, peer: Peer) -> None:
        peer.post = post = Post(due, time.perf_counter())
        peer.sock.sendall(next(self._requests) % next(self._starts))  # a prompt that is not in the prefix cache
        self.num_open += 1
        self.posts.append(post)

    def receive(self, seconds: float) -> None:
        """Reads what arrives within the time, or nothing. All sockets are read before any answer is looked at."""
        arrived = []
        for descriptor, _ in self._poll.poll(max(0.0, seconds)):
            peer = self._peers[descriptor]
            arrived.append((peer, peer.sock.recv(65536), time.perf_counter()))
        for peer, chunk, now in arrived:
            post = peer.post
            assert post is not None, f"{chunk!r} has arrived without a request"
            post.first = post.first or now
            post.data += chunk
            if post.is_whole or not chunk:
                post.end, peer.post = now, None
                self.num_open -= 1
                self._idle.append(peer) if chunk else self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.sock.fileno()]
        peer.sock.close()

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._idle.clear()
        self._poll.close()

    def wait(self) -> None:
        deadline = time.perf_counter() + ANSWER_SECONDS
        while self.num_open:
            assert time.perf_counter() < deadline, f"{self.num_open} requests are not answered"
            self.receive(0.1)

    def run_closed(self, seconds: float, concurrency: int) -> None:
        """So many requests at any time."""
        deadline = time.perf_counter() + seconds
        while (now := time.perf_counter()) < deadline:
            while self.num_open < concurrency:
                self.send(now, self.connection())
            self.receive(0.05)
        self.wait()
        self.close()

    def run_open(self, seconds: float, rate: float) -> None:
        """Requests at random times, however many are open."""
        start = due = time.perf_counter()
        while due < start + seconds:
            while (now := time.perf_counter()) < due:
                self.receive(due - now)
            self.send(due, self.connection())
            due += self._draw.expovariate(rate)
        self.wait()
        self.close()

    def run_burst(self, num_posts: int) -> None:
        """All at once, on connections that exist."""
        peers = [self.connect() for _ in range(num_posts)]
        time.sleep(0.5)  # until the server has accepted all
        due = time.perf_counter()
        for peer in peers:
            self.send(due, peer)
        self.wait()
        self.close()


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(1e3 * one for one in seconds)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    return f"{p50:.1f} ms (p50), {p99:.1f} ms (p99), {ordered[-1]:.1f} ms (most)"


def report(client: Client) -> Iterator[str]:
    posts = client.posts
    seconds = max(one.end for one in posts) - min(one.sent for one in posts)
    answers = [one for one in posts if one.status == 200]
    refused = [one for one in posts if one.status == 429]
    assert len(answers) + len(refused) == len(posts)
    broken = sum(b"data: [DONE]" not in one.data for one in answers)
    goodput = NUM_TOKENS * len(answers) / seconds
    yield f"{goodput:6.0f} tokens/s, {len(answers)} answers ({broken} broken), {len(refused)} refusals"
    if refused:
        late = [one.first - one.sent for one in refused]
        quick = sum(1e3 * one < REFUSED_MS for one in late) / len(late)
        yield f"       refused after {percentiles(late)}; {100 * quick:.1f} % in less than {REFUSED_MS} ms"
        yield f"       the client was late by {percentiles([one.sent - one.due for one in refused])}"


def run(model: Path, seconds: float, limit: int, seed: int) -> None:
    options = ["--max-num-queued-reqs", str(limit), "--max-num-seqs", "16", "--no-access-log"]
    server = ServeProcess(*options, model=model)
    address = Address.of(server.url)
    try:
        Client(address, seed).run_closed(WARM_UP_SECONDS, limit)
        closed = Client(address, seed + 1)
        closed.run_closed(seconds, limit)
        [line] = report(closed)
        print(f"capacity:\n{line}")
        rate = len(closed.posts) / seconds
        for factor in (1, 10):
            client = Client(address, seed + 1 + factor)
            client.run_open(seconds, factor * rate)
            print(f"{factor:7}x:", *report(client), sep="\n")
        burst = Client(address, seed + 20)
        burst.run_burst(NUM_POSTS)
        print(f"{NUM_POSTS} at once:", *report(burst), sep="\n")
        idle = {"running": 0.0, "waiting": 0.0, "queued": 0.0, "blocks used": 0.0}
        wait_until_idle(server, idle)
        assert resources(server)["queued"] == 0
    finally:
        server.process.terminate()
        server.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options.model, options.seconds, options.limit, options.seed)


if __name__ == "__main__":
    main()
