"""All figures and tables, in the paper's order; the names are those of the modules."""

from __future__ import annotations

FIGURES = (
    "headline",
    "fig5",
    "fig6",
    "cdf",
    "fig7",
    "fig8",
    "snapshot",
    "table2",
    "table1",
    "lengths",
    "fig9",
    "fig11",
    "fig12",
    "fig13",
    "heterogeneous",
    "robustness",
    "herding",
    "scale",
)

# What is not drawn yet: what it is, and where the paper has it.
NOT_YET = {
    "migration": ("Llumnix with migration, on A100", "camera-ready Fig 8"),
}
