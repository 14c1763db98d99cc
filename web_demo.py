"""Chat with Qwen-7B in the browser; several people can at once.

python web_demo.py -c Qwen/Qwen-7B-Chat
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from api.launch import cache_tokens, check_model_arguments, listen
from qwen import QwenError
from qwen.engine import Engine, Limits
from utils import add_model_arguments, describe_placement, load_from_args, run_script

if TYPE_CHECKING:
    from web.page import ChatPage

LANGUAGES = sorted(path.stem for path in (Path(__file__).parent / "web" / "texts").glob("*.json"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    group = parser.add_argument_group("page")
    group.add_argument("--share", action="store_true", help="a public link through gradio's servers, for a while")
    group.add_argument("--inbrowser", action="store_true", help="open the page in the default browser")
    group.add_argument("--server-port", type=int, default=8000, metavar="PORT", help="0 takes a free one")
    group.add_argument("--server-name", default="127.0.0.1", metavar="HOST",
                       help="address to listen on; 0.0.0.0 is all, then set --auth (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-users", type=int, default=8, metavar="N",
                       help="replies at once; others wait and see their place (default: %(default)s)")  # fmt: skip
    group.add_argument("--auth", metavar="USER:PASSWORD", help="asked of whoever opens the page")
    group.add_argument("--lang", choices=LANGUAGES, help="interface language (default: the browser's)")
    group.add_argument("--kv-cache-gib", type=float, metavar="GIB",
                       help="memory for the chats (default: half of what is free, of a GPU 85%%)")  # fmt: skip
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    if args.max_users < 1:
        raise QwenError(f"--max-users {args.max_users} is too low: at least one")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise QwenError("--auth takes USER:PASSWORD")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_arguments(args)
    with listen(args.server_name, args.server_port) as probe:  # before the minutes of loading
        port = probe.getsockname()[1]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from web.page import ChatPage
        from web.replies import Replier
    except ImportError as error:
        raise QwenError(
            f"{error.name} is missing: pip install -c constraints.txt -r requirements_web_demo.txt"
        ) from None

    print(f"loading {args.checkpoint_path} ...", file=sys.stderr, flush=True)
    logging.set_verbosity_error()
    model, tokenizer = load_from_args(args)
    limits = Limits(max_batch=args.max_users, kv_tokens=cache_tokens(model, args.kv_cache_gib))
    engine = Engine(model, tokenizer, limits)
    print(
        f"{args.checkpoint_path}: {describe_placement(model)}; {limits.max_batch} replies at once, "
        f"context {engine.context:,} tokens",
        file=sys.stderr,
    )
    serve(ChatPage(Replier(engine), Path(args.checkpoint_path).name, args.lang), args, port)
    engine.close()
    engine.join()
    return 0


def serve(chat: "ChatPage", args: argparse.Namespace, port: int) -> None:
    """Serve the page until Ctrl-C or a signal to end."""
    page = chat.build()
    try:
        page.launch(
            share=args.share,
            inbrowser=args.inbrowser,
            server_name=args.server_name,
            server_port=port,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            footer_links=[],
            max_file_size="4mb",
            **chat.look(),
        )
    except OSError as error:
        raise QwenError(f"can't serve on {args.server_name}:{port} ({error}): choose another --server-port") from error
    print(f"serving at {page.local_url}", file=sys.stderr, flush=True)
    if args.share:
        shared = page.share_url or "no public link could be made: is gradio's server reachable?"
        print(f"shared at {shared}" if page.share_url else shared, file=sys.stderr, flush=True)
    if args.server_name not in ("127.0.0.1", "localhost", "::1") or args.share:
        if not args.auth:
            print("warning: whoever reaches this address can chat; set --auth", file=sys.stderr)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        while not ended.wait(1.0):  # with a timeout, because a bare wait ignores Ctrl-C on Windows
            pass
    page.close(verbose=False)


if __name__ == "__main__":
    run_script(main)
