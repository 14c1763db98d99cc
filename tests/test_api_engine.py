"""The engine alone: replies in company are those alone, limits hold, and nobody suffers from another's failure."""

import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

import live_server
from api.grammar import Constraint
from qwen import QWenLMHeadModel, QWenTokenizer
from qwen.engine import Closed, Engine, Limits, QueueFull, Request, Update
from qwen.sampling import Sampling

GREEDY = Sampling(temperature=0)
ENDLESS = Sampling(temperature=0, logit_bias=dict.fromkeys((151643, 151644, 151645), -100.0))


@pytest.fixture(scope="module")
def model() -> QWenLMHeadModel:
    return live_server.tiny_model()


@pytest.fixture
def engine(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, Limits(max_batch=8, max_queue=100, kv_tokens=2048, chunk=16))
    yield engine
    engine.close()
    engine.join()
    assert not engine.running and not engine.waiting and engine.pool.taken == 0


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """From 3 to 150 tokens: some longer than the training length, so that their NTK factors differ."""
    rng = random.Random(seed)
    return [[rng.randrange(1000) for _ in range(rng.choice((3, 20, 60, 65, 150)))] for _ in range(count)]


class Collector:
    """Collects what the engine delivers."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.updates: list[list[Update]] = [[] for _ in requests]
        self.ended: queue.Queue[int] = queue.Queue()
        self.jobs = engine.submit(requests, self.take)

    def take(self, number: int, update: Update) -> None:
        self.updates[number].append(update)
        if update.finish_reason or update.error:
            self.ended.put(number)

    def tokens(self, timeout: float = 60) -> list[list[int]]:
        """Wait for all; the tokens of each."""
        for _ in self.updates:
            self.ended.get(timeout=timeout)
        return [[c.token for update in updates for c in update.choices] for updates in self.updates]


def generate(model: QWenLMHeadModel, prompt: list[int], count: int) -> list[int]:
    """What transformers' own loop gives, greedily, with a cache of its own."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def test_replies_alone_and_in_company_are_those_of_generate(model: QWenLMHeadModel, engine: Engine) -> None:
    requests = [Request(prompt, 6 + 3 * (i % 4), GREEDY) for i, prompt in enumerate(prompts(12))]
    expected = [generate(model, list(request.prompt), request.max_tokens) for request in requests]
    alone = [Collector(engine, [request]).tokens()[0] for request in requests]
    engine.pool.forget()
    together = Collector(engine, requests).tokens()
    assert expected == alone == together
    assert len({tuple(tokens) for tokens in together}) > 6


def test_seeded_replies_are_the_same_in_company(engine: Engine) -> None:
    settings = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    requests = [Request(prompt, 6, Sampling(seed=i, **settings)) for i, prompt in enumerate(prompts(4, seed=1))]
    alone = [Collector(engine, [request]).tokens()[0] for request in requests]
    assert Collector(engine, requests).tokens() == alone
    other = [Request(request.prompt, 6, Sampling(seed=100, **settings)) for request in requests]
    assert Collector(engine, other).tokens() != alone


def test_shared_prompts_are_read_once(engine: Engine) -> None:
    system, growing = prompts(1, seed=2)[0] + list(range(40)), []
    requests = [Request([*system, 500 + i], 5, GREEDY) for i in range(4)]
    collector = Collector(engine, requests)
    collector.tokens()
    cached = [updates[0].cached_tokens for updates in collector.updates]
    assert sorted(cached) == [0] + [len(system)] * 3
    for turn in range(4):  # a chat that grows: all of it is known but the newest turn and the token before it
        growing += [600 + turn] * 16
        collector = Collector(engine, [Request(list(growing), 3, GREEDY)])
        [reply] = collector.tokens()
        # Beyond 64 tokens the NTK factor is another, and with it every key.
        assert collector.updates[0][0].cached_tokens == (0 if turn in (0, 3) else len(growing) - 17)
        growing += reply
    assert len(growing) > 64


def test_memory_is_never_promised_twice(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    engine = Engine(model, tokenizer, Limits(max_batch=8, max_queue=100, kv_tokens=300, chunk=16))
    held = []
    requests = [Request(prompt, 10, GREEDY) for prompt in prompts(15, seed=3)]
    done: queue.Queue = queue.Queue()

    def deliver(number: int, update: Update) -> None:
        held.append((engine.promised, engine.pool.available, engine.pool.size))
        if update.finish_reason:
            done.put(number)

    engine.submit(requests, deliver)
    assert sorted(done.get(timeout=60) for _ in requests) == list(range(15))
    assert all(promised <= available and size <= 5 for promised, available, size in held), "pages of 64 tokens"
    assert min(available for _, available, _ in held) < 2
    with pytest.raises(ValueError, match="1 to 300 tokens"):
        engine.submit([Request([1] * 295, 10)], deliver)
    engine.close()
    engine.join()


class Broken(Constraint):
    """Fails at its third token."""

    def __init__(self) -> None:
        self.tokens = 0

    def allowed(self, device: torch.device, vocab_size: int) -> None:
        return None

    def push(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 3:
            raise RuntimeError("broken")


@pytest.mark.parametrize("how", ["choosing", "computing"])
def test_a_failure_touches_nobody_else(engine: Engine, model: QWenLMHeadModel, how: str) -> None:
    requests = [Request(prompt, 12, GREEDY) for prompt in prompts(4, seed=4)]
    expected = Collector(engine, requests).tokens()
    unlucky = Request([7, 8, 9], 12, Sampling(temperature=0, logit_bias={4242: 1000}))
    hook = None
    if how == "choosing":
        unlucky = Request([7, 8, 9], 12, GREEDY, constraint=Broken())
    else:

        def refuse(module: torch.nn.Module, inputs: tuple) -> None:
            if (inputs[0] == 4242).any():
                raise RuntimeError("broken")

        hook = model.transformer.wte.register_forward_pre_hook(refuse)
    collector = Collector(engine, [*requests, unlucky])
    tokens = collector.tokens()
    if hook:
        hook.remove()
    assert tokens[:-1] == expected
    assert str(collector.updates[-1][-1].error) == "broken" and len(tokens[-1]) <= 3


def test_cancelled_requests_leave_at_once(engine: Engine) -> None:
    long = [Request(prompt[:20], 200, ENDLESS) for prompt in prompts(20, seed=5)]
    collector = Collector(engine, long)
    while not collector.updates[0]:
        time.sleep(0.01)
    engine.cancel(collector.jobs)
    deadline = time.monotonic() + 10
    while (engine.running or engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.running and not engine.waiting
    counts = [len(updates) for updates in collector.updates]
    time.sleep(0.1)
    assert counts == [len(updates) for updates in collector.updates] and max(counts) < 200


def test_queue_timeout_and_end(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    engine = Engine(model, tokenizer, Limits(max_batch=1, max_queue=1, kv_tokens=2048, timeout=0.2))
    endless = Request([1, 2, 3], 250, ENDLESS)
    with pytest.raises(QueueFull):
        engine.submit([endless] * 3, lambda number, update: None)
    step = engine.model.forward
    engine.model.forward = lambda *args, **kwargs: (time.sleep(0.02), step(*args, **kwargs))[1]
    try:
        collector = Collector(engine, [endless, endless])
        collector.tokens()
        assert [type(updates[-1].error) for updates in collector.updates] == [TimeoutError] * 2
        collector = Collector(engine, [endless])
        while not collector.updates[0]:
            time.sleep(0.01)
        engine.close(grace=0.05)
        with pytest.raises(Closed):
            engine.submit([endless], lambda number, update: None)
        engine.join()
        assert isinstance(collector.updates[0][-1].error, Closed)
    finally:
        del engine.model.forward


def test_who_is_gone_is_not_waited_for(engine: Engine) -> None:
    heard = threading.Event()

    def deliver(number: int, update: Update) -> None:
        heard.set()
        raise RuntimeError("Event loop is closed")

    engine.submit([Request([1, 2, 3], 200, GREEDY)], deliver)
    assert heard.wait(10)
    assert len(Collector(engine, [Request([4, 5, 6], 5, GREEDY)]).tokens()[0]) > 0
