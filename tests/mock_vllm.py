"""A process that answers as a vLLM server with the plugin does, and is up in a moment; arguments as of `vllm serve`.

Each token takes 20 ms. --no-such-option is refused.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from block.engine.config import EngineSettings
from block.vllm_plugin import state_buffer as b
from block.vllm_plugin.environment import PARENT
from block.vllm_plugin.lifetime import die_with_parent
from block.vllm_plugin.state_buffer import StateBuffer

SETTINGS = EngineSettings(
    True, 8, 512, 2048, block_size=16, total_blocks=1000, watermark_blocks=0, scheduler_reserve_full_isl=False
)
TOKEN_S = 0.02


def main() -> None:
    die_with_parent(int(os.environ[PARENT]))
    given = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
    if "no-such-option" in given:
        print("usage: mock_vllm\nValueError: no-such-option\nand more of it", file=sys.stderr)
        sys.exit(2)
    buffer, path = StateBuffer.create()
    buffer.header[b.SETTINGS : b.SETTINGS + len(SETTINGS)] = SETTINGS
    buffer.header[b.FREE] = SETTINGS.total_blocks
    views: dict[str, Any] = {
        "/health": {},
        "/v1/models": {"data": [{"id": "mock"}]},
        "/block/info": {"vllm": "0", "buffer": path, "nonce": int(buffer.header[b.NONCE])},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(views[self.path]).encode())

        def do_POST(self) -> None:
            tokens = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["max_tokens"]
            self.send_response(200)
            self.end_headers()
            for _ in range(tokens):
                time.sleep(TOKEN_S)
                self.wfile.write(b'data: {"choices":[{"text":"a"}]}\n\n')
            self.wfile.write(b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens)
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: Any) -> None: ...

    print(f"listening on {given['host']}:{given['port']}", flush=True)
    ThreadingHTTPServer((given["host"], int(given["port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
