"""GatewayConfig: where the gateway listens, and what is behind it (the node `gateway`)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from block.engine.config import EngineConfig
from block.gateway.admission import Slo


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway, `python -m block.gateway` (one Hydra node).

    urls: the model servers. host, port: where to listen.
    expected_output_tokens: response length that policies assume where none is estimated. A request's own limit caps
        both. estimate_timeout_s: how long a request waits for its estimate before it goes by that.
    tokenizer: name or folder of the model's, so that prompts are counted, and looked up in prefix caches, by their
        tokens; null: by the bytes of their text. tokenize_timeout_s: how long a request waits for that; null: 0.2.
    probe_interval_s: how often a server that was ejected is asked whether it is well again. models_interval_s: how
        often one that is well is asked which models it serves.
    hang_floor_s, hang_factor: a server that has requests and is silent for the first is asked whether it is well; its
        step in flight, or its first byte, may take the second times what was to be expected, and the first, more.
    connect_timeout_s: a server that takes longer to accept a connection is gone.
    read_timeout_s: longest silence of a server before its request fails.
    grace_s: how long requests may go on after SIGTERM. max_body_mib: largest request body.
    plugin: whether servers have this package's plugin, if the policy looks at them; false: what they do is modelled by
        what this gateway sends to them. max_num_seqs, max_num_batched_tokens: of servers without it, as vLLM has them;
        null: 256 and 2048.
    slo: objectives, and what is done about requests that would miss them.
    admin: whether clients may change servers (`/sleep`, `/v1/load_lora_adapter` …), all of them at once.
    access_log: file to which each request adds a line; "-": standard output; null: none.
    otlp_traces_endpoint: where a collector takes traces, as vLLM's option of that name has it; null: there are none.
    """

    urls: tuple[str, ...] = ()
    host: str = "0.0.0.0"
    port: int = 8080
    expected_output_tokens: int = 256
    estimate_timeout_s: float = 0.05
    tokenizer: str | None = None
    tokenize_timeout_s: float | None = None
    probe_interval_s: float = 1.0
    models_interval_s: float = 5.0
    hang_floor_s: float = 1.0
    hang_factor: float = 4.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 600.0
    grace_s: float = 30.0
    max_body_mib: int = 64
    plugin: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    admin: bool = False
    access_log: str | None = None
    otlp_traces_endpoint: str | None = None
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        urls = tuple(url.rstrip("/") for url in self.urls)  # Hydra passes a list
        object.__setattr__(self, "urls", urls)
        if not urls:
            raise ValueError("gateway.urls=[]: give at least one, such as [http://host:8000]")
        for url in urls:
            if not _is_server(url):
                raise ValueError(f"gateway.urls={url}: must be of the form http://host:port or https://host:port")
            if urls.count(url) > 1:
                raise ValueError(f"gateway.urls={url}: given twice")
        if not _is_host(self.host):
            raise ValueError(f"gateway.host={self.host}: must be a name or an address, such as 0.0.0.0")
        if not 0 <= self.port < 65536:
            raise ValueError(f"gateway.port={self.port}: must be between 1 and 65535, or 0 for any that is free")
        for key in ("expected_output_tokens", "max_body_mib", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"gateway.{key}={getattr(self, key)}: must be at least 1")
        for key in ("max_num_seqs", "max_num_batched_tokens"):
            if self.plugin and getattr(self, key) is not None:
                raise ValueError(f"gateway.{key}={getattr(self, key)}: servers tell it; it is for gateway.plugin=false")
        if self.tokenizer is None and self.tokenize_timeout_s is not None:
            given = f"gateway.tokenize_timeout_s={self.tokenize_timeout_s}"
            raise ValueError(f"{given}: has no effect without gateway.tokenizer")
        for key in [one for one in vars(self) if one.endswith(("_timeout_s", "_interval_s", "_floor_s", "_factor"))]:
            given_s = getattr(self, key)
            if given_s is not None and not 0 < given_s < math.inf:
                raise ValueError(f"gateway.{key}={getattr(self, key)}: must be greater than 0")
        if self.access_log == "":
            raise ValueError("gateway.access_log=: must be a file, or - for standard output")
        if (endpoint := self.otlp_traces_endpoint) is not None and not _is_server(endpoint, ("http", "https", "grpc")):
            forms = "http://host:4317 (gRPC), or http://host:4318/v1/traces (http/protobuf)"
            raise ValueError(f"gateway.otlp_traces_endpoint={endpoint}: must be of the form {forms}")
        if not 0 <= self.grace_s < math.inf:
            raise ValueError(f"gateway.grace_s={self.grace_s}: must be 0 or more seconds")

    def assumed(self) -> EngineConfig:
        """What engines without the plugin are like, where they do not tell."""
        return EngineConfig(
            "v1",
            max_num_seqs=self.max_num_seqs or 256,
            max_num_batched_tokens=self.max_num_batched_tokens or 2048,
            enable_prefix_caching=True,
        )


def _is_server(url: str, schemes: Sequence[str] = ("http", "https")) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = not (parts.username or "?" in url or "#" in url) and port != 0
    sound = _is_host(parts.hostname or "") and _PATH.fullmatch(parts.path) is not None
    return parts.scheme in schemes and plain and sound


def _is_host(name: str) -> bool:
    """Whether it can be looked up, or is an address."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return _HOST.fullmatch(name) is not None


_HOST = re.compile(r"[\w.:%-]+")
_PATH = re.compile(r"[!$-;=@-\[\]_a-z~]*")  # what may stand in the first line of a request
