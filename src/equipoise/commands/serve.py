"""The command `equipoise serve`: its arguments, sockets and signals. What it serves is put together in serve/server.py.

The public port has the API, /metrics and the dashboard; the admin port listens on this machine only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from equipoise.disk.files import free_folder
from equipoise.monitor.profiles import Profile
from equipoise.monitor.sinks.options import NOWHERE, Alerts, delivering
from equipoise.recovery.policy import PolicyName

if TYPE_CHECKING:
    import torch

    from equipoise.models.run_files import Loaded
    from equipoise.serve.server import Server, ServerConfig
    from equipoise.small import SmallConfig

    Load = Callable[[Path, torch.dtype | None], Loaded]

API_PATHS = ("/v1", "/tokenize", "/detokenize", "/health", "/openapi.json", "/equipoise/")
Dtype = Literal["auto", "fp32", "bf16"]
ExpertPrecision = Literal["full", "int8", "int4", "int4-32", "int4-64", "int4-128"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve it."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs --keys-file."""
    port: int = 8000
    """Of the API, /metrics and the dashboard; 0 takes any that is free."""
    admin_port: int = 8001
    """Of the operators' verbs, on this machine only; 0 takes any that is free."""
    name: str | None = None
    """Of the model in the API; the run folder's name if none is given."""
    out: Path | None = None
    """Folder of the server's own records. Default: the first of RUN/serving, RUN/serving-2, ... that is free."""
    keys_file: Path | None = None
    """API keys, one a line; clients must bring one. EQUIPOISE_API_KEYS works too."""
    token_file: Path | None = None
    """Token of the dashboard, needed where --host is reachable; without it there is no dashboard there."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU where there is one and the experts are in full precision."""
    dtype: Dtype = "auto"
    """Of the weights; auto is what the checkpoint has. Routers stay fp32."""
    expert_precision: ExpertPrecision = "full"
    """Weights of the experts: full as they were trained; int8, a quarter of float32 or half of bfloat16; int4, about
    half of int8, with a scale per 32, 64 (int4) or 128 weights. Smaller groups are larger in all, and more exact."""
    expert_memory: str | None = None
    """Keep at most so many bytes of experts in memory, such as 64M, and read the others from the disk when tokens go to
    them: for models larger than the memory. Answers are the same, and slower; all in memory if none is given."""
    expert_cache: Literal["lru", "lfu"] = "lru"
    """With --expert-memory: who makes room, the expert that was not used for the longest time, or the least used."""
    expert_prefetch: bool = True
    """With --expert-memory: read ahead what the next layer will probably want, in a thread."""
    threads: int | None = None
    """That compute; all of torch's but one if none is given: where answers wait for a core, so do all threads."""
    cache_gb: float = 1.0
    """Memory for keys and values."""
    max_running: int = 64
    """Requests in a batch; more wait."""
    max_waiting: int = 256
    """Requests in the queue; more get 429 and when to try again."""
    tokens_per_step: int = 512
    """Tokens in one forward, prompts and answers together."""
    max_seconds: float | None = None
    """Of one request, from its arrival: then its answer ends as it is. A request may ask for less; none for no end."""
    decode_batch: int | None = None
    """Answers that go on in one step; all of them if none is given."""
    group_by_experts: bool = False
    """With --decode-batch: prefer answers whose last tokens went to the same experts."""
    prefix_reuse: bool = True
    """Use keys and values of prompts that begin alike again."""
    recover: bool = False
    """Repair a router in trouble, not only propose to."""
    policy: PolicyName = "ladder"
    """Which repairs, in which order."""
    lift_after_s: float = 600.0
    """With --recover: seconds in health after which a kept repair is lifted on trial; 0 for never."""
    profile: Profile = "relative"
    """Which rules judge the routing."""
    flush_s: float = 2.0
    """Seconds between two looks at the routing."""
    breaker: bool = True
    """Bypass a layer's experts while they are too slow, where something can stand in for them."""
    breaker_by: Literal["layer", "expert"] = "layer"
    """What the breaker times and shuts: a layer's experts together, or each, which computes them one by one."""
    detail: Literal["summary", "layer", "expert"] = "layer"
    """Of the experts' metrics for Prometheus."""
    drain_s: float = 30.0
    """Seconds that open requests get after SIGTERM or Ctrl-C."""
    ray: int | None = None
    """So many replicas behind Ray Serve, on the cluster of RAY_ADDRESS or one on this machine; without admin port,
    dashboard and --alerts. Needs the extra `ray`."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Where the experts are, under torchrun: experts on all ranks, everything else on the first."""

    expert: int = 1
    """Processes that share the experts of each layer, as many as torchrun starts."""
    placement: Path | None = None
    """Which rank holds what, as `equipoise place` plans it; default: consecutive experts."""
    payload: Literal["as_is", "bf16", "int8", "fp8"] = "as_is"
    """What rows look like on their way to the experts."""
    timeout_s: float = 600.0
    """Seconds until a rank that does not answer is lost, and the server ends."""


def serve(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    options: Annotated[ServeOptions, tyro.conf.OmitArgPrefixes] = ServeOptions(),
    alerts: Alerts = NOWHERE,
    parallel: RankOptions = RankOptions(),
) -> int:
    """Serve a model that was trained here: an OpenAI-compatible API, with the router under watch.

    For example: equipoise serve runs/demo

    Experts that are more than one process's memory are shared by several: torchrun --nproc-per-node 4 -m equipoise
    serve runs/demo --parallel.expert 4

    Then, from another terminal:
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"model":"demo","prompt":"The"}'

    Args:
        run: A run folder (its newest whole checkpoint), or a checkpoint in one.
        alerts: Where alerts and repairs go, beside the server's own records.
        parallel: How the model is spread over processes.
    """
    if parallel != RankOptions() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from equipoise.commands.serve_ranks import serve_over_ranks

        return serve_over_ranks(run, options, parallel, alerts)
    from equipoise.serve.server import Server

    if options.ray is not None and (options.expert_precision != "full" or options.expert_memory is not None):
        raise ValueError("ray: replicas serve experts as they were trained; leave out --ray, or the options of experts")
    if options.ray is not None and alerts != NOWHERE:
        raise ValueError(
            "alerts: replicas would answer for each other; leave out --ray, or --alerts and have Prometheus tell"
        )
    if sys.stderr.isatty():  # of a large model both take a while
        print(f"loading {run}", file=sys.stderr)
    loaded, config = prepare(run, options)
    if options.ray is not None:
        from equipoise.commands.serve_ray import Fleet, serve_replicas
        from equipoise.serve.replicas import Weights

        weights = Weights(run.resolve(), options.dtype, loaded.model.embed_tokens.weight.device.type)
        del loaded  # it can be served: that was the question
        fleet = Fleet(options.ray, options.host, options.port, options.drain_s)
        return serve_replicas(weights, config, fleet)
    if sys.stderr.isatty():
        print("measuring its health on held-out text, making stand-ins for its experts", file=sys.stderr)
    with delivering(alerts, config.folder, partial(print, flush=True), config.name) as sinks:
        return Front(Server(loaded, config, os.environ, sinks), options).run()


def prepare(run: Path, options: ServeOptions, load: Load | None = None) -> tuple[Loaded, ServerConfig]:
    """The model, and everything that can be wrong with the options, before anything listens.

    load: of a run, in a type; None loads all of it into this process.
    """
    import torch

    from equipoise.models.device import pick_device
    from equipoise.models.dtypes import dtype_of
    from equipoise.serve.api.served import Bounds
    from equipoise.serve.api.template import read_template
    from equipoise.serve.care import CareConfig
    from equipoise.serve.scheduler import Limits
    from equipoise.serve.server import ServerConfig
    from equipoise.small import load_small

    small = _small(options)
    device = pick_device("cpu" if options.device == "auto" and not small.is_plain else options.device)
    keys = _keys(options)
    limits = Limits(
        max_running=options.max_running,
        tokens_per_step=options.tokens_per_step,
        max_waiting=options.max_waiting,
        decode_batch=options.decode_batch,
        group_by_experts=options.group_by_experts,
    )
    care = CareConfig(
        flush_s=options.flush_s,
        profile=options.profile,
        recover=options.recover,
        policy=options.policy,
        lift_after_s=options.lift_after_s,
        breaker_by=options.breaker_by,
    )
    if not options.breaker:
        care = replace(care, breaker=None)
    if options.max_seconds is not None and not options.max_seconds > 0:
        raise ValueError(f"max_seconds: expected more than 0, got {options.max_seconds:g}; leave it out for no end")
    torch.set_num_threads(compute_threads(options.threads, torch.get_num_threads()))
    dtype = dtype_of(options.dtype)
    loaded = load(run, dtype) if load is not None else load_small(run, small, dtype=dtype, device=device).loaded
    config = ServerConfig(
        name=options.name or loaded.folder.resolve().name,
        folder=options.out or free_folder(loaded.folder / ("serving" if options.ray is None else "serving-ray")),
        cache_gb=options.cache_gb,
        prefix_reuse=options.prefix_reuse,
        limits=limits,
        care=care,
        detail=options.detail,
        keys=keys,
        template=read_template(loaded.folder, loaded.tokenizer.controls),
        bounds=Bounds(answer_seconds=options.max_seconds),
    )
    return loaded, config


def _keys(options: ServeOptions) -> tuple[str, ...]:
    """Of the API. Raises ValueError where others reach the server and there are none."""
    from equipoise.dashboard.access import is_loopback
    from equipoise.serve.api.access import read_keys

    keys = read_keys(options.keys_file, os.environ)
    if not keys and not is_loopback(options.host):
        raise ValueError(
            f"host: {options.host} can be reached from other machines, and there are no API keys; leave out --host for "
            "this machine only, or add --keys-file"
        )
    return keys


def _small(options: ServeOptions) -> SmallConfig:
    """How the experts are kept. Raises ValueError for memory that is none."""
    from equipoise.small import SmallConfig, bytes_of

    memory = None if options.expert_memory is None else bytes_of(options.expert_memory)
    return SmallConfig(options.expert_precision, memory, options.expert_cache, options.expert_prefetch)


def compute_threads(asked: int | None, there: int) -> int:
    """How many threads compute. there: as many as torch would take. Raises ValueError for none.

    A product is done when the last of its threads is, so one that shares its core with the HTTP side holds up all.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"threads: expected at least 1, got {asked}; leave it out for all cores but one")
    return max(1, there - 1) if asked is None else asked


class Front:
    """The sockets of one server, until a signal."""

    def __init__(self, server: Server, options: ServeOptions) -> None:
        self._server, self._options = server, options
        self._asked = threading.Event()
        self._failed: list[BaseException] = []

    def end(self) -> None:
        """As a signal does. From any thread."""
        self._asked.set()

    def run(self) -> int:
        """Serve until SIGTERM or Ctrl-C, then finish what is open. A second signal ends it at once."""
        import uvicorn

        from equipoise.dashboard.server import address, bind
        from equipoise.serve.api.wire import uvicorn_config

        options, bounds = self._options, self._server.config.bounds
        public, admin = bind(options.host, options.port), bind("127.0.0.1", options.admin_port)
        port, admin_port = public.getsockname()[1], admin.getsockname()[1]
        app = Public(self._server, self._dashboard(port), admin_port)
        configs = [uvicorn_config(app, bounds, lifespan="on", ws="auto")]
        admin_app = self._server.admin_app()
        if admin_app is not None:
            configs.append(uvicorn_config(admin_app, bounds))
        servers = [uvicorn.Server(config) for config in configs]
        self._catch_signals()
        self._server.start()
        thread = threading.Thread(target=self._listen, args=(servers, [public, admin]), name="http", daemon=True)
        thread.start()
        self._announce(address(options.host, port, None), f"http://127.0.0.1:{admin_port}/admin")
        self._asked.wait()
        code = self._drain(servers, thread)
        if self._failed:
            raise self._failed[0]
        return code

    def _listen(self, servers: list[Any], sockets: list[Any]) -> None:
        async def both() -> None:
            await asyncio.gather(*(each.serve(sockets=[one]) for each, one in zip(servers, sockets, strict=False)))

        try:
            asyncio.run(both())
        except BaseException as error:
            self._failed.append(error)
        finally:
            self._asked.set()

    def _drain(self, servers: list[Any], thread: threading.Thread) -> int:
        number = self._server.loop.progress().num_open
        print(f"stopping: {number} open requests get {self._options.drain_s:g} s", flush=True)
        finished = self._server.stop(self._options.drain_s)
        for each in servers:
            each.should_exit = True
        thread.join(10.0)
        print("stopped" if finished else "stopped; some requests were cut off", flush=True)
        return 0 if finished else 1

    def _catch_signals(self) -> None:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: object) -> None:
            for each, handler in before.items():
                signal.signal(each, handler)
            self._asked.set()

        for number in before:
            signal.signal(number, note)

    def _dashboard(self, port: int) -> Any | None:
        """The pages; None, with the reason said, where they can't be shown."""
        from equipoise.dashboard.access import Access, is_loopback, read_token

        path = self._options.token_file
        token = None if path is None else read_token(path)
        if token is None and not is_loopback(self._options.host):
            print("no dashboard: --host can be reached from other machines; add --token-file", file=sys.stderr)
            return None
        try:
            from equipoise.dashboard.server import build_app

            # NiceGUI looks at every object for its server, torch's deprecated ones too
            warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op", category=FutureWarning)
            return build_app([self._server.config.folder, self._server.loaded.folder], Access(token, port))
        except ImportError as error:
            print(f"no dashboard: {error}", file=sys.stderr)
            return None

    def _announce(self, url: str, admin: str) -> None:
        server = self._server
        print(f"{server.config.name} at {url}v1  (weights of {server.loaded.checkpoint.name}; Ctrl-C ends it)")
        print(f"dashboard at {url}  metrics at {url}metrics")
        for line in server.experts_kept():
            print(line)
        if server.care is not None:
            print(f"admin at {admin}, token in {server.config.folder / 'admin_token'}")
            for note in server.care.notes:
                print(f"note: {note}")
        sys.stdout.flush()


class Public:
    """The application of the public port: the API, the metrics, and pages for whatever else is asked for."""

    def __init__(self, server: Server, dashboard: Any | None, admin_port: int | None) -> None:
        self._server, self._api, self._dashboard = server, server.public_app(admin_port), dashboard

    async def __call__(self, scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Hand it to whom it is for."""
        from equipoise.serve.metrics import send_exposition

        path = scope.get("path", "")
        if scope["type"] == "http" and path == "/metrics":
            await send_exposition(send, *await asyncio.to_thread(self._server.metrics_text))
        elif scope["type"] == "http" and (path.startswith(API_PATHS) or self._dashboard is None):
            await self._api(scope, receive, send)
        elif self._dashboard is not None:
            await self._dashboard(scope, receive, send)
        else:
            await self._api(scope, receive, send)
