"""A model server, as a driver on the wall clock sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from block.core.snapshot import Snapshot
from block.core.types import RequestRecord
from block.dispatch.core import SnapshotMany

FirstToken = Callable[[RequestRecord, float], None]
"""Is told when the first token of a request's response is there."""


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


def one_by_one(instances: Sequence[Instance] | Mapping[int, Instance]) -> SnapshotMany:
    """What takes the snapshots of some of these instances, by their ids, each in turn."""
    return lambda ids, now: [instances[i].snapshot() for i in ids]


class ReplayInstance(Instance, Protocol):
    """One that is asked for the responses to requests whose lengths are known, as a replay does."""

    async def generate(self, record: RequestRecord, first_token: FirstToken) -> None:
        """Serve the record's request to its last token and fill in its time, its tokens and its preemptions.

        Raises InstanceFailed or RequestFailed if it cannot.
        """
        ...
