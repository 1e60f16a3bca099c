"""`equipoise serve RUN --ray N`: N replicas behind Ray Serve, on the cluster of RAY_ADDRESS or one on this machine."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from equipoise.serve.replicas import Door, Replica, Weights
from equipoise.serve.server import ServerConfig

ADDRESS = "RAY_ADDRESS"
LOCAL_STORE = 128 * 2**20  # bytes of Ray's object store here: requests do not go through it
HEALTH_S, PATIENCE_S = 2.0, 30.0


@dataclass(frozen=True)
class Fleet:
    """num: of replicas, each with num_cpus. host, port: where Ray Serve listens. drain_s: that open requests get."""

    num: int
    host: str
    port: int
    drain_s: float
    num_cpus: float = 1.0


def serve_replicas(weights: Weights, config: ServerConfig, fleet: Fleet) -> int:
    """Deploy, and take it down again after SIGTERM or Ctrl-C. Raises ImportError without the extra, ValueError for what
    the cluster can't do."""
    ray, serve = _ray()
    if fleet.num < 1:
        raise ValueError(f"ray: expected 1 replica or more, got {fleet.num}")
    port = fleet.port or _free_port(fleet.host)
    asked = threading.Event()
    needs = {"num_cpus": fleet.num_cpus, "num_gpus": float(weights.device == "cuda")}
    with _cluster(ray, serve, fleet.num, needs):
        serve.start(proxy_location="HeadOnly", http_options={"host": fleet.host, "port": port})
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: asked.set())
        name = f"equipoise-{config.name}"
        if name in serve.status().applications:
            raise ValueError(f"ray: the cluster serves {name} already; end that first, or give another --name")
        try:
            serve.run(_application(serve, weights, config, fleet, needs), name=name, route_prefix="/")
            url = f"http://{fleet.host}:{port}"
            _reach(url)
            print(f"{config.name} at {url}/v1  ({fleet.num} replicas behind Ray Serve; Ctrl-C ends it)")
            print(f"metrics at {url}/metrics, records in {config.folder}", flush=True)
            asked.wait()
        finally:
            print(f"stopping: open requests get {fleet.drain_s:g} s", flush=True)
            serve.delete(name)
    print("stopped", flush=True)
    return 0


def _application(serve: Any, weights: Weights, config: ServerConfig, fleet: Fleet, needs: dict[str, float]) -> Any:
    limits = config.limits
    deployment = serve.deployment(
        serve.ingress(Door())(Replica),
        name="server",
        num_replicas=fleet.num,
        max_ongoing_requests=limits.max_running + limits.max_waiting,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=PATIENCE_S,
        graceful_shutdown_timeout_s=fleet.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options=needs,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    fresh = replace(
        config, folder=config.folder.resolve(), template=replace(config.template)
    )  # not compiled: it travels
    return deployment.bind(weights, fresh)


@contextmanager
def _cluster(ray: Any, serve: Any, num: int, needs: dict[str, float]) -> Iterator[None]:
    """A connection to the cluster that is named, or one of our own, on loopback, for as long as this lasts."""
    address = os.environ.get(ADDRESS, "")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=LOCAL_STORE,
            _node_ip_address="127.0.0.1",
        )
    try:
        there = ray.cluster_resources()
        for unit, each in (("CPU", needs["num_cpus"]), ("GPU", needs["num_gpus"])):
            if there.get(unit, 0.0) < num * each:
                raise ValueError(
                    f"ray: {num} replicas need {num * each:g} {unit}s, the cluster has {there.get(unit, 0.0):g}; ask "
                    "for fewer"
                )
        yield
    finally:
        if not address:  # a cluster of others keeps its Serve
            serve.shutdown()
        ray.shutdown()


def _reach(url: str) -> None:
    """Raises ValueError where Ray Serve listens somewhere else: on a cluster that has it, it stays where it was."""
    import httpx

    try:
        httpx.get(f"{url}/health/ready", timeout=PATIENCE_S).raise_for_status()
    except httpx.HTTPError as error:
        raise ValueError(
            f"ray: expected the replicas at {url}, got {type(error).__name__}; where the cluster runs Ray Serve "
            "already, --host and --port must be its own"
        ) from error


def _free_port(host: str) -> int:
    """Ray Serve takes no 0. Somebody else may take it in between; then Ray says so."""
    with socket.create_server((host.strip("[]"), 0)) as bound:
        return int(bound.getsockname()[1])


def _ray() -> tuple[Any, Any]:
    try:
        return import_module("ray"), import_module("ray.serve")
    except ImportError as error:
        raise ImportError("--ray needs Ray Serve, which is not installed; pip install 'equipoise[ray]'") from error
