"""A tiny random model behind a real server on loopback, and official clients for it."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import openai
import torch
import uvicorn

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.models.tokenizer import Tokenizer
from equipoise.routing import TopK
from equipoise.serve.api.app import create_app
from equipoise.serve.api.served import Counted, Served
from equipoise.serve.api.wire import patient_protocol, uvicorn_config
from equipoise.serve.engine import Engine
from equipoise.serve.loop import EngineLoop
from equipoise.serve.reference import answer
from equipoise.serve.request import Output, Request, Sampling

MAX_TOKENS = 256
EOT_ID = 256


def byte_tokenizer() -> Tokenizer:
    return Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})


def tiny_model() -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, hidden_dim=16, router=TopK(k=2))
    config = DecoderConfig(
        vocab_size=257, dim=32, num_layers=2, num_heads=2, hidden_dim=32, max_seq_len=MAX_TOKENS, moe=moe, init_std=0.3
    )
    return Decoder(config).eval()


@dataclass
class Running:
    """A server that runs, and what is behind it."""

    served: Served
    engine: Engine
    port: int
    counted: list[Counted]
    clients: contextlib.ExitStack

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
        return self.clients.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", **options))

    def idle(self) -> bool:
        """Whether nothing is open and all blocks are free; waits for it."""
        return wait_until(lambda: not self.engine.has_work and self.engine.pool.num_free == self.engine.pool.num_blocks)


def wait_until(condition, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def running(
    model: Decoder, *, engine=None, change=lambda served: served, start=True, http=None, **options
) -> Iterator[Running]:
    """A server with its own engine. change: of the `Served`. http: uvicorn's protocol. options: of the Engine."""
    tokenizer = byte_tokenizer()
    engine = engine or Engine(model, tokenizer, **{"num_blocks": 256, "block_size": 8} | options)
    loop = EngineLoop(engine)
    counted: list[Counted] = []
    served = Served(
        "tiny", loop, tokenizer, MAX_TOKENS, 1_700_000_000, layers=tuple(model.moe_layers), count=counted.append
    )
    served = change(served)
    bound = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = uvicorn.Server(
        uvicorn_config(
            create_app(served), served.bounds, http=patient_protocol(served.bounds, http), timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    if start:
        loop.start()
    try:
        assert wait_until(lambda: server.started)
        with contextlib.ExitStack() as clients:
            yield Running(served, engine, bound.getsockname()[1], counted, clients)
    finally:
        server.should_exit = True
        thread.join()
        if loop.state != "new":
            loop.stop()
        if hasattr(engine, "close"):
            engine.close()


def expected(model: Decoder, prompt: str | list[int], max_tokens=16, *, ignore_eos=False, **fields) -> Output:
    """What the slow twin says. fields: of Sampling, or of Request."""
    known = {each.name for each in dataclasses.fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in fields.items() if name in known})
    others = {name: value for name, value in fields.items() if name not in known}
    tokens = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt)
    stop_ids = others.pop("stop_ids", frozenset()) | (frozenset() if ignore_eos else {EOT_ID})
    request = Request("expected", tokens, max_tokens, sampling, stop_ids=stop_ids, **others)
    return answer(model, byte_tokenizer(), request)
