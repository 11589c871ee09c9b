"""Requests that wait: a bounded queue in which each client has its turn."""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueFull(Exception):
    """The queue holds as many requests as it may."""


class FairQueue(Generic[T]):
    """First come, first served for each client, and the clients in turns. It is not safe for threads.

    A client that sends a hundred requests delays another one by a single request. It may fill three quarters
    of the queue, so that others find room.

    >>> queue = FairQueue(limit=4)
    >>> for client, item in ("a", 1), ("a", 2), ("a", 3), ("b", 4):
    ...     queue.put(client, item)
    >>> [queue.get() for _ in range(4)]
    [1, 4, 2, 3]
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: T) -> None:
        """Add an item. Raises `QueueFull`."""
        own = len(self._clients.get(client, ()))
        if self._count >= self.limit or own >= -(-self.limit * 3 // 4):
            raise QueueFull(f"{self._count} requests are waiting, and no more can: try again later")
        self._clients.setdefault(client, deque()).append(item)
        self._count += 1

    def get(self) -> T:
        """Remove the next item and return it. Raises `IndexError` if there is none."""
        if not self._clients:
            raise IndexError("the queue is empty: put() an item first")
        client, items = next(iter(self._clients.items()))
        item = items.popleft()
        self._count -= 1
        del self._clients[client]
        if items:
            self._clients[client] = items  # behind all others
        return item

    def remove(self, wanted: Callable[[T], bool], most: int | None = None) -> list[T]:
        """Remove the items that are wanted, at most `most`, and return them."""
        removed: list[T] = []
        for client, items in list(self._clients.items()):
            kept: deque[T] = deque()
            for item in items:
                take = (most is None or len(removed) < most) and wanted(item)
                (removed if take else kept).append(item)
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        self._count -= len(removed)
        return removed
