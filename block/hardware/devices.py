"""The GPUs of this machine."""

from __future__ import annotations

import shutil
import subprocess


def visible_gpus() -> int:
    """GPUs that this process may use; 0 without a driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return len(found.stdout.split()) if found.returncode == 0 else 0
