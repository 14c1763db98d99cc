"""On GPUs that are not there: the harness itself, and what went wrong on NVIDIA's and Apple's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import golden
import pretended_gpu
import utils
from eval.engine import Engine as Evaluation
from profiling.measure import peak_bytes, reset_peak
from utils import load_model_and_tokenizer

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2000}


@pytest.fixture(scope="module")
def on_cuda() -> Iterator[Callable]:
    with pretended_gpu.process("cuda", count=2) as call:
        yield call


@pytest.fixture(scope="module")
def on_apple() -> Iterator[Callable]:
    with pretended_gpu.process("mps") as call:
        yield call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.checkpoint(tmp_path_factory.mktemp("gpu") / "tiny")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.int4_checkpoint(tmp_path_factory.mktemp("gpu") / "int4")


# ---- the harness ----


def mixed_devices() -> list[str]:
    here, there, other = torch.ones(2), torch.ones(2, device="cuda"), torch.ones(2, device="cuda:1")
    refused = []
    for operation in (lambda: here + there, lambda: there @ other, lambda: torch.cat([here, there]),
                      lambda: here[there.long()], lambda: torch.where(there > 0, other, other)):  # fmt: skip
        with pytest.raises(RuntimeError, match="device") as error:
            operation()
        refused.append(str(error.value))
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]  # a CPU tensor without dimensions may take part
    return refused


def test_devices_do_not_mix(on_cuda: Callable) -> None:
    assert len(on_cuda(mixed_devices)) == 5


def waits_by_line() -> list[str]:
    gpu, x = pretended_gpu.gpu, torch.ones(4, device="cuda")
    gpu.waits.clear()
    y = (x * 2).cumsum(0)[None].expand(3, -1) @ x
    x.to("cpu", non_blocking=True), torch.ones(2).to("cuda", non_blocking=True)
    assert not gpu.waits
    for wait in (lambda: y[0].item(), lambda: y.cpu(), lambda: y.tolist(), lambda: bool(y[0] > 0), lambda: x[x > 0],
                 lambda: x[[0, 1]], lambda: torch.ones(1, device="cuda").copy_(torch.ones(1)), lambda: x.nonzero(),
                 lambda: torch.tensor([1], device="cuda"), torch.cuda.synchronize):  # fmt: skip
        wait()
    return [wait.line for wait in gpu.waits]


def test_every_wait_is_seen(on_cuda: Callable) -> None:
    lines = on_cuda(waits_by_line)
    assert len(lines) == 10 and {line.split(":")[0] for line in lines} == {Path(__file__).name}


def recorded_graph() -> None:
    total, step = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += step
        doubled = total * 2
    assert total.tolist() == [0, 0, 0] and doubled.isnan().all()
    for count in (1, 2):
        graph.replay()
        assert total.tolist() == [count] * 3 and doubled.tolist() == [2 * count] * 3
    step.fill_(5)
    graph.replay()
    assert doubled.tolist() == [14] * 3
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
        total.sum().item()


def test_graphs_replay_on_their_own_memory(on_cuda: Callable) -> None:
    on_cuda(recorded_graph)


def replies(device: str, count: int = 12) -> list[list[int]]:
    model = golden.model().to(device)
    ids, mask = golden.left_pad([golden.ids(20), golden.ids(9, 1)])
    out = model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=count, **GREEDY)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["on_cuda", "on_apple"])
def test_numbers_are_those_of_the_cpu(kind: str, request: pytest.FixtureRequest) -> None:
    call = request.getfixturevalue(kind)
    assert call(replies, {"on_cuda": "cuda", "on_apple": "mps"}[kind]) == replies("cpu")


# ---- Apple's GPUs ----


def sampled(checkpoint: Path, device: str) -> list[str]:
    with pytest.raises(TypeError, match="float64") if device == "mps" else pytest.MonkeyPatch.context():
        torch.ones(1, device=device).double()
    model, tokenizer = load_model_and_tokenizer(checkpoint, device=device, dtype="fp32")
    settings = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": [999]}
    texts = []
    for more in ({"top_p": 0.8, "top_k": 0}, {"top_k": 5}, {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.2}):
        torch.manual_seed(1)
        texts += [str(reply) for reply in model.chat_batch(tokenizer, ["Hi", "Hello there"], **settings, **more)]
    return texts


def test_sampled_replies_need_no_float64(on_apple: Callable, tiny: Path) -> None:
    assert on_apple(sampled, tiny, "mps") == sampled(tiny, "cpu")


def steps_until_all_have_ended(device: str) -> tuple[int, list[list[int]]]:
    model, steps = golden.model().to(device), []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    ids = torch.cat([golden.ids(9), golden.ids(9, 1)]).to(device)
    free = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **GREEDY)[:, 9:].tolist()
    steps.clear()
    settings = GREEDY | {"eos_token_id": [free[0][2], free[1][4]]}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **settings)
    return len(steps), out[:, 9:].tolist()


def test_batches_stop_at_the_last_end(on_apple: Callable) -> None:
    """transformers asks on Apple's GPUs one step late whether all rows have ended."""
    assert on_apple(steps_until_all_have_ended, "mps") == steps_until_all_have_ended("cpu")


def evaluated(checkpoint: Path, device: str) -> list[tuple[str, str, int]]:
    model, tokenizer = load_model_and_tokenizer(checkpoint, device=device, dtype="fp32")
    prompts = [golden.ids(9 + k, k)[0].remainder(700).tolist() for k in range(4)]
    model.generation_config.eos_token_id = [337, 304, 954]  # some rows end early
    records = Evaluation(model, tokenizer, max_new_tokens=12).answer(prompts)
    return [(record["text"], record["finish_reason"], record["completion_tokens"]) for record in records]


def test_evaluated_replies_hold_no_foreign_token(on_apple: Callable, tiny: Path) -> None:
    records = on_apple(evaluated, tiny, "mps")
    assert records == evaluated(tiny, "cpu")
    assert {record[1] for record in records} == {"stop", "length"}


# ---- NVIDIA's GPUs ----


def peaks() -> list[int]:
    gpus = torch.device("cuda")
    reset_peak(gpus)
    before = peak_bytes(gpus)
    big = torch.zeros(1000, device="cuda:1")
    high = peak_bytes(gpus)
    del big
    reset_peak(gpus)
    return [high - before, peak_bytes(gpus) - before]


def test_peak_of_memory_begins_anew_on_every_gpu(on_cuda: Callable) -> None:
    assert on_cuda(peaks) == [4000, 0]


def int4_with_a_layer_on(place: int | str, checkpoint: Path) -> tuple[int, str, list[list[float]]]:
    """Bytes that the GPU holds of a model, what computes it, and its logits."""
    placement = {"transformer.wte": 0, "transformer.drop": 0, "transformer.h.0": place, "transformer.ln_f": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "place_on_gpus", lambda *_: placement | {"lm_head": 0})
        before = pretended_gpu.gpu.memory.used[0]
        model, _ = load_model_and_tokenizer(checkpoint, device="cuda", dtype="fp32")
        used = pretended_gpu.gpu.memory.used[0] - before
    logits = model(torch.arange(30, device="cuda")[None]).logits[0]
    return used, utils.describe_placement(model), logits.tolist()


def test_int4_layers_that_stay_on_the_cpu_take_no_memory_of_the_gpu(on_cuda: Callable, int4: Path) -> None:
    """Their numbers are buffers, which accelerate leaves on the GPU unless it is told."""
    (whole, how, expected), (rest, _, logits) = (on_cuda(int4_with_a_layer_on, place, int4) for place in (0, "cpu"))
    layer = sum(t.numel() * t.itemsize for name, t in load_file(int4 / "model.safetensors").items() if ".h.0." in name)
    assert whole - rest > 0.95 * layer
    assert "Triton kernel" in how
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected))
