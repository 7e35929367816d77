"""A browser without a window, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def drawn(url: str, profile: Path, *options: str) -> str:
    """The HTML of a page once its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    quiet = ["--disable-background-networking", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run([*command, *quiet, *options, url], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout
