"""A tiny model behind a real server, for the tests of the API: random weights, Qwen's own vocabulary.

A question that begins with `say: ` is answered with the rest of it, token by token: replies that the tests need word
for word go through the engine like any other.
"""

import contextlib
import copy
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from transformers import GenerationConfig

from api import plan
from api.app import create_app
from api.connection import Connection
from api.grammar import Constraint
from api.server import Server, Settings
from qwen import QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.engine import Engine, Limits

SAY = "say: "


def tiny_model(**changes: Any) -> QWenLMHeadModel:
    """Two layers of random weights, quick but with Qwen-7B's vocabulary; it was "trained" on 64 tokens."""
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=151936, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, kv_channels=32,
        intermediate_size=128, seq_length=64, max_position_embeddings=1024, initializer_range=0.3, **changes,
    )  # fmt: skip
    model = QWenLMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 5  # so that some tokens are likelier than others
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643, 151644], do_sample=True, top_p=0.8)
    model.generation_config.chat_format = "chatml"
    model.use_cpu_kernels()
    return model


class Script(Constraint):
    """Leaves but one token to choose from at every step: those of a text, and the end."""

    def __init__(self, tokenizer: QWenTokenizer, text: str) -> None:
        self.tokens = [*tokenizer.encode_text(text), tokenizer.im_end_id]
        self.left_out = ()

    def copy(self) -> "Script":
        return copy.deepcopy(self)

    def allowed(self, device: torch.device, vocab_size: int) -> torch.Tensor:
        return torch.arange(vocab_size, device=device) == self.tokens[0]

    def push(self, token: int) -> None:
        self.tokens.pop(0)


def scripted(make_constraint: Any) -> Any:
    def make(server: Server, body: Any, *args: Any) -> Constraint | None:
        asked = [message.plain()["content"] for message in body.messages if message.role == "user"]
        constraint = make_constraint(server, body, *args)
        if asked and asked[-1].startswith(SAY):
            parts = asked[-1][len(SAY) :].split("||")  # one reply for each round
            rounds = sum(message.role in ("tool", "function") for message in body.messages)
            return Script(server.ready.tokenizer, parts[min(rounds, len(parts) - 1)])
        return constraint

    return make


@contextlib.contextmanager
def run_server(server: Server) -> Iterator[str]:
    """A server on a free port; gives its address."""
    original, plan.make_constraint = plan.make_constraint, scripted(plan.make_constraint)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(server), http=Connection, ws="none", log_level="warning", timeout_graceful_shutdown=5, lifespan="off"
    )
    live = uvicorn.Server(config)
    thread = threading.Thread(target=live.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not live.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        live.should_exit = True
        thread.join(20)
        listener.close()
        plan.make_constraint = original
        if server.engine is not None:
            server.engine.close()
            server.engine.join()


def make_server(tokenizer: QWenTokenizer, settings: Settings | None = None, limits: Limits | None = None) -> Server:
    server = Server(settings or Settings())
    limits = limits or Limits(max_batch=8, max_queue=16, kv_tokens=2048, chunk=16, timeout=60)
    server.attach(Engine(tiny_model(), tokenizer, limits, server.metrics))
    return server
