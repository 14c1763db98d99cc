"""Greedy replies of a model in bfloat16 are the same, token for token, however they are computed on a CPU."""

import queue
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from qwen.chatml import DEFAULT_SYSTEM, build_prompt
from qwen.engine import Engine, Limits, Request, Update
from qwen.hardware import VARIABLE
from qwen.sampling import Sampling
from utils import load_model_and_tokenizer

QUESTIONS = ("What is the capital of France?", "Write a poem about the sea.", "List three colours.", "Hi")
TOKENS = 12


def replies(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """The tokens of each reply, all of them at once, and how many tokens of each prompt were known."""
    tokens: list[list[int]] = [[] for _ in prompts]
    cached, updates = [0] * len(prompts), queue.Queue()
    engine.submit(
        [Request(prompt, TOKENS, Sampling(temperature=0)) for prompt in prompts],
        lambda number, update: updates.put((number, update)),
    )
    unfinished = len(prompts)
    while unfinished:
        number, update = updates.get(timeout=120)
        assert isinstance(update, Update) and update.error is None
        tokens[number] += [choice.token for choice in update.choices]
        cached[number] = update.cached_tokens
        unfinished -= update.finish_reason is not None
    return tokens, cached


@pytest.mark.parametrize("bf16", ["on", "off"])
def test_greedy_replies_never_change(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, bf16: str) -> None:
    monkeypatch.setenv(VARIABLE, f"bf16={bf16}")
    model, tokenizer = load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="bf16")
    if model.transformer.cpu_decoder is None:
        pytest.skip("PyTorch's products depend on the number of rows: this is promised of the compiled kernels")
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": TOKENS}
    prompts = [build_prompt(tokenizer, question, system=DEFAULT_SYSTEM).ids for question in QUESTIONS]

    alone = [str(model.chat(tokenizer, question, None, DEFAULT_SYSTEM, **settings)[0]) for question in QUESTIONS]
    assert len(set(alone)) == len(alone)
    batch = model.chat_batch(tokenizer, [*QUESTIONS, *reversed(QUESTIONS)] * 2, None, DEFAULT_SYSTEM, **settings)
    assert [str(reply) for reply in batch] == [*alone, *reversed(alone)] * 2
    streamed = [[*model.chat_stream(tokenizer, q, None, DEFAULT_SYSTEM, **settings)][-1] for q in QUESTIONS[:2]]
    assert [str(reply) for reply in streamed] == alone[:2]

    ids = torch.tensor([prompts[1]])
    endless = settings | {"eos_token_id": -1, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **endless)[0, len(prompts[1]) :].tolist()
    for chunk in (7, 128):
        engine = Engine(model, tokenizer, Limits(max_batch=16, max_queue=64, chunk=chunk))
        together, _ = replies(engine, [*prompts, *prompts])
        again, cached = replies(engine, [*reversed(prompts)])
        engine.close()
        engine.join()
        assert together[1] == expected
        assert together[: len(prompts)] == together[len(prompts) :] == [*reversed(again)]
        assert min(cached) > 0, "what was read before is not read again"
