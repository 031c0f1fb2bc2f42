"""Forks: requests that share the prompt of another request (`n > 1`) and reuse its prefill."""

from sageLLM.runtime.scheduler.request import Request


class ForkTable:
    """The forks of requests with an uncommitted prefill, by parent.

    From the logits of the parent's last chunk the engine samples a first token for each fork too. On commit the forks
    share the parent's blocks and decode; a fork that finds all batch slots or blocks in use waits like a preempted
    request. If the parent ends or is preempted earlier, its forks become ordinary requests.
    """

    def __init__(self) -> None:
        self._by_parent: dict[str, dict[str, Request]] = {}
        self._by_id: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: str) -> Request | None:
        """The fork with this id."""
        return self._by_id.get(request_id)

    def of(self, parent_id: str) -> list[Request]:
        """The forks of this parent, in order of arrival."""
        return list(self._by_parent.get(parent_id, {}).values())

    def add(self, request: Request, parent: Request) -> None:
        """Let a request wait for its parent's prefill."""
        self._by_parent.setdefault(parent.request_id, {})[request.request_id] = request
        self._by_id[request.request_id] = request

    def remove(self, request: Request) -> None:
        """Remove a fork that ends while it waits."""
        del self._by_id[request.request_id]
        if request.fork_of is not None:
            siblings = self._by_parent[request.fork_of.request_id]
            del siblings[request.request_id]
            if not siblings:
                del self._by_parent[request.fork_of.request_id]

    def take(self, parent_id: str) -> list[Request]:
        """Remove and return the forks of this parent."""
        if parent_id not in self._by_parent:
            return []
        forks = list(self._by_parent.pop(parent_id).values())
        for fork in forks:
            del self._by_id[fork.request_id]
        return forks
