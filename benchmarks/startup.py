"""Start-up: seconds from the command to the end of a one-request run, compiled code cached, without W&B."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
with tempfile.TemporaryDirectory() as runs:
    command = [sys.executable, "run.py", "workload.num_requests=1", "tracking=none", f"runs_dir={runs}"]
    seconds = []
    for _ in range(4):  # the first may compile
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
print(f"first start {seconds[0]:.1f} s, later ones {min(seconds[1:]):.1f} s")
