"""Serve Qwen-7B-Chat to any OpenAI client: many at once, streams, tools, JSON schemas.

python openai_api.py -c Qwen/Qwen-7B-Chat
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

SERVER.md lists every parameter; http://127.0.0.1:8000/docs shows the protocol.
"""

import argparse
import base64
import logging
import os
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from api.app import create_app
from api.connection import Connection
from api.launch import cache_tokens, check_certificate, check_model_arguments, listen, listen_on_file
from api.server import Server, Settings
from qwen import QwenError
from qwen.engine import Engine, Limits
from utils import add_model_arguments, describe_placement, load_from_args, run_script

KEY_VARIABLE = "QWEN_API_KEY"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--server-name", default="127.0.0.1", metavar="HOST",
                       help="address to listen on; 0.0.0.0 is all, then set a key (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--server-port", type=int, default=8000, metavar="PORT", help="0 takes a free one (default: 8000)"
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="what clients call the model (default: from the checkpoint)"
    )
    group.add_argument("--alias", action="append", default=[], metavar="NAME", help="another name for it; repeatable")
    group.add_argument("--api-key", metavar="KEY", help=f"asked of clients; better kept in a file or in {KEY_VARIABLE}")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key a line; # begins a comment")
    group.add_argument("--api-auth", metavar="USER:PASSWORD", help="HTTP basic authentication instead of a key")
    group.add_argument("--cors-origin", action="append", default=[], metavar="URL",
                       help="let pages of this origin call the server from browsers; repeatable")  # fmt: skip
    group.add_argument("--root-path", default="", metavar="PATH", help="what a proxy in front puts before the paths")
    group.add_argument("--uds", type=Path, metavar="FILE", help="listen on a Unix socket instead of a port")
    group.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="serve HTTPS with this private key (PEM)")
    group.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="and this certificate (PEM)")
    group.add_argument("--lenient", action="store_true",
                       help="pass over parameters that nobody here knows, and name them in the log")  # fmt: skip
    group.add_argument("--log-json", action="store_true", help="log each request as a line of JSON")
    group.add_argument("--log-prompts", action="store_true", help="write what clients send to the log")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch", type=int, default=16, metavar="N", help="replies at once (default: %(default)s)")
    limits.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="requests that wait; more get status 429"
    )
    limits.add_argument("--kv-cache-gib", type=float, metavar="GIB",
                        help="memory for keys and values (default: half of what is free, of a GPU 85%%)")  # fmt: skip
    limits.add_argument("--chunk", type=int, default=128, metavar="N",
                        help="tokens of a prompt read between two steps of others (default: 128)")  # fmt: skip
    limits.add_argument("--max-new-tokens", type=int, default=1024, metavar="N",
                        help="longest reply where a request sets no limit (default: %(default)s)")  # fmt: skip
    limits.add_argument("--max-n", type=int, default=8, metavar="N", help="largest n (default: %(default)s)")
    limits.add_argument("--max-messages", type=int, default=1024, metavar="N", help="messages of a chat")
    limits.add_argument("--max-stored", type=int, default=256, metavar="N",
                        help="responses kept for previous_response_id, in memory; 0 keeps none")  # fmt: skip
    limits.add_argument("--max-body-mib", type=float, default=8.0, metavar="MIB", help="size of a request")
    limits.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for a request, waiting included"
    )
    limits.add_argument("--grace", type=float, default=30.0, metavar="SECONDS",
                        help="for running replies to end after Ctrl-C; a second one ends them")  # fmt: skip
    return parser.parse_args(argv)


def read_credentials(args: argparse.Namespace) -> list[str]:
    """The Authorization headers that are accepted."""
    keys = [key for key in (args.api_key, os.environ.get(KEY_VARIABLE)) if key]
    if args.api_key_file is not None:
        try:
            lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
            keys += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        except (OSError, UnicodeDecodeError) as error:
            raise QwenError(f"--api-key-file {args.api_key_file} can't be read: {error}") from error
        if not keys:
            raise QwenError(f"--api-key-file {args.api_key_file} is empty: write a key into it")
    credentials = [f"Bearer {key}" for key in keys]
    if args.api_auth is not None:
        if ":" not in args.api_auth:
            raise QwenError("--api-auth takes USER:PASSWORD")
        credentials.append(f"Basic {base64.b64encode(args.api_auth.encode()).decode()}")
    return credentials


def make_settings(args: argparse.Namespace) -> Settings:
    for name in ("max_batch", "max_queue", "chunk", "max_new_tokens", "max_n", "max_messages", "timeout"):
        if getattr(args, name) < (name != "max_queue"):
            raise QwenError(f"--{name.replace('_', '-')} {getattr(args, name)} is too low")
    check_model_arguments(args)
    check_certificate(args.ssl_keyfile, args.ssl_certfile)
    return Settings(
        model_name=args.model_name or Path(args.checkpoint_path).name,
        aliases=args.alias,
        credentials=read_credentials(args),
        cors_origins=args.cors_origin,
        max_body=int(args.max_body_mib * 2**20),
        max_messages=args.max_messages,
        max_stored=args.max_stored,
        max_n=args.max_n,
        max_new_tokens=args.max_new_tokens,
        log_prompts=args.log_prompts,
        log_json=args.log_json,
        lenient=args.lenient,
        root_path=args.root_path.rstrip("/"),
    )


class GracefulServer(uvicorn.Server):
    """Lets running replies end when it is told to stop, for a while."""

    def __init__(self, config: uvicorn.Config, server: Server, grace: float) -> None:
        super().__init__(config)
        self.server, self.grace = server, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.server.engine is not None:
            if not self.should_exit:
                print(f"finishing running replies, {self.grace:g} seconds at most; Ctrl-C ends them", file=sys.stderr)
                self.server.engine.close(self.grace)
            else:
                self.server.engine.close_now()
        super().handle_exit(sig, frame)


def load(
    args: argparse.Namespace, server: Server, uvicorn_server: uvicorn.Server, failures: list[BaseException]
) -> None:
    """Load the model while the server answers already, with status 503."""
    try:
        model, tokenizer = load_from_args(args)
        limits = Limits(
            args.max_batch, args.max_queue, cache_tokens(model, args.kv_cache_gib), args.chunk, args.timeout
        )
        engine = Engine(model, tokenizer, limits, server.metrics)
        server.attach(engine)
    except BaseException as error:  # the main thread tells of it
        failures.append(error)
        uvicorn_server.should_exit = True
        return
    print(
        f"{server.settings.model_name}: {describe_placement(model)}; {limits.max_batch} replies at once, "
        f"context {engine.context:,} tokens, memory for {limits.kv_tokens:,}",
        file=sys.stderr,
    )


def log_lines_alone(name: str) -> None:
    """Let a logger write its messages as they are."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = make_settings(args)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    listener = listen_on_file(args.uds) if args.uds else listen(args.server_name, args.server_port)
    server = Server(settings)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    if args.log_json:
        log_lines_alone("qwen.access")
    config = uvicorn.Config(
        create_app(server), http=Connection, ws="none", log_config=None, access_log=False,
        timeout_graceful_shutdown=int(args.grace) + 5, ssl_keyfile=args.ssl_keyfile, ssl_certfile=args.ssl_certfile,
    )  # fmt: skip
    uvicorn_server = GracefulServer(config, server, args.grace)
    failures: list[BaseException] = []
    threading.Thread(
        target=load, args=(args, server, uvicorn_server, failures), daemon=True, name="qwen-loader"
    ).start()
    scheme = "https" if args.ssl_certfile else "http"
    host, port = ("", 0) if args.uds else listener.getsockname()[:2]
    address = f"{scheme}+unix://{args.uds}" if args.uds else f"{scheme}://{host}:{port}"
    print(f"serving {settings.model_name} at {address}/v1 (the model is loading)", file=sys.stderr, flush=True)
    if host not in ("127.0.0.1", "::1", "") and not settings.credentials:
        print("warning: whoever reaches this address is served; set --api-key", file=sys.stderr)
    uvicorn_server.run(sockets=[listener])
    if failures:
        raise failures[0]
    return 0


if __name__ == "__main__":
    run_script(main)
