"""The report: one page, of what is in the folder of figures, that needs no network and no other file."""

from __future__ import annotations

import base64
import html
import io
from importlib import import_module
from pathlib import Path

import pandas as pd
from PIL import Image

from paper_figures import verdicts
from paper_figures.catalogue import FIGURES

TEMPLATE = Path(__file__).with_name("report.html")
WIDTH = 1100  # pixels of a picture
ROWS = 400  # of a table; more are left to its CSV


def write(folder: Path, page: Path) -> None:
    """Write the page of the figures, tables and summary in `folder`."""
    summary = verdicts.read(folder)
    sections = [_section(name, folder, summary) for name in FIGURES if (folder / f"{name}.csv").exists()]
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{{counts}}", _counts(summary)).replace("{{summary}}", _summary(summary))
    text = text.replace("{{sections}}", "\n".join(sections))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def _counts(summary: pd.DataFrame) -> str:
    counts = summary["verdict"].value_counts()
    words = ("reproduced", "partly", "not", "ours", "gap")
    return " ".join(
        f'<button class="verdict {word}" data-filter="{word}">{counts[word]} {word}</button>'
        for word in words
        if word in counts
    )


def _summary(summary: pd.DataFrame) -> str:
    rows = []
    for _, row in summary.iterrows():
        unit = "" if pd.isna(row["unit"]) else str(row["unit"])
        figure, verdict = html.escape(str(row["figure"])), str(row["verdict"])
        name = f'<a href="#{figure}">{figure}</a>'
        cells = [
            (name, ""),
            (html.escape(str(row["what"])), ""),
            (verdicts.shown(row["published"], unit=unit), _number(row["published"])),
            (verdicts.shown(row["ours"], row["half_width"], unit), _number(row["ours"])),
            (verdicts.difference(row["published"], row["ours"], unit), ""),
            (f'<span class="verdict {verdict}">{verdict}</span>', ""),
            ("" if pd.isna(row["reason"]) else html.escape(str(row["reason"])), ""),
        ]
        rows.append("<tr>" + "".join(f"<td{order}>{text}</td>" for text, order in cells) + "</tr>")
    return _table(["figure", "what", "published", "ours", "difference", "verdict", "reason"], rows, "summary-table")


def _number(value: object) -> str:
    """What a cell is sorted by, if not by its text."""
    try:
        return f' data-order="{float(str(value)):g}"'
    except ValueError:
        return ""


def _section(name: str, folder: Path, summary: pd.DataFrame) -> str:
    module = import_module(f"paper_figures.{name}")
    title, about = html.escape(module.TITLE), html.escape(" ".join((module.__doc__ or "").split()))
    shown = _picture(folder / f"{name}.png", title) if (folder / f"{name}.png").exists() else ""
    claims = summary[summary["figure"] == name]
    table = _data(pd.read_csv(folder / f"{name}.csv"), name)
    command = html.escape(f"python scripts/reproduce.py {name}")
    return f"""<section id="{name}">
<h2>{title} <small>{html.escape(module.PAPER)}</small></h2>
<p>{about}</p>
{shown}
{_summary(claims).replace("summary-table", f"claims-{name}") if len(claims) else ""}
<p><code>{command}</code></p>
<details><summary>the numbers</summary>
{table}
</details>
</section>"""


def _picture(path: Path, title: str) -> str:
    """The picture, in all its colours: with fewer, two policies may look alike."""
    with Image.open(path) as picture:
        smaller = picture.convert("RGB")
        if smaller.width > WIDTH:
            smaller = smaller.resize((WIDTH, round(smaller.height * WIDTH / smaller.width)), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        smaller.save(packed, "png", optimize=True)
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}">'


def _data(table: pd.DataFrame, name: str) -> str:
    rows = []
    for row in table.head(ROWS).itertuples(index=False):
        rows.append("<tr>" + "".join(f"<td>{_plain(value)}</td>" for value in row) + "</tr>")
    more = f"<p>The first {ROWS} of {len(table):,} rows; all are in {name}.csv.</p>" if len(table) > ROWS else ""
    return _table([str(column) for column in table.columns], rows, f"data-{name}") + more


def _plain(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.5g}"
    return html.escape(str(value))


def _table(columns: list[str], rows: list[str], name: str) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return (
        f'<input class="filter" placeholder="filter" aria-label="filter" data-table="{name}">'
        f'<div class="wide"><table id="{name}">{body}</table></div>'
    )
