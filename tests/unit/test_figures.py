"""The figures: each is drawn from what is stored, saved beside what it draws, and refuses to be drawn with holes."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from browser import CHROMIUM, drawn
from hydra import compose, initialize_config_dir

from block.run import hydra_schema
from block.run.execute import execute
from block.store.results import Run
from block.store.searches import Search
from paper_figures import points, readme, report, settings, style, verdicts
from paper_figures.catalogue import FIGURES
from paper_figures.verdicts import Claim, order, value

ROOT = Path(__file__).resolve().parents[2]
TRACKED = ROOT / "artifacts" / "figures"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One small run, which stands for all."""
    hydra_schema.register()
    folder = tmp_path_factory.mktemp("runs")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = compose(
            "config", ["workload.num_requests=80", "tracking=none", "replay_share=0.5", f"runs_dir={folder}"]
        )
    return execute(settings, {"scheduler": "block"}, quiet=True)


def searched(point: points.GridPoint) -> Search:
    """A search that found 30 requests/s at 3 s, and more by its seed."""
    seed = point["seed"]
    return Search(Path("x.json"), {"capacities_qps": {"3": 30.0 + seed, "10": 31.0 + seed}, "hashes": {}})


def everything(module: Any, run: Run) -> points.Stored:
    return points.Stored(
        {points.key(point): run for point in module.RUNS},
        {points.key(point): searched(point) for point in getattr(module, "SEARCHES", ())},
    )


def module_of(name: str) -> Any:
    return import_module(f"paper_figures.{name}")


# ------------------------------------------------------------------------------------------------------ every figure


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_saved_beside_its_table(name: str, run: Run, tmp_path: Path) -> None:
    module = module_of(name)
    style.use()
    table = module.table(everything(module, run))
    if hasattr(module, "draw"):
        style.save(module.draw(table), table, tmp_path, name)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.pdf").stat().st_size > 10_000
    else:
        assert module.markdown(table).count("\n|") > 3
        style.save(None, table, tmp_path, name)
    drawn = pd.read_csv(tmp_path / f"{name}.csv")
    assert len(drawn) == len(table) > 0
    assert module.PAPER
    for claim in module.claims(table) if hasattr(module, "claims") else ():
        if claim.verdict == "gap":  # in this run no instance joins, and nobody preempts
            words = {"fig8": ("first instance joins", "provisions no later"), "fig7": ("preempts less",)}[name]
            assert any(word in claim.what for word in words)
        else:
            assert claim.verdict in ("reproduced", "partly", "not", "ours")


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_run_or_search_is_named(name: str, run: Run) -> None:
    module = module_of(name)
    whole = everything(module, run)
    for what, wanted in (("runs", module.RUNS), ("searches", getattr(module, "SEARCHES", ()))):
        if not wanted:
            continue
        lacking = points.key(wanted[-1])
        holed = points.Stored(
            {key: one for key, one in whole.runs.items() if what == "searches" or key != lacking},
            {key: one for key, one in whole.searches.items() if what == "runs" or key != lacking},
        )
        told = " ".join(points.overrides(wanted[-1]))
        with pytest.raises(points.MissingResults, match=re.escape(f"1 of {len(wanted)} {what} are missing: {told}")):
            module.table(holed)


SEARCHED = [name for name in FIGURES if getattr(module_of(name), "SEARCHES", ())]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_seeds_draw_every_figure(name: str, seeds: int, run: Run) -> None:
    module = module_of(name)
    style.use()
    whole = everything(module, run)
    few = points.Stored(whole.runs, whole.searches, seeds)
    table = module.table(few)
    if hasattr(module, "draw"):
        plt.close(module.draw(table))
    else:
        module.markdown(table)
    for claim in module.claims(table) if hasattr(module, "claims") else ():
        alone = (
            seeds == 1
            or claim.holds is not None
            or name in ("scale", "table1", "length_calibration", "prefix_capacity")
        )
        assert (claim.half_width is None) == alone or claim.verdict == "gap", claim.what


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", SEARCHED)
def test_searches_that_find_nothing_are_gaps_and_no_number(name: str, seeds: int, run: Run) -> None:
    module = module_of(name)
    style.use()
    why = "ttft_p99_s meets 10 s even at 3,600 requests/s"
    nothing = {"capacities_qps": {"3": None, "10": None}, "gaps": {"3": why, "10": why}, "hashes": {}}
    whole = everything(module, run)
    holed = points.Stored(whole.runs, dict.fromkeys(whole.searches, Search(Path("x.json"), nothing)), seeds)
    gap = holed.gaps(module.SEARCHES)
    assert why in gap
    table = module.table(holed)
    if hasattr(module, "draw"):
        plt.close(module.draw(table))
    else:
        assert "| – |" in module.markdown(table)
    found = verdicts.rows(name, "", module.claims(table), gap)
    capacity = found["what"].str.contains("capacity|carr")
    assert capacity.any()
    assert set(found[capacity]["verdict"]) == {"gap"}
    assert set(found[capacity]["reason"]) == {gap}
    assert found[capacity]["ours"].isna().all()


def test_seeds_that_are_not_asked_for_are_not_missed(run: Run) -> None:
    module = module_of("fig6")
    whole = everything(module, run)
    one = points.Stored({key: run for key in whole.runs if ("seed", "0") in key}, whole.searches, seeds=1)
    assert set(module.table(one)["seed"]) == {0}


def test_every_figure_is_in_the_catalogue() -> None:
    modules = {path.stem for path in (ROOT / "paper_figures").glob("*.py") if "TITLE = " in path.read_text()}
    assert modules == set(FIGURES)


def test_every_scheduler_has_a_colour_and_a_marker_of_its_own() -> None:
    assert len(set(style.COLOURS.values())) == len(style.POLICIES) == len(set(style.MARKERS.values()))


def test_a_grid_is_every_combination() -> None:
    assert points.grid(scheduler=("a", "b"), workload__qps=(1, 2)) == [
        {"scheduler": scheduler, "workload.qps": qps} for scheduler in ("a", "b") for qps in (1, 2)
    ]


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (value("a", 10.0, [10.3, 10.5]), "reproduced"),  # 4 %
        (value("a", 10.0, [10.5, 10.7]), "partly"),
        (value("a", 10.0, [8.0, 8.2]), "not"),
        (value("a", 32.0, [32.3], tolerance=0.3), "reproduced"),
        (value("a", 32.0, [31.1], tolerance=0.3), "partly"),
        (value("a", -49.5, [-51.0], tolerance=2), "reproduced"),
        (value("a", None, [3.0]), "ours"),
        (order("a", [True, True]), "reproduced"),
        (order("a", [True, True, False]), "partly"),
        (order("a", [True, False]), "not"),
    ],
)
def test_the_verdict_of_a_claim(claim: Claim, verdict: str) -> None:
    assert claim.verdict == verdict


def test_a_wide_interval_does_not_make_a_number_reproduced() -> None:
    claim = value("a", 10.0, [5.0, 13.0])
    assert claim.half_width is not None
    assert claim.half_width > 10
    assert claim.verdict == "partly"


def test_the_summary_keeps_the_claims_of_other_figures_and_the_order_of_the_paper(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    verdicts.update(path, "fig9", "camera-ready Fig 9", [value("nine", 2.0, [2.0, 2.1], "s")])
    verdicts.update(path, "fig6", "v2 Fig 6", [value("old", 1.0, [1.0]), order("six", [True, False, True])])
    verdicts.update(path, "fig6", "v2 Fig 6", [order("six", [True, False, True])])
    verdicts.write(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| fig") and "verdict" not in line]
    assert rows[0] == "| fig6 (v2 Fig 6) | six | claimed | 2 of 3 seeds | – | partly |  |"
    assert rows[1].startswith("| fig9 (camera-ready Fig 9) | nine | 2 s | 2.05 ± 0.64 s | +2.5% | reproduced |")
    assert "old" not in text
    assert "1 reproduced, 1 partly." in text


def test_what_is_tracked_says_why_something_is_not_reproduced() -> None:
    summary = verdicts.read(TRACKED)
    unexplained = summary[summary["verdict"].isin(("partly", "not")) & summary["reason"].isna()]
    assert unexplained["what"].tolist() == []
    claimed = set(zip(summary["figure"], summary["what"], strict=True))
    drawn = set(summary["figure"])
    reasons = {(figure, what) for figure, each in verdicts.REASONS.items() if figure in drawn for what in each}
    assert reasons <= claimed


def test_what_is_tracked_is_whole_and_the_readme_says_what_is_not() -> None:
    text = "".join((ROOT / page).read_text() for page in readme.PAGES)
    drawn = {path.stem for path in TRACKED.glob("*.csv")} - {"summary"}
    for name in drawn:
        assert (TRACKED / f"{name}.png").exists() or (TRACKED / f"{name}.md").exists(), name
    told = re.search(r"^Not drawn in this repository yet: (.*)\.$", text, flags=re.MULTILINE)
    missing = set(re.findall(r"`(\w+)`", told.group(1))) if told else set()
    assert drawn | missing == set(FIGURES)
    assert not drawn & missing
    for name, figure, write in (("headline", "fig6", readme.table), ("claims", "headline", readme.claims)):
        begin, end = readme.marks(name)
        assert f"{begin}{write(pd.read_csv(TRACKED / f'{figure}.csv'))}{end}" in text


def test_the_readme_is_changed_between_its_marks_only(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    begin, end = readme.marks("headline")
    path.write_text(f"before\n{begin}old\n{end}\nafter\n")
    readme.update(path, TRACKED)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    path.write_text("no marks\n")
    readme.update(path, TRACKED)
    assert path.read_text() == "no marks\n"


def test_claims_are_bold_where_the_interval_reaches_what_is_published() -> None:
    row = {"setting": "batch24", "slo_s": 3.0, "workload.qps": None, "by_seed": ""}
    rows = [
        {**row, "setting": setting, "slo_s": slo, "baseline": baseline, "scheduler": scheduler, **gain}
        for setting in settings.SETTINGS
        for slo in settings.SLO_S
        for baseline in readme.BASELINES
        for scheduler, gain in (
            ("block", {"gain_percent": 18.0 if setting == "batch24" else 4.0, "half_width": 2.0}),
            ("block_star", {"gain_percent": 15.0, "half_width": 1.0}),
        )
    ]
    latency = [
        {
            **row,
            "setting": None,
            "slo_s": None,
            "workload.qps": 32,
            "baseline": baseline,
            "scheduler": scheduler,
            **gain,
        }
        for baseline in readme.BASELINES
        for scheduler, gain in (
            ("block", {"gain_percent": -45.0, "half_width": 5.0}),
            ("block_star", {"gain_percent": 55.0, "half_width": 5.0}),
        )
    ]
    text = readme.claims(pd.DataFrame(rows + latency))
    assert "| batch 24 | ≤ 3 s | **+18.0 ± 2.0** (+15.0 ± 1.0) |" in text
    assert "| Qwen2-7B | ≤ 10 s | +4.0 ± 2.0 (+15.0 ± 1.0) |" in text
    assert "| 32 requests/s | **-45.0 ± 5.0** (+55.0 ± 5.0) |" in text


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    style.use()
    for name in ("fig9", "snapshot"):
        module = module_of(name)
        table = module.table(everything(module, run))
        style.save(module.draw(table) if hasattr(module, "draw") else None, table, folder, name)
        verdicts.update(folder / "summary.csv", name, module.PAPER, module.claims(table))
    report.write(folder, folder / "index.html")
    return folder / "index.html"


def test_the_report_needs_no_network_and_no_other_file(page: Path) -> None:
    text = page.read_text()
    assert "http" not in text
    assert "src=" in text
    assert text.count("src=") == text.count('src="data:image/png;base64,') == 1
    assert "python scripts/reproduce.py fig9" in text


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
def test_a_browser_sorts_and_filters_the_tables_of_the_report(page: Path, tmp_path: Path) -> None:
    def rows(fragment: str) -> list[str]:
        _, _, table = drawn(f"{page.as_uri()}#{fragment}", tmp_path).partition('<table id="summary-table">')
        body = table.partition("<tbody>")[2].partition("</tbody>")[0]
        return [row for row in body.split("<tr")[1:] if not row.startswith(' hidden=""')]

    everything = rows("")
    filtered = rows("summary-table?filter=fig9 oracle")
    assert 0 < len(filtered) < len(everything)
    assert all("oracle" in row and "fig9" in row for row in filtered)
    rising = rows("summary-table?sort=published&filter=fig9")
    falling = rows("summary-table?sort=published&filter=fig9&descending")
    numbers = [float(row.split('data-order="')[1].split('"')[0]) for row in rising if "data-order" in row]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 1
    back = [float(row.split('data-order="')[1].split('"')[0]) for row in falling if "data-order" in row]
    assert back == numbers[::-1]
