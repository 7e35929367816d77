"""The figures and tables of the paper, and ours beside them: a module each, named as `scripts/reproduce.py` calls it.

A module of a figure has (`points.Figure`):

    TITLE            what it shows, in one line
    PAPER            where the paper has it: "v2 Fig 6, camera-ready Fig 6", or "beyond the paper"
    RUNS             grid points of the runs that it needs
    SEARCHES         grid points of the capacity searches that it needs (left out: none)
    FILES            what it reads beside (left out: nothing)
    SIMULATED_ONLY   True if real engines cannot give it (left out: they can)
    table(stored)    what it shows, as a data frame; MissingResults if a run or a search is not stored
    draw(table)      the picture, a matplotlib figure; or, for a table, markdown(table)
    claims(table)    verdicts.Claims: published values and orders beside ours (left out: none)

Add the module's name to `catalogue.FIGURES`, what is published to published.yaml, and to reasons.yaml why something is
not reproduced.
"""
