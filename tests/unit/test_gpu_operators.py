"""The roofline against operators timed on a real H100 (artifacts/gpu, docs/gpu.md), and the script that timed them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from block.hardware.catalogue import GPUS, Model
from block.hardware.roofline import roofline

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "artifacts" / "gpu" / "h100-operators.json").read_text())


def rows(part: str) -> list[dict[str, float]]:
    return [row for row in RECORD["rows"] if row["part"] == part]


def test_the_roofline_errs_against_the_h100_by_what_the_docs_say() -> None:
    values = dict(OmegaConf.load(ROOT / "conf" / "model" / "llama3-8b.yaml"))
    del values["defaults"]
    model = Model(**values)
    times = roofline(GPUS["h100"], model)
    head = model.head_weights * model.dtype_bytes / (GPUS["h100"].bandwidth * 1e9 * 0.80)
    layers = [
        (times.linear[int(row["tokens"])] - head) / row["seconds"] - 1 for row in rows("layers_without_attention")
    ]
    assert [round(100 * error) for error in layers] == [11, 9, 10, 10, 12, 16, 23, 33, 42, 24, 6, -6, -11, -14]
    decode = [
        (times.decode_base + times.decode_per_kv * row["batch"] * row["kv"]) / 32 / (row["seconds"] / row["calls"]) - 1
        for row in rows("decode_attention")
        if row["batch"] * row["kv"] >= 32 * 1024
    ]
    assert [round(100 * error) for error in decode] == [-3, -9, -11, -19, -11]


def test_no_product_beat_the_data_sheet() -> None:
    """No faster than reading the weights or computing the products at the sheet's peak: times are of real work."""
    weights = 32 * 4096 * (6144 + 4096 + 3 * 14336)
    for row in rows("linear"):
        assert row["seconds"] > max(2 * weights / 3350e9, 2 * weights * row["tokens"] / 989e12)


@pytest.mark.slow
def test_the_script_times_every_part_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "cpu.json"
    script = ROOT / "scripts" / "gpu_operators.py"
    subprocess.run([sys.executable, script, "--device", "cpu", "--out", out], check=True, capture_output=True)
    found = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in found} == {row["part"] for row in RECORD["rows"]}
    assert all(row["seconds"] > 0 for row in found)
