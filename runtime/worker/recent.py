"""A mapping of the objects that were added last, by identity."""

from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values of at most `size` keys, those that were put last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: list[tuple[Key, Value]] = []

    def get(self, key: Key) -> Value | None:
        """The value of the same object."""
        for one, value in self._items:
            if one is key:
                return value
        return None

    def take(self, key: Key) -> Value | None:
        """As `get`, and removes it."""
        value = self.get(key)
        self._items = [item for item in self._items if item[0] is not key]
        return value

    def put(self, key: Key, value: Value) -> None:
        """Replaces the value of the object, or that of the oldest one if there are too many."""
        self._items = [item for item in self._items if item[0] is not key]
        if len(self._items) == self._size:
            del self._items[0]
        self._items.append((key, value))

    def clear(self) -> None:
        self._items.clear()
