"""GatewayConfig: where the gateway listens, and what is behind it (the node `gateway`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from block.engine.config import EngineConfig
from block.gateway.admission import Slo
from block.gateway.urls import every_address, is_host, is_url, server_url


@dataclass(frozen=True)
class ModelKeys:
    """How requests for a model are placed: its `name`, as servers call it, and the `keys` of its policy and latency
    model (`scheduler`, `model`, `cluster` …), as on the command line.
    """

    name: str
    keys: str


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway, `python -m block.gateway` (one Hydra node).

    urls: the model servers. Each address of the name in dns+http://name:port is one. urls_file: a file with more of
        them, one a line. discovery_interval_s: how often names and files, those of keys too, are looked at; null: 5, or
        1 with several workers.
    host, port: where to listen.
    api_key_file, admin_key_file: files with keys, one a line, of which clients, and who changes servers or their list,
        have to show one; null: clients need none, and the list cannot be changed. server_key_file: with the key that
        servers want. ca_file: with certificates of the authorities that https servers are to be trusted by; null: the
        system's.
    workers: processes that serve there, each with a part of the connections; each is a dispatcher of its own.
    expected_output_tokens: response length that policies assume where none is estimated. A request's own limit caps
        both. length_feedback: whether what is thought of responses is corrected by those that have finished.
    estimate_timeout_s: how long a request waits for its estimate before it goes by that.
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
    models: for some models, keys in place of those of the command.
    slo: objectives, and what is done about requests that would miss them.
    admin: whether clients may change servers (`/sleep`, `/v1/load_lora_adapter` …), all of them at once.
    access_log: file to which each request adds a line; "-": standard output; null: none.
    otlp_traces_endpoint: where a collector takes traces, as vLLM's option of that name has it; null: there are none.
    """

    urls: tuple[str, ...] = ()
    urls_file: str | None = None
    discovery_interval_s: float | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    expected_output_tokens: int = 256
    length_feedback: bool = True
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
    api_key_file: str | None = None
    admin_key_file: str | None = None
    server_key_file: str | None = None
    ca_file: str | None = None
    admin: bool = False
    access_log: str | None = None
    otlp_traces_endpoint: str | None = None
    models: tuple[ModelKeys, ...] = ()
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        urls = tuple(server_url(url, "gateway.urls") for url in self.urls)  # Hydra passes a list
        object.__setattr__(self, "urls", urls)
        if not (urls or self.urls_file or self.admin_key_file):
            raise ValueError("gateway.urls=[]: give at least one, such as [http://host:8000]")
        for url in urls:
            if urls.count(url) > 1:
                raise ValueError(f"gateway.urls={url}: given twice")
        files = self.urls_file, self.api_key_file, self.admin_key_file
        if self.discovery_interval_s is not None and not any(files) and not any(map(every_address, urls)):
            given = f"gateway.discovery_interval_s={self.discovery_interval_s}"
            raise ValueError(f"{given}: has no effect without gateway.urls_file, a key file or dns+http://name:port")
        https = self.urls_file or self.admin_key_file or any(url.startswith("https:") for url in urls)
        if self.ca_file is not None and not https:
            raise ValueError(f"gateway.ca_file={self.ca_file}: has no effect, for no server is of https")
        if not is_host(self.host):
            raise ValueError(f"gateway.host={self.host}: must be a name or an address, such as 0.0.0.0")
        if not 0 <= self.port < 65536:
            raise ValueError(f"gateway.port={self.port}: must be between 1 and 65535, or 0 for any that is free")
        for key in ("workers", "expected_output_tokens", "max_body_mib", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"gateway.{key}={getattr(self, key)}: must be at least 1")
        for key in ("max_num_seqs", "max_num_batched_tokens"):
            if self.plugin and getattr(self, key) is not None:
                raise ValueError(f"gateway.{key}={getattr(self, key)}: servers tell it; it is for gateway.plugin=false")
        if self.workers > 1 and not self.plugin:
            known = "what servers without the plugin do is known to one that sends all requests"
            raise ValueError(f"gateway.workers={self.workers}: {known}; take 1")
        if self.tokenizer is None and self.tokenize_timeout_s is not None:
            given = f"gateway.tokenize_timeout_s={self.tokenize_timeout_s}"
            raise ValueError(f"{given}: has no effect without gateway.tokenizer")
        for key in [one for one in vars(self) if one.endswith(("_timeout_s", "_interval_s", "_floor_s", "_factor"))]:
            given_s = getattr(self, key)
            if given_s is not None and not 0 < given_s < math.inf:
                raise ValueError(f"gateway.{key}={getattr(self, key)}: must be greater than 0")
        names = [one.name for one in self.models]
        for name in names:
            if not name or names.count(name) > 1:
                raise ValueError(f"gateway.models.name={name}: must be a name of a model, given once")
        if self.access_log == "":
            raise ValueError("gateway.access_log=: must be a file, or - for standard output")
        if (endpoint := self.otlp_traces_endpoint) is not None and not is_url(endpoint, ("http", "https", "grpc")):
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
