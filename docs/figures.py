"""A hook of mkdocs: pages show pictures of artifacts/figures, which lies outside docs/; the site gets copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FIGURES = Path(__file__).resolve().parents[1] / "artifacts" / "figures"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to the files of the site."""
    for path in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Have a page look for them there."""
    return markdown.replace("](../artifacts/figures/", "](figures/")
