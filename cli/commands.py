"""The commands of the chat: one table, from which both `:help` and completion are made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen import QwenError
from qwen.chatml import build_prompt

from .session import SEEDS, ChatSession
from .settings import COMMON, SETTINGS, describe_setting, find_setting, nearest, parse_settings, show_value
from .transcript import Transcript, load_transcript, save_transcript

COLONS = (":", "\uff1a")  # the second is what a Chinese keyboard types


@dataclass(frozen=True)
class Command:
    """A handler, its other names, and the text key of its argument (without one it takes none).

    Its help is the text `help_NAME`. A handler raises QwenError for what the user got wrong.
    """

    run: Callable[[ChatSession, str], None]
    aliases: tuple[str, ...] = ()
    argument: str = ""
    required: bool = False

    def usage(self, name: str, session: ChatSession) -> str:
        """Its names and argument, as one types them."""
        names = ", ".join(f":{name}" for name in (name, *self.aliases))
        if not self.argument:
            return names
        argument = session.texts(f"argument_{self.argument}")
        return f"{names} {argument}" if self.required else f"{names} [{argument}]"


def handle_line(session: ChatSession, line: str) -> None:
    """Do what a line says: a command after one colon, a message to the model otherwise; `::` is a message's colon."""
    text = line.lstrip()
    if not text:
        return
    if not text.startswith(COLONS):
        session.ask(line)
    elif text.startswith(COLONS, 1):
        session.ask(text[1:])
    else:
        try:
            run_command(session, text[1:])
        except QwenError as error:
            session.fail(str(error))


def run_command(session: ChatSession, text: str) -> None:
    """Run a command, given without its colon; QwenError if there is no such command or it can't be done."""
    typed, _, argument = text.partition(" ") if " " in text.split("\n")[0] else text.partition("\n")
    typed, argument = typed.strip(), argument.strip()
    names = {alias: name for name, command in COMMANDS.items() for alias in (name, *command.aliases)}
    if typed.lower() not in names:
        close = nearest(typed.lower(), list(names), session.texts, before=":")
        raise QwenError(session.texts("unknown_command", name=f":{typed}", nearest=close))
    command = COMMANDS[names[typed.lower()]]
    if argument and not command.argument:
        raise QwenError(session.texts("no_argument", name=f":{typed}"))
    if command.required and not argument:
        raise QwenError(session.texts("missing_file", name=f":{typed}"))
    command.run(session, argument)


def show_help(session: ChatSession, argument: str) -> None:
    rows = [(command.usage(name, session), session.texts(f"help_{name}")) for name, command in COMMANDS.items()]
    session.display.table(rows)
    session.display.say(session.texts("help_input"))


def leave(session: ChatSession, argument: str) -> None:
    session.leaving = True


def clear_screen(session: ChatSession, argument: str) -> None:
    session.display.clear()


def clear_history(session: ChatSession, argument: str) -> None:
    count = len(session.history)
    session.history.clear()
    session.display.say(session.texts("history_cleared", count=count))


def show_history(session: ChatSession, argument: str) -> None:
    require_turns(session)
    for number, (query, reply) in enumerate(session.history, start=1):
        session.display.say(f"{number}> {query}", style="bold")
        session.display.say(reply or session.texts("empty_reply"))


def require_turns(session: ChatSession) -> None:
    if not session.history:
        raise QwenError(session.texts("no_turns"))


def show_or_set_seed(session: ChatSession, argument: str) -> None:
    if argument:
        if not (argument.isascii() and argument.isdigit() and len(argument) < 11 and int(argument) < SEEDS):
            raise QwenError(session.texts("bad_seed", limit=SEEDS - 1, value=argument))
        session.seed = int(argument)
    session.display.say(session.texts("seed", seed=session.seed))


def show_or_change_settings(session: ChatSession, argument: str) -> None:
    if "=" in argument:
        values = parse_settings(argument, session.texts)
        for name, value in values.items():
            setattr(session.config, name, value)
        show_settings(session, list(values))
        idle = [name for name, value in values.items() if SETTINGS[name].sampling and value is not None]
        if idle and not session.config.do_sample:
            session.display.say(session.texts("no_effect", names=", ".join(idle)), style="dim")
    elif argument:
        for name in argument.split():
            setting = find_setting(name, session.texts)
            show_settings(session, [name])
            session.display.say(describe_setting(setting, session.texts).strip(), style="dim")
    else:
        own = session.own_config()
        changed = [name for name in SETTINGS if getattr(session.config, name) != getattr(own, name)]
        show_settings(session, list(dict.fromkeys([*COMMON, *changed])))


def show_settings(session: ChatSession, names: list[str]) -> None:
    """Print settings, with the checkpoint's own value where it is another."""
    own = session.own_config()
    rows = []
    for name in names:
        value, before = show_value(getattr(session.config, name)), show_value(getattr(own, name))
        same = value == before
        rows.append((name, value if same else session.texts("setting_was", value=value, own=before)))
    session.display.table(rows)


def reset_settings(session: ChatSession, argument: str) -> None:
    session.config = session.own_config()
    session.display.say(session.texts("reset"))


def show_or_set_system(session: ChatSession, argument: str) -> None:
    if argument:
        session.system = argument
    session.display.say(session.texts("system", system=session.system))
    if session.config.chat_format == "raw":
        session.display.say(session.texts("system_unused"), style="dim")


def regenerate(session: ChatSession, argument: str) -> None:
    require_turns(session)
    session.regenerate()


def undo(session: ChatSession, argument: str) -> None:
    require_turns(session)
    query, _ = session.history.pop()
    session.display.say(session.texts("undone", query=query))


def save(session: ChatSession, argument: str) -> None:
    path = find_path(argument)
    save_transcript(path, Transcript(session.system, session.history))
    session.display.say(session.texts("saved", count=len(session.history), path=path))


def load(session: ChatSession, argument: str) -> None:
    path = find_path(argument)
    session.system, session.history = load_transcript(path)
    session.display.say(session.texts("loaded", count=len(session.history), path=path))


def find_path(argument: str) -> Path:
    """The path that was typed; `~` is the home directory."""
    if "\0" in argument:
        raise QwenError(f"{argument} is no file name: it holds a null byte")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise QwenError(f"{argument}: {error}") from error


def show_stats(session: ChatSession, argument: str) -> None:
    stats, config, texts = session.stats, session.config, session.texts
    last = texts("stats_none")
    if stats.replies:
        last = texts("stats_last_value", tokens=stats.last_tokens, rate=stats.last_rate, first=stats.last_first)
    prompt = build_prompt(
        session.tokenizer, "", session.history, session.system, config.max_window_size, config.chat_format
    )
    session_value = texts(
        "stats_session_value", replies=stats.replies, read=stats.tokens_read, written=stats.tokens_written
    )
    limit = session.model.config.max_context_length
    context = texts("stats_context_value", used=len(prompt.ids), window=config.max_window_size, limit=limit)
    session.display.table(
        [(texts("stats_last"), last), (texts("stats_session"), session_value), (texts("stats_context"), context)]
    )


COMMANDS = {
    "help": Command(show_help, aliases=("h",)),
    "exit": Command(leave, aliases=("quit", "q")),
    "clear": Command(clear_screen, aliases=("cl",)),
    "clear-his": Command(clear_history, aliases=("clh",)),
    "history": Command(show_history, aliases=("his",)),
    "seed": Command(show_or_set_seed, argument="number"),
    "conf": Command(show_or_change_settings, argument="pairs"),
    "reset-conf": Command(reset_settings),
    "system": Command(show_or_set_system, argument="text"),
    "regen": Command(regenerate),
    "undo": Command(undo),
    "save": Command(save, argument="file", required=True),
    "load": Command(load, argument="file", required=True),
    "stats": Command(show_stats),
}
