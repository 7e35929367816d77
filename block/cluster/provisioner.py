"""Provisioners: does the cluster need another instance now, or would one fewer do?

As policies do, a provisioner only decides, from the views that the policy sees or from a request's measured latency.
Who acts on it, and when, is `block.cluster.scaler`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from block.core.types import InstanceView


@final
@dataclass(frozen=True)
class Static:
    """All instances, from the start to the end."""


@dataclass(frozen=True)
class Elastic(ABC):
    """Some instances at the start, and more, up to the cluster's size, when latencies exceed a threshold.

    threshold_s: seconds of end-to-end latency.
    initial: instances at the start, and never fewer.
    startup_s: seconds from the decision to an instance's first request, at least; real servers take their own time too.
    cooldown_s: seconds after a decision to grow in which there is no other.
    drain_after_s: an instance is drained, then stopped, after so many seconds in which every request would have had its
        first token within drain_ttft_s even at the fullest instance that the policy was shown; None: never.
    """

    threshold_s: float
    initial: int
    startup_s: float = 0.0
    cooldown_s: float = 0.0
    drain_after_s: float | None = None
    drain_ttft_s: float = 1.0

    def __post_init__(self) -> None:
        if self.initial < 1:
            raise ValueError(f"provisioner.initial={self.initial}: must be at least 1")
        for key in ("threshold_s", "drain_after_s", "drain_ttft_s"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"provisioner.{key}={value}: must be seconds greater than 0")
        for key in ("startup_s", "cooldown_s"):
            value = getattr(self, key)
            if not 0 <= value < math.inf:
                raise ValueError(f"provisioner.{key}={value}: must be 0 or more seconds")

    @property
    @abstractmethod
    def forecasts(self) -> bool:
        """Whether it decides by forecasts, so that the policy must be one that does."""

    @abstractmethod
    def foreseen(self, views: Sequence[InstanceView]) -> str | None:
        """Why an instance is to join for a request that has come, of which the policy was shown these views."""

    @abstractmethod
    def measured(self, latency_s: float) -> str | None:
        """Why an instance is to join after a request that has finished so many seconds after its arrival."""

    def idle(self, views: Sequence[InstanceView]) -> bool:
        """Whether the request would have had its first token in time even at the fullest of these instances."""
        return all(view.forecast is not None and view.forecast.ttft <= self.drain_ttft_s for view in views)


@final
@dataclass(frozen=True)
class Preempt(Elastic):
    """Grow when the best predicted latency of a request exceeds the threshold."""

    @property
    def forecasts(self) -> bool:
        """True: it grows by them."""
        return True

    def foreseen(self, views: Sequence[InstanceView]) -> str | None:
        """By the least predicted seconds to the last token."""
        best = min((view.forecast.e2e for view in views if view.forecast is not None), default=0.0)
        return f"best predicted latency {best:.1f} s" if best > self.threshold_s else None

    def measured(self, latency_s: float) -> str | None:
        """None: what has finished was foreseen."""
        return None


@final
@dataclass(frozen=True)
class Relief(Elastic):
    """Grow when the measured latency of a request exceeds the threshold."""

    @property
    def forecasts(self) -> bool:
        """Whether it drains, which goes by forecasts."""
        return self.drain_after_s is not None

    def foreseen(self, views: Sequence[InstanceView]) -> str | None:
        """None: it goes by what was measured."""
        return None

    def measured(self, latency_s: float) -> str | None:
        """By the seconds from arrival to last token."""
        return f"measured latency {latency_s:.1f} s" if latency_s > self.threshold_s else None
