"""The one error whose message is written for the person at the keyboard."""


class QwenError(RuntimeError):
    """A user's mistake or a broken file, told in one sentence: what is wrong, where, and what to do.

    Entry points print the message and exit with a non-zero status; nothing else in the project does.
    """
