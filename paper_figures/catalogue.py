"""All figures and tables, in the paper's order; the names are those of the modules."""

from __future__ import annotations

FIGURES = (
    "headline",
    "fig5",
    "fig6",
    "cdf",
    "fig7",
    "snapshot",
    "table2",
    "fig9",
    "fig11",
    "fig12",
    "fig13",
    "robustness",
    "herding",
    "scale",
)

# What is not drawn yet: what it is, and where the paper has it.
NOT_YET = {
    "table1": ("accuracy of the length estimator", "v2 Table 1, camera-ready Table 1"),
    "fig8": ("auto-provisioning", "v2 Fig 8"),
    "migration": ("Llumnix with migration, on A100", "camera-ready Fig 8"),
}
