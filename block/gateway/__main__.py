"""Serve a gateway: ``python -m block.gateway scheduler=round_robin gateway.urls=[http://h1:8000,http://h2:8000]``.

Takes every key of run.py, and those of the node `gateway` (--cfg job shows them). Only the policy, `lengths` (if it
reads prompts), `dispatch`, `seed` and, for policies that forecast, what the latency model follows from (`model`,
`cluster`, `backend`) have an effect.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from block.cluster.instance import LaunchFailed
from block.core.paths import shipped
from block.dispatch import policy_checks
from block.dispatch.policies import Needs
from block.gateway.admission import Slo
from block.lengths import Reader
from block.run import cli, config, effects, hydra_schema
from block.run.config_errors import ConfigError, explain
from block.workload.prompts import load_tokenizer

if TYPE_CHECKING:  # what is wrong in a command is told before these are loaded
    from block.gateway.app import Gateway
    from block.gateway.groups import Plan
    from block.gateway.workers import Seat

PLANS = ("scheduler", "model", "cluster", "backend", "dispatch", "lengths", "engine", "seed", "gateway.tokenizer")
"""Keys that say how requests for a model are placed."""

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
    composed = {one.name: compose_for(one.name, one.keys) for one in wanted.models}
    for one in (settings, *composed.values()):
        rehearsed = policy_checks.with_checks(config.node(one.scheduler))  # not the one that will serve
        policy_checks.try_once(rehearsed, max(len(wanted.urls), 1))  # and so compiled before a request comes
    check_dispatch(run)
    needs = [run.policy.needs, *(config.build(one).policy.needs for one in composed.values())]
    if not wanted.plugin and set(needs) == {Needs.COUNTS}:
        raise ConfigError(f"gateway.plugin=False: has no effect, for scheduler={policy} looks at no server's state")
    if wanted.slo != Slo() and Needs.FORECAST not in needs:
        raise ConfigError(
            f"gateway.slo: has no effect, for scheduler={policy} makes no forecasts; take scheduler=block"
        )
    gateway = make_gateway(settings, composed)  # what is wrong with its files is told now
    from block.gateway import workers

    def listening(address: str) -> None:
        over = [*wanted.urls, *([wanted.urls_file] if wanted.urls_file is not None else [])]
        by = f"{policy}, {wanted.workers} workers" if wanted.workers > 1 else policy
        print(f"{address}: {by} over {', '.join(over) or 'no server yet'}", flush=True)

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    try:
        if wanted.workers == 1:
            serve(gateway, wanted.host, wanted.port, listening)
        else:
            from block.gateway import __main__ as named  # as which the worker's process can import it

            for_models = {name: OmegaConf.to_yaml(one) for name, one in composed.items()}
            job = partial(named.work, OmegaConf.to_yaml(settings), for_models)
            reopens = [signal.SIGHUP] if wanted.access_log not in (None, "-") else []
            workers.supervise(wanted.workers, job, wanted.host, wanted.port, listening, reopens)
    except workers.WorkerFailed as error:
        raise LaunchFailed(str(error)) from error
    except OSError as error:
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        key = f"gateway.host={wanted.host}" if unknown else f"gateway.port={wanted.port}"
        raise ConfigError(f"{key}: cannot listen on {wanted.host}: {error}") from error


def compose_for(name: str, keys: str) -> DictConfig:
    """The settings with these keys for a model in place of what the command says. ConfigError if they cannot be."""
    where = f"gateway.models: {name}"
    try:
        own = shlex.split(keys)
    except ValueError as error:
        raise ConfigError(f"{where}: {keys}: {error}") from error
    for key in own:
        if not key.startswith(PLANS):
            raise ConfigError(f"{where}: {key}: a model has only {', '.join(PLANS)} of its own")
    replaced = {"gateway.tokenizer", *(key.partition("=")[0] for key in own)}
    usual = [one for one in HydraConfig.get().overrides.task if one.partition("=")[0] not in replaced]
    try:
        settings = compose("config", overrides=[*usual, *own])
        run = config.build(settings)
    except (HydraException, ConfigError) as error:
        raise ConfigError(f"{where}: {explain(error)}") from error
    for line in effects.without_effect(settings, own, "gateway", run).values():
        raise ConfigError(f"{where}: {line}")
    check_dispatch(run)
    return settings


def check_dispatch(run: config.RunConfig) -> None:
    """ConfigError for what is for experiments only."""
    for key, off in (("forecast_noise", 0), ("dispatchers", 1)):
        if (value := getattr(run.dispatch, key)) != off:
            raise ConfigError(f"dispatch.{key}={value}: for experiments only; a gateway has {off}")


def make_gateway(settings: DictConfig, composed: Mapping[str, DictConfig], seat: Seat | None = None) -> Gateway:
    """What `settings` describe, with others for some models; seat: among other workers.

    ConfigError if a file or a model is of no use.
    """
    from block.gateway.app import Gateway

    try:
        plans = {name: make_plan(one) for name, one in composed.items()}
        return Gateway(config.node(settings.gateway), make_plan(settings), plans, seat)
    except ValueError as error:
        raise ConfigError(explain(error)) from error


def make_plan(settings: DictConfig) -> Plan:
    """How requests are placed. ValueError if what it takes is of no use."""
    from block.gateway.groups import Plan

    run = config.build(settings)
    latency = run.backend.latency(run.testbed) if run.policy.needs is Needs.FORECAST else None
    if run.policy.needs is not Needs.COUNTS and isinstance(run.lengths, Reader):
        try:
            run.lengths.predict([""])  # what is wrong with the estimator is told now; and it is loaded
        except OSError as error:
            raise ValueError(explain(error)) from error
    wanted = settings.gateway.tokenizer
    tokenizer = None if wanted is None else load_tokenizer(wanted, "gateway.tokenizer")
    return Plan(run.policy, run.dispatch, random.Random(run.seed), latency, run.lengths, tokenizer)


def serve(gateway: Gateway, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Have it serve, in this process, until SIGTERM or SIGINT. OSError if it cannot listen.

    listening: told the address once requests may come.
    """
    import uvloop

    from block.gateway.app import listen

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(listen(gateway, host, port, listening))


def work(
    described: str, for_models: Mapping[str, str], seat: Seat, port: int, listening: Callable[[str], None]
) -> None:
    """Be the worker in this seat. described, for_models: the settings, and those for some models, as YAML, for Hydra's
    classes have no name in this process.
    """
    settings, composed = _read(described), {name: _read(text) for name, text in for_models.items()}
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s worker {seat.index}: %(message)s")
    try:
        serve(make_gateway(settings, composed, seat), settings.gateway.host, port, listening)
    except ConfigError as error:  # a file that was sound when the first workers came
        sys.exit(f"worker {seat.index}: {error}")


def _read(text: str) -> DictConfig:
    return DictConfig(OmegaConf.create(text))


def command() -> int:
    """What the command line says; returns the exit code."""
    return cli.run_main(main)


if __name__ == "__main__":
    sys.exit(command())
