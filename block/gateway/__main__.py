"""Serve a gateway: ``python -m block.gateway scheduler=round_robin gateway.urls=[http://h1:8000,http://h2:8000]``.

Takes every key of run.py, and those of the node `gateway` (--cfg job shows them). Only the policy, `lengths` (if it
reads prompts), `dispatch`, `seed` and, for policies that forecast, what the latency model follows from (`model`,
`cluster`, `backend`) have an effect.
"""

import asyncio
import errno
import logging
import random
import socket
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from block.core.paths import shipped
from block.dispatch import policy_checks
from block.dispatch.policies import Needs
from block.gateway.admission import Slo
from block.lengths import Reader
from block.run import cli, config, effects, hydra_schema
from block.run.config_errors import ConfigError, explain
from block.workload.prompts import load_tokenizer

hydra_schema.register()


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")
def main(settings: DictConfig) -> None:
    """Run the gateway until SIGTERM or SIGINT."""
    cli.run_job(lambda: run_gateway(settings, HydraConfig.get().runtime.choices["scheduler"]))


def run_gateway(settings: DictConfig, policy: str) -> None:
    """Serve what `settings` describe. ConfigError if that cannot be; `policy` is what they call it."""
    run = config.build(settings)
    wanted = config.node(settings.gateway)
    effects.refuse(settings, "gateway", run)
    rehearsed = policy_checks.with_checks(config.node(settings.scheduler))  # not the one that will serve
    policy_checks.try_once(rehearsed, len(wanted.urls))  # and so compiled before a request comes
    for key, off in (("forecast_noise", 0), ("dispatchers", 1)):
        if (value := getattr(run.dispatch, key)) != off:
            raise ConfigError(f"dispatch.{key}={value}: for experiments only; a gateway has {off}")
    if not wanted.plugin and run.policy.needs is Needs.COUNTS:
        raise ConfigError(f"gateway.plugin=False: has no effect, for scheduler={policy} looks at no server's state")
    if wanted.slo != Slo() and run.policy.needs is not Needs.FORECAST:
        raise ConfigError(
            f"gateway.slo: has no effect, for scheduler={policy} makes no forecasts; take scheduler=block"
        )
    import uvloop

    from block.gateway import app

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    latency = run.backend.latency(run.testbed) if run.policy.needs is Needs.FORECAST else None
    if run.policy.needs is not Needs.COUNTS and isinstance(run.lengths, Reader):
        try:
            run.lengths.predict([""])  # what is wrong with the estimator is told now; and it is loaded
        except (OSError, ValueError) as error:
            raise ConfigError(explain(error)) from error
    try:
        tokenizer = load_tokenizer(wanted.tokenizer, "gateway.tokenizer") if wanted.tokenizer is not None else None
        chance = random.Random(run.seed)
        gateway = app.Gateway(wanted, run.policy, run.dispatch, chance, latency, run.lengths, tokenizer)
    except ValueError as error:
        raise ConfigError(explain(error)) from error

    def listening(address: str) -> None:
        servers = f"{len(wanted.urls)} server{'s' * (len(wanted.urls) != 1)}"
        print(f"{address}: {policy} over {servers}: {', '.join(wanted.urls)}", flush=True)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(app.listen(gateway, wanted.host, wanted.port, listening))
    except OSError as error:
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        key = f"gateway.host={wanted.host}" if unknown else f"gateway.port={wanted.port}"
        raise ConfigError(f"{key}: cannot listen on {wanted.host}: {error}") from error


def command() -> int:
    """What the command line says; returns the exit code."""
    return cli.run_main(main)


if __name__ == "__main__":
    sys.exit(command())
