"""The measurements for a GPU start and end, with small layers, on a GPU that is not there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pretended_gpu
import qwen.int4
from benchmarks import bench_gpu
from qwen import QwenError


@pytest.fixture(scope="module")
def on_cuda() -> Iterator[Callable]:
    with pretended_gpu.process("cuda") as call:
        yield call


def measured(kind: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen.int4, "triton_works", lambda *_: False)  # Triton's interpreter takes its time
        return bench_gpu.measure_steps(kind, [1, 2], tiny=True)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_steps_are_measured_at_once_and_recorded(on_cuda: Callable, kind: str) -> None:
    found = on_cuda(measured, kind)
    assert found["device"] == "Pretended GPU" and set(found["rows"]) == {1, 2}
    for figures in found["rows"].values():
        assert all(figures[name] > 0 for name in ("prefill", "eager", "graph", "graph_share", "prefill_share", "peak"))
    assert found["rows"][2]["peak"] > found["rows"][1]["peak"]


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(QwenError, match="finds no NVIDIA GPU here"):
        bench_gpu.main([])


def test_what_has_no_time_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert bench_gpu.main(["--tiny", "--seconds", "1", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("left out: no time") == len(bench_gpu.PARTS)


@pytest.mark.slow
def test_every_part_ends(tmp_path: Path) -> None:
    parts = ["bf16", "int4", "serving", "lora"]
    assert bench_gpu.main(["--tiny", "--output", str(tmp_path), "--rows", "1", "2", "--parts", *parts]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| int4 | 2 | " in table and "| openai_api.py | 2 | " in table and "| ours: packs" in table
