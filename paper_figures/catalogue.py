"""All figures and tables, those of the paper in its order, then ours; the names are those of the modules."""

from __future__ import annotations

FIGURES = (
    "headline",
    "fig5",
    "fig6",
    "cdf",
    "fig7",
    "fig8",
    "snapshot",
    "table1",
    "length_calibration",
    "table2",
    "fig8_camera",
    "fig9",
    "fig11",
    "fig12",
    "fig13",
    "lengths",
    "heterogeneous",
    "robustness",
    "herding",
    "scale",
    "prefix",
    "prefix_capacity",
)

STUDIES = ("prefix", "prefix_capacity")
"""Those that are drawn only if they are named: they take long."""
