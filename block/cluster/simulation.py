"""Simulation: a heap of events in front of a batch of engines, which drives dispatchers on virtual time.

    arrival → dispatcher.arrived → (dispatch delay) → delivery → engines.receive → … → dispatcher.finished

Time jumps to whatever comes first: the next event of the heap, or the next at which an engine finishes a sequence.
What happens at the same moment happens in this order: engines first, then events in the order in which they were set.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

from block.core.arrays import Ints
from block.core.snapshot import Snapshots
from block.core.types import Request, RequestRecord
from block.dispatch.core import Dispatcher
from block.dispatch.prefixes import Kept
from block.engine.batch import EngineBatch, Finished

Process = Generator[float, None, None]
"""What goes on beside the requests: it yields the time until which it waits."""


class SimulationStalled(RuntimeError):
    """Requests are left that nothing will ever finish."""


class Simulation:
    """Virtual time, from 0 on, over the engines of a batch: instance i is row i.

    delay_s: seconds from the placing of a request to its arrival at the instance.
    """

    def __init__(self, engines: EngineBatch, delay_s: float = 0.0) -> None:
        self.engines = engines
        self.now = 0.0
        self.running: dict[int, tuple[RequestRecord, Dispatcher]] = {}
        """Requests at instances, or between two of them, by their ids."""
        self._delay_s = delay_s
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0  # of events so far, which orders those of one time
        self._unfinished = 0  # requests that have arrived and not ended
        self._ended: Callable[[RequestRecord], None] = lambda record: None  # as of `run`
        self._held: dict[int, list[tuple[RequestRecord, Dispatcher]]] = defaultdict(list)  # until their instance is up

    def at(self, when: float, event: Callable[..., None], *arguments: Any) -> None:
        """Have `event(*arguments)` happen at a time that is not past."""
        self._count += 1
        heappush(self._heap, (when, self._count, event, arguments))

    def start(self, process: Process) -> None:
        """Run a process until it waits, again when it is time, and so on to its end."""
        for when in process:
            self.at(when, self.start, process)
            return

    def snapshot_many(self, ids: Sequence[int], now: float) -> Snapshots:
        """What the schedulers of these instances published last."""
        return self.engines.snapshots(ids, now)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block; as of `block.dispatch.core.PrefixIndex`."""
        return self.engines.block_size

    def hits(self, request: Request, ids: Sequence[int]) -> Ints:
        """What these engines have of a request; as of `block.dispatch.core.PrefixIndex`."""
        assert request.block_hashes is not None
        size = self.block_size
        found = self.engines.cached_blocks(ids, request.block_hashes, (request.prompt_tokens - 1) // size, self.now)
        found[:, 0] *= size
        return found

    def keep(self, instance_id: int) -> Kept:
        """What an engine has now, to be looked up in later; as of `block.dispatch.prefixes`."""
        kept, now = self.engines.copy(instance_id), self.now

        def look_up(hashes: Ints, most: int) -> tuple[int, int]:
            blocks, in_use = kept.cached_blocks([0], hashes, most, now)[0].tolist()
            return blocks, in_use

        return look_up

    def run(
        self,
        requests: Iterable[tuple[Request, Dispatcher]],
        before: Callable[[float, int], None] = lambda now, request_id: None,
        ended: Callable[[RequestRecord], None] = lambda record: None,
        next_of: Callable[[RequestRecord], tuple[Request, Dispatcher] | None] | None = None,
    ) -> None:
        """Send each request to its dispatcher at its arrival, in order of these, until all have ended.

        before: is told the time and the id of each request that arrives, before it is placed. ended: is told of each
        record that is complete. next_of: the request that comes because this one has ended, and its dispatcher; its
        arrival is not past. SimulationStalled if some never end.
        """
        heap, engines = self._heap, self.engines
        arrivals = iter(requests)

        def come(request: Request, dispatcher: Dispatcher) -> None:
            before(self.now, request.id)
            self._send(dispatcher.arrived(request, self.now), dispatcher)

        def arrive(request: Request, dispatcher: Dispatcher) -> None:
            come(request, dispatcher)
            next_arrival()

        def go_on(record: RequestRecord) -> None:
            ended(record)
            if next_of is not None and (following := next_of(record)) is not None:
                self._unfinished += 1
                self.at(following[0].arrival, come, *following)

        def next_arrival() -> None:
            for request, dispatcher in arrivals:
                self._unfinished += 1
                self.at(max(request.arrival, self.now), arrive, request, dispatcher)
                return

        self._ended = ended if next_of is None else go_on
        next_arrival()
        while self._unfinished > 0:
            when = heap[0][0] if heap else math.inf
            if engines.next_event <= when:
                if engines.next_event == math.inf:
                    raise SimulationStalled("simulation stalled: requests are left, and nothing more will happen")
                finished = engines.advance_all(when)
                if finished:
                    self.now = finished[0].finished
                    for sequence in finished:
                        self._finish(sequence)
                    continue
                if not heap:
                    continue
            self.now, _, event, arguments = heappop(heap)
            event(*arguments)

    def _send(self, record: RequestRecord, dispatcher: Dispatcher) -> None:
        """A request was placed: it gets to its instance after the delay, once that is up."""
        if record.status != "pending":
            self._end(record)
        elif record.instance_id in dispatcher.starting:
            self._held[record.instance_id].append((record, dispatcher))
        elif self._delay_s > 0:
            self.at(self.now + self._delay_s, self._deliver, record, dispatcher)
        else:
            self._deliver(record, dispatcher)

    def _deliver(self, record: RequestRecord, dispatcher: Dispatcher) -> None:
        self.running[record.request.id] = (record, dispatcher)
        self.engines.receive(record.instance_id, record.request, self.now)
        dispatcher.delivered(record, self.now)

    def _finish(self, sequence: Finished) -> None:
        record, dispatcher = self.running.pop(sequence.id)
        record.preemptions = sequence.preemptions
        record.output_tokens = sequence.output_tokens
        record.cached_tokens = sequence.cached_tokens
        dispatcher.first_token(record, sequence.first_token)
        dispatcher.finished(record, sequence.finished)
        self._end(record)

    def _end(self, record: RequestRecord) -> None:
        self._unfinished -= 1
        self._ended(record)

    # ---- what a `block.cluster.scaler.Scaler` asks for

    def start_instance(self, instance_id: int, dispatcher: Dispatcher, ready_at: float) -> None:
        """Have an instance come up, at once if it is time."""
        if ready_at <= self.now:
            self._up(instance_id, dispatcher)
        else:
            self.at(ready_at, self._up, instance_id, dispatcher)

    def stop_instance(self, instance_id: int, dispatcher: Dispatcher) -> None:
        """Have an instance, at which no request is, go away."""
        dispatcher.instance_down(instance_id, "drained", self.now)

    def _up(self, instance_id: int, dispatcher: Dispatcher) -> None:
        dispatcher.instance_up(instance_id, self.now)
        for held in self._held.pop(instance_id, ()):
            self._send(*held)
