"""Fit the tracked latency models to the operator profiles: BLOCK_DATA/profiles → artifacts/latency/<gpu>-<model>.json.

BLOCK_DATA=… python scripts/fit_latency.py [--pair a30-llama2-7b] [--out artifacts/latency] [--force]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from block.hardware.catalogue import Model, gpu_named
from block.hardware.profiling.fit import Profile, ProfileFit, fit_profile
from block.hardware.profiling.transfer import LLAMA2_7B_A30
from block.hardware.tracked import TRACKED
from block.run.config_errors import Parser, piped

MODELS = Path(__file__).parents[1] / "conf" / "model"

# KV-cache tokens of an instance: the block counts that the paper and its artifact publish, of 16 tokens each.
KV_TOKENS = {"a30-llama2-7b": 1052 * 16, "a30-qwen2-7b": 7289 * 16, "a100-40gb-llama2-70b": 806 * 16}


def configured(name: str) -> Model:
    """The model of conf/model; the keys are the dataclass's."""
    values = OmegaConf.to_container(OmegaConf.load(MODELS / f"{name}.yaml"))
    assert isinstance(values, dict)
    return Model(**{str(key): value for key, value in values.items() if key != "defaults"})


def a30_llama2_7b(profiles: Path) -> Profile:
    """One A30, with the attention of Qwen2-7B and measured points in place of a missing attention profile."""
    return Profile(
        gpu_named("a30"),
        configured("llama2-7b"),
        operators=profiles / "a30" / "llama2-7b" / "mlp.csv",
        kin=configured("qwen2-7b"),
        kin_attention=profiles / "a30" / "qwen2-7b" / "attention.csv",
        points=LLAMA2_7B_A30,
    )


def a30_qwen2_7b(profiles: Path) -> Profile:
    """One A30."""
    here = profiles / "a30" / "qwen2-7b"
    return Profile(gpu_named("a30"), configured("qwen2-7b"), here / "mlp.csv", here / "attention.csv")


def a100_llama2_70b(profiles: Path) -> Profile:
    """Four A100-40GB."""
    here = profiles / "a100-40gb"
    model = here / "llama2-70b"
    return Profile(
        gpu_named("a100-40gb"),
        configured("llama2-70b"),
        model / "mlp.csv",
        model / "attention.csv",
        here / "all_reduce.csv",
    )


PAIRS: dict[str, Callable[[Path], Profile]] = {
    "a30-llama2-7b": a30_llama2_7b,
    "a30-qwen2-7b": a30_qwen2_7b,
    "a100-40gb-llama2-70b": a100_llama2_70b,
}


def show(console: Console, pair: str, fitted: ProfileFit) -> None:
    """Print the errors by operator, the notes and every repaired row."""
    errors = Table("operator", "held-out rows", "median error", "P95 error", title=f"{pair}: error on held-out rows")
    for operator, error in fitted.errors.items():
        errors.add_row(operator, str(error.rows), f"{error.median:.1%}", f"{error.p95:.1%}")
    console.print(errors)
    for note in fitted.notes:
        console.print(note)
    repairs = Table("operator", "tokens", "measured µs", "repaired µs", "why", title=f"{pair}: repaired rows")
    for row in fitted.repairs:
        repairs.add_row(
            row.operator, str(row.tokens), f"{row.measured * 1e6:.1f}", f"{row.repaired * 1e6:.1f}", row.reason
        )
    console.print(repairs)


def main() -> int:
    """Exit status 0, or 2 with one line on stderr."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=list(PAIRS), action="append", help="fit only this one (may be repeated)")
    parser.add_argument("--data", type=Path, help="folder that holds profiles/ (default: $BLOCK_DATA)")
    parser.add_argument("--out", type=Path, default=TRACKED, help="folder to write to (default: artifacts/latency)")
    parser.add_argument("--force", action="store_true", help="write over fits that are there")
    arguments = parser.parse_args()
    data = arguments.data or os.environ.get("BLOCK_DATA")
    console = Console()
    try:
        if not data:
            raise ValueError("BLOCK_DATA is not set: give the folder that holds profiles/ there or by --data")
        if not (Path(data) / "profiles").is_dir():
            raise FileNotFoundError(f"{Path(data) / 'profiles'}: no such folder; BLOCK_DATA or --data names its parent")
        targets = [arguments.out / f"{pair}.json" for pair in arguments.pair or PAIRS]
        if not arguments.force and (taken := [path for path in targets if path.exists()]):
            raise ValueError(f"{taken[0]}: is there already; give another --out, or --force to write over it")
        arguments.out.mkdir(parents=True, exist_ok=True)
        for pair in arguments.pair or PAIRS:
            fitted = fit_profile(PAIRS[pair](Path(data) / "profiles"))
            source = {**fitted.model.source, "kv_tokens": KV_TOKENS[pair]}
            replace(fitted.model, source=source).save(arguments.out / f"{pair}.json")
            show(console, pair, fitted)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
