"""Chat with Qwen-7B in the terminal, or pipe messages through it, one a line.

python cli_demo.py -c Qwen/Qwen-7B-Chat
printf 'What is the capital of France?\n' | python cli_demo.py -c demo

`:help` lists the commands; `::` begins a message that starts with a colon. In a pipe, replies go to stdout and
everything else to stderr, and the exit status is 1 if any line failed.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable

from prompt_toolkit.utils import is_dumb_terminal
from transformers.utils import logging

from cli.commands import handle_line
from cli.display import make_display
from cli.session import SEEDS, ChatSession
from cli.terminal import (
    LineInterrupt,
    find_state_dir,
    make_line_editor,
    read_plain_line,
    read_terminal_line,
    stop_on_interrupt,
)
from cli.texts import LANGUAGES, Texts, default_language
from tensor_parallel import ParallelQWen, is_leader
from utils import add_model_arguments, describe_placement, load_from_args, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="NO_COLOR=1 in the environment leaves colours out."
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("chat")
    group.add_argument("-s", "--seed", type=seed_number, metavar="N", help="makes a chat repeatable (default: random)")
    group.add_argument("--system", metavar="TEXT", help="system message (default: the checkpoint's)")
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest reply (default: the checkpoint's)")
    group.add_argument(
        "--prompt-lookup", type=positive, metavar="N",
        help="guess up to N tokens at a time from the prompt: faster where replies repeat it, same greedy replies",
    )  # fmt: skip
    group.add_argument(
        "--lang", choices=LANGUAGES, default=default_language(), help="interface language (default: locale)"
    )
    group.add_argument("--plain", action="store_true", help="show replies as they are: no Markdown, no colour")
    return parser.parse_args(argv)


def seed_number(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < SEEDS:
        raise argparse.ArgumentTypeError(f"must be from 0 to {SEEDS - 1}, not {text}")
    return seed


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def chat(session: ChatSession, read_line: Callable[[], str]) -> None:
    """Handle lines until they end or the user leaves: with a command, or with Ctrl-C twice in a row."""
    interrupted = False  # the last thing that happened was a Ctrl-C
    while not session.leaving:
        try:
            line = read_line()
        except EOFError:
            return
        except KeyboardInterrupt as interrupt:
            if interrupted and not isinstance(interrupt, LineInterrupt):
                return
            interrupted = True
            session.display.say(session.texts("hint_leave"), style="dim")
            continue
        try:
            session.stopped = False
            handle_line(session, line)
            interrupted = session.stopped
        except KeyboardInterrupt:  # the second one, while a reply was being stopped
            return


def answer_all(session: ChatSession) -> None:
    """Handle the lines of a pipe."""
    with contextlib.suppress(EOFError):
        while not session.leaving:
            handle_line(session, read_plain_line())


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a stray byte, or a terminal without Chinese, must not end the chat
    interactive = sys.stdin is not None and sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    texts = Texts(args.lang)
    display = make_display(args.plain, interactive)

    if is_leader():
        print(texts("loading", name=args.checkpoint_path), file=sys.stderr, flush=True)
    logging.set_verbosity_error()
    model, tokenizer = load_from_args(args)
    session = ChatSession(model, tokenizer, display, texts, system=args.system)
    if args.seed is not None:
        session.seed = args.seed
    if args.max_new_tokens is not None:
        session.config.max_new_tokens = args.max_new_tokens
    if args.prompt_lookup is not None:
        session.config.prompt_lookup_num_tokens = args.prompt_lookup

    greet(session, args.checkpoint_path, interactive)
    if not interactive:
        answer_all(session)
        return 1 if session.failures else 0
    if not isinstance(model, ParallelQWen):  # there torchrun ends all processes on Ctrl-C
        session.interruptible = stop_on_interrupt
    if is_dumb_terminal():
        chat(session, lambda: read_terminal_line(session))
    else:
        chat(session, make_line_editor(session, find_state_dir()))
    return 0


def greet(session: ChatSession, name: str, interactive: bool) -> None:
    """Say what was loaded, and what it is not."""
    say, texts = session.display.say, session.texts
    say(texts("greeting", name=name, placement=describe_placement(session.model)), style="dim")
    if name == "demo":
        say(texts("demo"), style="dim")
    if session.config.chat_format == "raw":
        say(texts("raw"), style="dim")
    if interactive:
        say(texts("keys"), style="dim")


if __name__ == "__main__":
    run_script(main)
