"""The one sampler: transformers' distributions; the same tokens alone and in company, in `generate` and the engine."""

import queue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import golden
import live_server
from qwen import QwenError, QWenTokenizer
from qwen.engine import Engine, Request, Update
from qwen.sampling import Choice, Rows, Sampler, Sampling, describe, draw, likeliest, pick_by_number

CPU = torch.device("cpu")
STEPS = 4096  # evenly spaced random numbers: together they draw the distribution itself


def distribution(logits: torch.Tensor, sampling: Sampling, prompt: list[int]) -> torch.Tensor:
    """How often each token is drawn from `logits` (V,)."""
    sampler = Sampler(len(logits), CPU)
    sampler.begin(0, sampling, prompt)
    scores = sampler._adjust(logits[None], sampler._rows_of([0])).expand(STEPS, -1)
    rows = Rows.make([sampling] * STEPS, [0] * STEPS, CPU)
    for size in (64, 1024, len(logits)):
        tokens, short = draw(scores, rows, torch.arange(STEPS) / STEPS, size)
        if short is None or not short.any():
            return tokens.bincount(minlength=len(logits)) / STEPS
    raise AssertionError("all tokens were too few")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000), st.floats(0.2, 2), st.sampled_from([0, 1, 5, 64, 1500]), st.floats(0.05, 0.99) | st.just(1.0),
    st.sampled_from([0.0, 0.05]), st.sampled_from([0.8, 1.0, 1.3]), st.sampled_from([0.5, 20.0]),
)  # fmt: skip
def test_distributions_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, prompt = spread * torch.randn(3000, generator=generator), [5, 6, 7]
    ours = distribution(logits, Sampling(temperature, top_k, top_p, min_p, repetition_penalty=penalty), prompt)
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    theirs = LogitsProcessorList(steps)(torch.tensor([prompt]), logits[None])[0].softmax(0)
    # One token more or less where rounding decides whether top-p is reached, and one step of the random numbers.
    assert (ours.cumsum(0) - theirs.cumsum(0)).abs().max() < 2 / STEPS + 1 / (theirs > 0).sum()


@pytest.mark.parametrize("count", [3, 600, 151_936])
def test_tokens_are_drawn_by_their_weights_in_order(count: int) -> None:
    weights = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
    weights[0, -1] = 0
    numbers = torch.rand(50, generator=torch.Generator().manual_seed(1))
    found = pick_by_number(weights.expand(50, -1), numbers)
    exact = weights[0].double().cumsum(0)
    for number, token in zip(numbers.double(), found.tolist(), strict=True):
        aim, slack = number * exact[-1], 1e-5 * exact[-1]
        assert weights[0, token] > 0
        assert (exact[token - 1] if token else 0) - slack <= aim <= exact[token] + slack
    edges = pick_by_number(weights.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-24]))
    assert edges.tolist() == [0, count - 2]


def test_the_likeliest_first_and_of_equals_the_lowest() -> None:
    scores = torch.randint(0, 50, (3, 32 * 4 * 32 * 8), generator=torch.Generator().manual_seed(0)).float()
    scores[:, 777] = 51
    values, tokens = likeliest(scores, 8)
    assert torch.equal(values, scores.topk(8).values) and torch.equal(scores.gather(1, tokens), values)
    assert (tokens[:, 0] == 777).all()
    equal = torch.zeros(1, 40)
    sampler = Sampler(40, CPU)
    sampler.begin(0, Sampling(temperature=0), [])
    assert sampler.choose(equal, [0]) == [Choice(0)]
    assert distribution(equal[0], Sampling(top_k=4), [])[:4].sum() == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-38, 1e-7])
def test_nearly_no_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(100, CPU)
    sampler.begin(0, Sampling(temperature=temperature, seed=1), [])
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(3))
    assert {sampler.choose(logits, [0])[0].token for _ in range(5)} == {int(logits.argmax())}


def test_rows_have_settings_and_draws_of_their_own() -> None:
    """Alone and in any company; with settings that leave few tokens, many and all."""
    many = [
        Sampling(seed=1), Sampling(0.7, top_p=0.9, seed=2), Sampling(temperature=0), Sampling(1.5, top_k=7, seed=4),
        Sampling(2.0, top_p=0.999, seed=5), Sampling(repetition_penalty=1.5, presence_penalty=1, seed=6),
        Sampling(0.5, min_p=0.01, logit_bias={5: 9.0}, seed=7), Sampling(2.0, top_k=2500, seed=-1),
    ]  # fmt: skip
    logits = 3 * torch.randn(12, len(many), 3000, generator=torch.Generator().manual_seed(0))

    def replies(rows: list[int]) -> dict[int, list[int]]:
        sampler = Sampler(3000, CPU, slots=len(many))
        for row in rows:
            sampler.begin(row, many[row], [1, 2, 3])
        chosen = [[choice.token for choice in sampler.choose(step[rows], rows)] for step in logits]
        return {row: [tokens[place] for tokens in chosen] for place, row in enumerate(rows)}

    together = replies(list(range(len(many))))
    assert all(replies([row])[row] == together[row] for row in together)
    assert replies([6, 1, 4]) == {row: together[row] for row in (6, 1, 4)}


def test_penalties_bias_grammar_and_logprobs() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0, -5.0]])

    def chosen(steps: int, **settings: object) -> list[int]:
        sampler = Sampler(4, CPU)
        sampler.begin(0, Sampling(temperature=0, **settings), [3])
        return [sampler.choose(logits, [0])[0].token for _ in range(steps)]

    assert chosen(3) == [0, 0, 0]
    assert chosen(3, presence_penalty=0.5) == [0, 1, 0]
    assert chosen(5, frequency_penalty=1.0) == [0, 1, 0, 1, 0]
    assert chosen(2, logit_bias={3: 100.0}) == [3, 3]
    sampler = Sampler(4, CPU)
    sampler.begin(0, Sampling(temperature=0, top_logprobs=2, logit_bias={2: 50.0}), [])
    expected = logits[0].log_softmax(0)
    [choice] = sampler.choose(logits, [0])
    assert choice.token == 2 and choice.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in choice.top] == [0, 1]
    [forced] = sampler.choose(logits, [0], {0: torch.tensor([False, False, False, True])})
    assert forced.token == 3 and forced.logprob == pytest.approx(float(expected[3]))
    [told] = describe(logits, [1], 1)
    assert told.token == 1 and told.logprob == pytest.approx(float(expected[1])) and told.top[0][0] == 0


def test_only_the_row_with_nan_fails() -> None:
    sampler = Sampler(4, CPU, slots=3)
    for slot, sampling in enumerate((Sampling(temperature=0), Sampling(seed=1), Sampling(temperature=0))):
        sampler.begin(slot, sampling, [])
    logits = torch.tensor([[float("nan"), 0, 0, 0], [0, 0, 0, float("inf")], [0.0, 1, 0, 0]])
    first, second, third = sampler.choose(logits, [0, 1, 2])
    assert isinstance(first, QwenError) and isinstance(second, QwenError) and third == Choice(1)


def serve(engine: Engine, request: Request) -> list[int]:
    """The tokens of the engine's reply."""
    updates: queue.Queue[Update] = queue.Queue()
    engine.submit([request], lambda number, update: updates.put(update))
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        tokens += [choice.token for choice in updates.get(timeout=60).choices]
    return tokens


@pytest.mark.parametrize("sampled", [{"top_p": 0.9, "temperature": 0.8}, {"top_k": 20, "repetition_penalty": 1.2}, {}])
def test_generate_and_engine_draw_the_same_tokens(tokenizer: QWenTokenizer, sampled: dict[str, float]) -> None:
    model = live_server.tiny_model()
    engine = Engine(model, tokenizer)
    prompt = golden.ids(30)[0].tolist()
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | sampled
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0} | settings
    ids = torch.tensor([prompt])
    for seed in range(3):
        torch.manual_seed(seed)
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        torch.manual_seed(seed)
        batch = model.generate(ids.repeat(3, 1), attention_mask=torch.ones(3, len(prompt)), **options)[:, len(prompt) :]
        torch.manual_seed(seed)
        scored = model.generate(
            ids, attention_mask=torch.ones_like(ids), typical_p=None, logits_processor=[lambda ids, scores: scores],
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        served = serve(engine, Request(prompt, 12, Sampling(seed=seed, **settings)))
        assert alone == served == batch[0].tolist() == scored.sequences[0, len(prompt) :].tolist()
        assert batch[1].tolist() != batch[0].tolist() != batch[2].tolist()
    engine.close()
    engine.join()


def test_logits_are_float32_and_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in bfloat16: those of the float32 head over the same hidden states."""
    monkeypatch.setattr("qwen.loss.WIDENED_ELEMENTS", 4096)  # several parts
    model = golden.model().bfloat16()
    with torch.no_grad():
        hidden = model.transformer(golden.ids(40)).last_hidden_state
        logits = model(golden.ids(40)).logits
        exact = hidden.double() @ model.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-5)
    model.requires_grad_(True)
    torch.testing.assert_close(model(golden.ids(40)).logits.double(), exact, atol=1e-4, rtol=1e-5)
