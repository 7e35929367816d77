"""Time the parts of a Llama-3-8B step on this GPU with PyTorch alone, in about a minute.

    python scripts/gpu_operators.py --out gpu.json

Needs PyTorch and nothing of Block: a bare machine will do. Weights and inputs are random bfloat16. Every time is the
median of CUDA-event times of graph replays. No server is started: the result checks parts of the roofline and is no
latency model.
Attention is PyTorch's flash attention over a contiguous cache, not vLLM's over a paged one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 32, 4096, 14336, 32, 8, 128, 128256
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODES = (
    (1, 1, 1),
    (1, 1, 1024),
    (1, 1, 8192),
    (8, 1, 1024),
    (32, 1, 256),
    (32, 1, 1024),
    (32, 1, 4096),
    (128, 1, 1024),
    (256, 1, 512),
    (256, 1, 2048),
)
PREFILLS = (
    (1, 128, 128),
    (1, 512, 512),
    (1, 2048, 2048),
    (1, 8192, 8192),
    (1, 512, 4096),
    (1, 512, 8192),
    (1, 2048, 8192),
)


def main() -> None:
    """Time each part and write the file again after each, so that a time-out loses only what was not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="cuda, or cpu for a try with tiny shapes (default: cuda)",
    )
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():
        parser.error(f"--out={arguments.out}: no such folder {arguments.out.parent}")
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is not installed: pip install torch")
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attention

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: PyTorch finds no GPU; choose --device cpu for a try")
    device = arguments.device
    small = device == "cpu"
    facts = {"torch": torch.__version__, "device": "cpu" if small else torch.cuda.get_device_name()}
    rows: list[dict[str, object]] = []

    def measure(part: str, shape: dict[str, int], run: Callable[[], object]) -> None:
        row: dict[str, object] = {"part": part, **shape}
        try:
            row["seconds"] = _median(run, small)
        except RuntimeError as error:  # one shape that fails must not lose the others
            row["error"] = str(error)[:300]
        rows.append(row)
        arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")

    scale = 16 if small else 1
    layers = 2 if small else LAYERS
    hidden, inner, kv_heads, heads = HIDDEN // scale, INNER // scale, max(KV_HEADS // scale, 1), HEADS // scale

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

    with torch.inference_mode():
        size = 2**22 if small else 2**32
        source, target = (
            torch.empty(size, device=device, dtype=torch.uint8),
            torch.empty(size, device=device, dtype=torch.uint8),
        )
        measure("copy", {"bytes": 2 * size}, lambda: target.copy_(source))
        wide = 512 if small else 8192
        left, right = random(wide, wide), random(wide, wide)
        measure("matmul", {"size": wide}, lambda: left @ right)

        qkv = [random((heads + 2 * kv_heads) * HEAD, hidden) for _ in range(layers)]
        out = [random(hidden, heads * HEAD) for _ in range(layers)]
        up = [random(2 * inner, hidden) for _ in range(layers)]
        down = [random(hidden, inner) for _ in range(layers)]
        head = random(VOCABULARY // scale, hidden)
        norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        linear = torch.nn.functional.linear

        def stack(x: torch.Tensor) -> torch.Tensor:
            """All matrix products of the layers, each layer with weights of its own; nothing between them."""
            for a, b, c, d in zip(qkv, out, up, down, strict=True):
                x = linear(linear(x, a)[:, : heads * HEAD], b)
                x = linear(linear(x, c)[:, :inner], d)
            return x

        def whole(x: torch.Tensor) -> torch.Tensor:
            """The same with norms, SiLU and residuals, as plain PyTorch kernels."""
            for a, b, c, d in zip(qkv, out, up, down, strict=True):
                y = torch.nn.functional.rms_norm(x, (hidden,), norm)
                x = x + linear(linear(y, a)[:, : heads * HEAD], b)
                y = linear(torch.nn.functional.rms_norm(x, (hidden,), norm), c)
                x = x + linear(torch.nn.functional.silu(y[:, :inner]) * y[:, inner:], d)
            return x

        for tokens in TOKENS[:4] if small else TOKENS:
            x = random(tokens, hidden)
            measure("linear", {"tokens": tokens, "layers": layers}, partial(stack, x))
            measure("layers_without_attention", {"tokens": tokens, "layers": layers}, partial(whole, x))
            if tokens <= 1024:
                measure("lm_head", {"tokens": tokens}, partial(linear, x, head))

        for part, shapes in (("decode_attention", DECODES), ("prefill_attention", PREFILLS)):
            for batch, query, kv in shapes[:2] if small else shapes:
                caches = max(2, min(16, int(2e8 // (batch * kv * kv_heads * HEAD * 4))))  # beyond the L2 cache
                q = random(batch, heads, query, HEAD)
                keys = [(random(batch, kv_heads, kv, HEAD), random(batch, kv_heads, kv, HEAD)) for _ in range(caches)]

                # A chunk after its context: without a mask each query sees all of the KV, so count it as such.
                def run(
                    q: torch.Tensor = q,
                    keys: list[tuple[torch.Tensor, torch.Tensor]] = keys,
                    causal: bool = query == kv and query > 1,
                ) -> None:
                    for k, v in keys:
                        attention(q, k, v, is_causal=causal, enable_gqa=True)

                with sdpa_kernel([SDPBackend.FLASH_ATTENTION, *([SDPBackend.MATH] if small else [])]):
                    measure(part, {"batch": batch, "query": query, "kv": kv, "calls": caches}, run)
    print(arguments.out)


def _median(run: Callable[[], object], small: bool) -> float:
    """Median seconds of a call: of replays of a CUDA graph, so that launches cost what they cost in a graph."""
    if small:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return float(statistics.median(times))


if __name__ == "__main__":
    main()
