"""Prompt lookup changes no greedy reply, also beyond the training length; perplexity and prefill of long texts."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import golden
from eval import evaluate_ppl
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer
from utils import load_model_and_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COPY = "Repeat this exactly: the quick brown fox jumps over the lazy dog, and the quick brown fox sleeps."


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    return load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")


# ---- prompt lookup ----


def count_calls(model: QWenLMHeadModel) -> list[int]:
    """Tokens that go into each call of the model from now on."""
    seen: list[int] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append(ids.shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}, {"max_new_tokens": 7}])
def test_replies_are_the_same(demo: tuple[QWenLMHeadModel, QWenTokenizer], settings: dict) -> None:
    model, tokenizer = demo
    kwargs = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 32} | settings
    plain = model.chat(tokenizer, COPY, None, **kwargs)[0]
    guessed = model.chat(tokenizer, COPY, None, prompt_lookup_num_tokens=8, **kwargs)[0]
    assert (str(guessed), vars(guessed)) == (str(plain), vars(plain))
    *_, last = model.chat_stream(tokenizer, COPY, None, prompt_lookup_num_tokens=8, **kwargs)
    assert (str(last), vars(last)) == (str(plain), vars(plain))


def test_stops_inside_an_accepted_run(demo: tuple[QWenLMHeadModel, QWenTokenizer]) -> None:
    """The reply ends at the stop word, though the run of accepted tokens goes on behind it, and takes fewer calls."""
    model, tokenizer = demo
    kwargs = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 40}
    prompt = f"{COPY} Begin at once."
    free = str(model.chat(tokenizer, prompt, None, **kwargs)[0])
    word = next(word for word in free.split()[3:] if free.count(word) == 1)
    calls = count_calls(model)
    endings = []
    for more in ({}, {"prompt_lookup_num_tokens": 10}):
        reply = model.chat(tokenizer, prompt, None, stop_words_ids=[word], **kwargs, **more)[0]
        endings.append((str(reply), vars(reply), len(calls)))
        calls.clear()
    assert endings[0][:2] == endings[1][:2] and endings[0][0] == free[: free.index(word)].rstrip()
    assert endings[0][1]["finish_reason"] == "stop_word"
    assert endings[1][2] < endings[0][2]


@pytest.mark.parametrize(
    ("length", "settings"),
    [(40, {}), (58, {}), (126, {}), (140, {}), (126, {"use_dynamic_ntk": False}), (126, {"local_attn": True})],
)
def test_long_prompts_with_prompt_lookup(length: int, settings: dict) -> None:
    """Around the borders of 64 and 128 tokens: the guesses must not count as prompt when NTK's alpha is chosen."""
    model = golden.model(**settings)
    pattern = golden.ids(20)
    ids = pattern.repeat(1, 8)[:, :length]
    kwargs = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, return_dict_in_generate=True, output_logits=True, **kwargs)
    guessed = model.generate(
        ids, return_dict_in_generate=True, output_logits=True, prompt_lookup_num_tokens=10, **kwargs
    )
    assert guessed.sequences.tolist() == plain.sequences.tolist()
    for a, b in zip(guessed.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    if model.config.use_dynamic_ntk:
        assert guessed.past_key_values.ntk_alpha.tolist() == plain.past_key_values.ntk_alpha.tolist()


def test_eos_inside_an_accepted_run() -> None:
    model = golden.model()
    ids = golden.ids(20).repeat(1, 2)
    kwargs = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 30}
    free = model.generate(ids, **kwargs)[0].tolist()
    for at in (44, 47, 53):
        eos = free[at]
        plain = model.generate(ids, eos_token_id=eos, **kwargs)[0].tolist()
        assert plain == free[: 41 + free[40:].index(eos)]
        assert model.generate(ids, eos_token_id=eos, prompt_lookup_num_tokens=10, **kwargs)[0].tolist() == plain


def test_stop_words_of_generate_inside_an_accepted_run() -> None:
    model = golden.model()
    # The answer itself in the prompt, so that many guesses are right.
    ids = golden.ids(40)
    answer = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 40:]
    kwargs = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 20}
    prompt = torch.cat([ids, answer, ids], dim=1)
    free = model.generate(prompt, **kwargs)[0, 100:].tolist()
    kwargs["stop_words_ids"] = [free[9:11]]
    plain = model.generate(prompt, **kwargs)[0].tolist()
    guessed = model.generate(prompt, prompt_lookup_num_tokens=8, **kwargs)[0].tolist()
    assert guessed[: len(plain)] == plain and len(guessed) - len(plain) <= 8


# ---- the benchmark ----


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bench_long_context", BENCHMARKS / "bench_long_context.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_long_context"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))
        del sys.modules["bench_long_context"]


@pytest.mark.parametrize("chunk", [32, 100, 500])
@torch.no_grad()
def test_loss_by_chunks_is_the_loss(chunk: int) -> None:
    """All switches on, beyond the training length, against one call with labels."""
    model = golden.model(local_attn=True)
    ids = golden.ids(100)
    assert math.isclose(evaluate_ppl.mean_loss(model, ids, chunk), model(ids, labels=ids).loss.item(), rel_tol=1e-5)


def test_switches_that_do_nothing_are_left_out() -> None:
    config, everything = golden.model().config, evaluate_ppl.Switches(True, True, True)
    assert everything.effective(32, config) == evaluate_ppl.Switches()
    assert everything.effective(64, config) == evaluate_ppl.Switches(local_attn=True)
    assert everything.effective(65, config) == everything
    with torch.no_grad():
        alike = golden.model(local_attn=True)(golden.ids(32)).logits
        torch.testing.assert_close(alike, golden.model(use_dynamic_ntk=False)(golden.ids(32)).logits)


def test_perplexity_table_and_plot(
    tokenizer: QWenTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished cell is not measured again; other settings are not mixed in."""
    pytest.importorskip("matplotlib")
    checkpoint = tmp_path / "tiny"
    save_with_vocabulary(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    text, output = golden.DATA / "qwen.tiktoken.LICENSE", tmp_path / "figures.json"
    flags = ["-c", str(checkpoint), "--device", "cpu", "--dtype", "fp32", "--text", str(text)]
    flags += ["--output", str(output), "--chunk", "50", "--plot", str(tmp_path / "plot.png")]
    evaluate_ppl.main([*flags, "--lengths", "32", "100"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| perplexity | 32 | 100 |", "|---|---|---|"] and lines[6] == ""
    rows = [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in lines[2:6]]
    assert len({row[0] for row in rows}) == 1 and len({row[1] for row in rows}) == 4
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"

    saved = json.loads(output.read_text())
    saved["figures"]["plain"]["100"] = 7.25
    output.write_text(json.dumps(saved))
    evaluate_ppl.main([*flags, "--lengths", "32", "100"])
    assert "| plain | " in (shown := capsys.readouterr().out) and "7.25" in shown
    with pytest.raises(QwenError, match="figures of other settings"):
        evaluate_ppl.main([*flags, "--lengths", "32", "--seq-length", "16"])
    with pytest.raises(QwenError, match="tokens and 99,999 are wanted: take a longer text"):
        evaluate_ppl.main([*flags[:8], "--lengths", "99999"])


def save_with_vocabulary(directory: Path) -> None:
    """A tiny random model that knows all tokens of the real vocabulary."""
    torch.manual_seed(0)
    config = {**golden.MODEL["config"], "vocab_size": 151936, "hidden_size": 16, "num_hidden_layers": 2}
    model = QWenLMHeadModel(QWenConfig(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)


def test_prefill_table(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each prompt in a process of its own; rows of both ways, for time and memory."""
    golden.checkpoint(tmp_path)
    bench.main(["-c", str(tmp_path), "--device", "cpu", "--lengths", "100", "--chunk", "32"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lines[2:]}
    assert list(rows) == [
        f"{how}, {what}" for how in ("whole", "in chunks of 32") for what in ("time (s)", "peak memory (GiB)")
    ]
    assert all(value > 0 for value in rows.values())
