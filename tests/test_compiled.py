"""Compiled replies: the same tokens as without, from one thread and one cache. CUDA graphs themselves need a GPU."""

import copy
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import golden
from qwen import QwenError, QWenLMHeadModel
from utils import compile_for_gpu

SETTINGS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def compiled() -> QWenLMHeadModel:
    model = golden.model(local_attn=True)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # transformers would compile on GPUs only
    counters.clear()
    model.compile_replies(config, show_progress=False)
    return model


def test_replies_are_those_of_the_plain_model_with_one_graph(compiled: QWenLMHeadModel) -> None:
    """Prompts below and above the training length of 64: NTK, logn and windows; one after the other, one graph."""
    plain = golden.model(local_attn=True)
    cache = compiled.compiled.cache
    for length in (20, 100, 150, 30):
        expected = plain.generate(golden.ids(length), **SETTINGS)
        assert compiled.generate(golden.ids(length), **SETTINGS).tolist() == expected.tolist()
        assert compiled.compiled.cache is cache
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_all_callers_share_one_thread(compiled: QWenLMHeadModel) -> None:
    threads = set()
    compiled.transformer.register_forward_pre_hook(lambda *_: threads.add(threading.current_thread()))
    compiled.compiled.run(lambda: threads.add(threading.current_thread()))
    results = []
    callers = [
        threading.Thread(target=lambda: results.append(compiled.generate(golden.ids(40), **SETTINGS).tolist()))
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [golden.model(local_attn=True).generate(golden.ids(40), **SETTINGS).tolist()] * 3
    assert threads == {compiled.compiled.thread}


def test_errors_reach_the_caller_and_the_next_reply_works(compiled: QWenLMHeadModel) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        compiled.generate(golden.ids(20), max_new_tokens=-1)
    assert compiled.generate(golden.ids(20), **SETTINGS).shape == (1, 32)


def test_a_longer_conversation_gets_a_larger_cache(compiled: QWenLMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen.compiled.CACHE_STEP", 64)
    compiled.compiled.cache, compiled.compiled.room = None, 0
    compiled._previous_max_cache_length = -1
    rooms = []
    for length in (20, 100, 30):
        compiled.generate(golden.ids(length), **SETTINGS)
        rooms.append(compiled.compiled.room)
    assert rooms == [64, 128, 128]


def test_a_copy_is_not_compiled(compiled: QWenLMHeadModel) -> None:
    assert copy.deepcopy(compiled).compiled is None


def test_only_one_gpu_compiles() -> None:
    with pytest.raises(QwenError, match="--compile is for a model on one NVIDIA GPU, and this one is fp32 on cpu"):
        compile_for_gpu(golden.model().to(torch.float32))
