"""The one error whose message is written for the person at the keyboard, and how to quote another in it."""


class QwenError(RuntimeError):
    """A user's mistake or a broken file, told in one sentence: what is wrong, where, and what to do.

    Entry points print the message and exit with a non-zero status; nothing else in the project does.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if it has none: enough to quote in a sentence."""
    return str(error).strip().split("\n")[0] or type(error).__name__
