"""What the dispatcher asks of an instance, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from block.core.snapshot import Snapshot
from block.core.types import Request, RequestRecord

Look = Callable[[Sequence[int]], Sequence[Snapshot]]
"""Snapshots of the instances with these ids, at once."""


def one_by_one(instances: Sequence[Instance]) -> Look:
    """Looks at each of these instances in turn."""
    return lambda ids: [instances[i].snapshot() for i in ids]


class InstanceFailed(RuntimeError):
    """The instance did not serve the request, so that another may; the message says why.

    gone: it serves no other request either; False if it only turned this one away.
    """

    def __init__(self, message: str, *, gone: bool = True) -> None:
        super().__init__(message)
        self.gone = gone


class RequestFailed(RuntimeError):
    """The request cannot be served, or not any more, and that is not the instance's fault; the message says why."""


class LaunchFailed(RuntimeError):
    """Servers did not come up, or are not what they should be; the message says which, why, and where the log is."""


class Instance(Protocol):
    """One model server."""

    instance_id: int

    def snapshot(self) -> Snapshot:
        """The state its scheduler last published. Does not wait: it is there already, in memory."""
        ...

    async def generate(self, request: Request, record: RequestRecord) -> None:
        """Serve `request` to its last token and fill `record`'s times, tokens and preemptions.

        Raises InstanceFailed or RequestFailed if it cannot.
        """
        ...

    async def healthy(self) -> bool:
        """Whether it would serve a request now: asked of an instance that failed one."""
        ...
