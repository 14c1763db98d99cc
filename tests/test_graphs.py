"""Recorded decode steps: their inputs are filled right for any rows. The recording itself needs a GPU (marked)."""

from types import SimpleNamespace

import pytest
import torch
from paged import Steps

import golden
from qwen import QWenLMHeadModel
from qwen.graphs import DecodeGraphs, Recorded
from qwen.paged_attention import PagedStep
from qwen.pages import PagePool, layer_devices

LENGTHS = (150, 66, 7)


class Replayed(DecodeGraphs):
    """On a CPU: a replay computes again from the tensors that a graph would read, into the one it would write."""

    def _record(self, size: int) -> Recorded:
        to = Recorded(
            torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long), torch.ones(size),
            torch.zeros(size, self.width, dtype=torch.int32),
        )  # fmt: skip
        to.logits = self._compute(to)
        to.graph = SimpleNamespace(replay=lambda: to.logits.copy_(self._compute(to)))
        return to


def run(model: QWenLMHeadModel, graphs_of: type[DecodeGraphs]) -> None:
    """Prompts in one step, then single tokens of some of them, through graphs; against each row read at once."""
    rows = [golden.ids(length, k)[0].tolist() for k, length in enumerate(LENGTHS)]
    steps = Steps(model, rows)
    config = model.config
    steps.pool = PagePool(layer_devices(model), model.dtype, config.num_attention_heads, config.kv_channels, 4096)
    steps.pool.has_spare = True
    steps.pool.limit += 1
    graphs = graphs_of(model, steps.pool, 512)
    steps.run([length - 6 for length in LENGTHS])
    for some in ([0, 1, 2], [1], [0, 2], [0, 1, 2], [0, 1, 2]):
        sequences = [steps.sequences[i] for i in some]
        for sequence in sequences:
            steps.pool.extend(sequence, 1)
        ids = [sequence.ids[sequence.length] for sequence in sequences]
        step = PagedStep.of(steps.pool, sequences, [1] * len(some))
        logits = graphs.logits(ids, step, [steps.alphas[i] for i in some])
        for i, sequence, row in zip(some, sequences, logits, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([rows[i]], device=model.device)).logits[0, sequence.length]
            tolerance = 1e-4 if model.dtype == torch.float32 else 0.05 * expected.abs().max().item()
            torch.testing.assert_close(row, expected, atol=tolerance, rtol=0)
            steps.pool.written(sequence, 1)
    assert sorted(graphs.recorded) == [1, 2, 4]


def test_any_rows_in_the_tensors_of_a_graph() -> None:
    run(golden.model(local_attn=[20, 40, 1000]), Replayed)


@pytest.mark.gpu
def test_recorded_steps_are_those_of_the_model() -> None:
    model = golden.model(local_attn=[20, 40, 1000]).to("cuda", torch.bfloat16)
    run(model, DecodeGraphs)
