"""Requests that share another one's prompt (`n > 1`): they wait for its prefill and then go on from its KV."""

from sageLLM.runtime.scheduler.request import Request


class ForkLine:
    """The forks whose parent's prefill is not committed, by parent.

    When the parent's last chunk is run the engine samples a first token for each of its forks too. With the commit the
    forks share the parent's blocks and decode; one that finds no seat or block waits in line like a preempted request.
    If the parent ends or is preempted before, its forks are requests like any other.
    """

    def __init__(self) -> None:
        self._by_parent: dict[str, dict[str, Request]] = {}
        self._by_id: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: str) -> Request | None:
        return self._by_id.get(request_id)

    def of(self, parent_id: str) -> list[Request]:
        """The forks that wait for this parent, in order of arrival."""
        return list(self._by_parent.get(parent_id, {}).values())

    def add(self, request: Request, parent: Request) -> None:
        self._by_parent.setdefault(parent.request_id, {})[request.request_id] = request
        self._by_id[request.request_id] = request

    def remove(self, request: Request) -> None:
        """A fork ends while it waits."""
        del self._by_id[request.request_id]
        if request.fork_of is not None:
            siblings = self._by_parent[request.fork_of.request_id]
            del siblings[request.request_id]
            if not siblings:
                del self._by_parent[request.fork_of.request_id]

    def take(self, parent_id: str) -> list[Request]:
        """The forks of this parent, which wait no longer."""
        forks = list(self._by_parent.pop(parent_id, {}).values())
        for fork in forks:
            del self._by_id[fork.request_id]
        return forks
