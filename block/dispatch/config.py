"""How requests get to instances: the node `dispatch` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DispatchConfig:
    """How requests get to instances (one Hydra node).

    ledger: count in requests that were placed and are not yet visible in a snapshot.
    snapshot_interval_s: a snapshot is used again until it is this old, and so is what instances tell of their prefix
        caches; 0 takes a fresh one for every decision.
    correction_steps: observed steps by which forecasts are corrected (`block.dispatch.correction`); 0: they are not.
    dispatchers: so many dispatchers, each with a state of its own; a request goes to one of them at random.
    forecast_noise: standard deviation of the Gaussian factor by which each forecast is off on purpose; 0 for none.
    prefixes: how it is known what instances have in their prefix caches: "told", by the instances; or "sent", what a
        dispatcher has sent there itself, which is also the way where instances do not tell.
    """

    ledger: bool = True
    snapshot_interval_s: float = 0.0
    correction_steps: int = 0
    dispatchers: int = 1
    forecast_noise: float = 0.0
    prefixes: str = "told"

    def __post_init__(self) -> None:
        if not 0 <= self.snapshot_interval_s < float("inf"):
            raise ValueError(f"dispatch.snapshot_interval_s={self.snapshot_interval_s}: must be 0 or more seconds")
        if self.correction_steps < 0:
            raise ValueError(f"dispatch.correction_steps={self.correction_steps}: must be 0 or more")
        if self.dispatchers < 1:
            raise ValueError(f"dispatch.dispatchers={self.dispatchers}: must be at least 1")
        if self.dispatchers > 10_000:
            raise ValueError(f"dispatch.dispatchers={self.dispatchers}: must be at most 10000")
        if self.prefixes not in ("told", "sent"):
            raise ValueError(f"dispatch.prefixes={self.prefixes}: choose told or sent")
        if not 0 <= self.forecast_noise < float("inf"):
            raise ValueError(f"dispatch.forecast_noise={self.forecast_noise}: must be 0 or more")
