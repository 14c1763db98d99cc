"""What people load: their files' code never runs, their settings never cost them a model, and what can't be right is
refused in a sentence."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import golden
import merge_lora
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.chatml import build_prompt
from utils import load_model_and_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"chat_format": "chatml", "eos_token_id": 700, "pad_token_id": 700, "max_new_tokens": 4}
IM_END = 702  # <|im_end|> of the small vocabulary
TURNS = [("Who are you?", "Lumen."), ("A colour?", "Blue.")]
CODE_FILES = (  # whatever transformers, peft or torch would import by a name that a checkpoint can give
    "configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "processing_qwen.py", "pipeline_qwen.py",
    "custom_generate/generate.py", "sitecustomize.py", "conftest.py", "megatron_core.py", "__init__.py",
)  # fmt: skip


def write_settings(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def read(path: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    return load_model_and_tokenizer(path, device="cpu", dtype="fp32")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A chat model of three small layers."""
    path = golden.checkpoint(tmp_path / "small", vocab_size=1000)
    (path / "generation_config.json").write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture
def bombs(small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The model with code in every file that could be imported, and all settings naming it; and what the code makes."""
    trace = tmp_path / "code-was-run"
    for name in CODE_FILES:
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text(f"open({str(trace)!r}, 'w').close()\n")
    write_settings(
        small / "config.json",
        auto_map={
            "AutoConfig": "configuration_qwen.QWenConfig", "AutoModel": "modeling_qwen.QWenModel",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        custom_pipelines={"text-generation": {"impl": "pipeline_qwen.Mine", "pt": ["AutoModelForCausalLM"]}},
    )  # fmt: skip
    write_settings(
        small / "tokenizer_config.json",
        tokenizer_class=None,
        auto_map={"AutoTokenizer": ["tokenization_qwen.Mine", "tokenization_qwen.Mine"]},
    )
    write_settings(
        small / "processor_config.json",
        processor_class="Mine",
        auto_map={"AutoProcessor": "processing_qwen.Mine", "AutoFeatureExtractor": "processing_qwen.Mine"},
    )
    return small, trace


# ---- code of a checkpoint ----


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("named", [None, "Mine", "PreTrainedTokenizerFast", "QWenTokenizer"])
def test_auto_classes_never_run_code(
    bombs: tuple[Path, Path], trust: bool | None, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, trace = bombs
    write_settings(directory / "tokenizer_config.json", tokenizer_class=named)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert type(AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)) is QWenTokenizer
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust)
    assert type(model) is QWenLMHeadModel
    assert model.generate(golden.ids(4), max_new_tokens=1).shape == (1, 5)
    with pytest.raises(QwenError, match="whose code is never run: pass a function"):
        model.generate(golden.ids(4), custom_generate=str(directory), trust_remote_code=True)
    for name in ("AutoProcessor", "AutoFeatureExtractor"):
        with pytest.raises((OSError, ValueError)):
            getattr(transformers, name).from_pretrained(directory, trust_remote_code=trust)
    assert not trace.exists()


def test_pipeline_never_runs_code(bombs: tuple[Path, Path]) -> None:
    directory, trace = bombs
    pipe = transformers.pipeline("text-generation", str(directory), trust_remote_code=True, device="cpu")
    assert pipe("Hi", max_new_tokens=1)[0]["generated_text"].startswith("Hi")
    assert not trace.exists()


ENTRY_POINTS = {
    "cli": ["cli_demo.py", "--cpu-only"],
    "page": ["web_demo.py", "--cpu-only", "--server-name", "256.0.0.1"],  # no such address: ends after loading
    "server": ["openai_api.py", "--cpu-only", "--server-name", "256.0.0.1"],
    "quantise": ["quantize.py", "--cpu-only", "--group-size", "32", "--samples", "2", "-o", "OUT",
                 "--max-length", "64"],
    "convert": ["convert_to_qwen2.py", "-o", "OUT"],
    "eval": ["eval/evaluate_ppl.py", "--cpu-only", "--text", "TEXT", "--lengths", "64"],
    "profile": ["profile_inference.py", "--cpu-only"],
    "merge": ["merge_lora.py", "-o", "OUT"],
    "check_data": ["finetune.py", "--check_data", "DATA", "--use_cpu", "True"],
    "finetune": [
        "finetune.py", "-d", "DATA", "--output_dir", "OUT", "--max_steps", "1", "--use_cpu", "True", "--fp32", "True",
        "--use_lora", "True", "--report_to", "none",
    ],
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_no_entry_point_runs_code_or_asks(bombs: tuple[Path, Path], tmp_path: Path, entry: str) -> None:
    directory, trace = bombs
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    places = {"OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt", "DATA": tmp_path / "data.jsonl"}
    command = [str(places.get(word, word)) for word in ENTRY_POINTS[entry]]
    if entry == "merge":
        base, directory = directory, adapter(directory, tmp_path / "adapter")
        for name in CODE_FILES:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copy(base / name, directory / name)
    try:
        done = subprocess.run([sys.executable, *command, "-c", str(directory)], cwd=ROOT, input="y\ny\n",
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        said = done.stdout + done.stderr
        if entry in ("cli", "merge", "quantise", "convert", "eval", "check_data", "finetune"):
            assert done.returncode == 0, said
        assert "Traceback" not in said
    except subprocess.TimeoutExpired as late:  # long past loading
        said = f"{late.stdout or b''!r}{late.stderr or b''!r}"
    assert "[y/N]" not in said and "trust_remote_code" not in said
    assert not trace.exists()


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_pickles_are_not_run(small: Path, tmp_path: Path, kind: str) -> None:
    """A .bin file that holds more than tensors is refused in a sentence, before it is unpickled."""
    trace = tmp_path / "code-was-run"
    if kind == "model":
        directory = small
        tensors = load_file(small / "model.safetensors")
        (small / "model.safetensors").unlink()
        torch.save({**tensors, "extra": Bomb(trace)}, small / "pytorch_model.bin")
    else:
        directory = adapter(small, tmp_path / "adapter")
        tensors = load_file(directory / "adapter_model.safetensors")
        (directory / "adapter_model.safetensors").unlink()
        torch.save({**tensors, "extra": Bomb(trace)}, directory / "adapter_model.bin")
    assert not trace.exists()
    with pytest.raises(QwenError, match="could run code"):
        read(directory)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb is live


# ---- settings ----


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.8}, {"top_k": 0}, {"temperature": 0.5}, {"top_p": 0.5, "top_k": 3, "temperature": 0.1},
                 {"typical_p": 0.5}, {"early_stopping": True}, {"length_penalty": 2.0}],
)  # fmt: skip
def test_settings_that_contradict_never_stop_saving(small: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Read from a file they are left out with a word; set on the model they are left out of what is saved."""
    write_settings(small / "generation_config.json", do_sample=False, **settings)
    with pytest.warns(UserWarning, match=f"{next(iter(settings))}.*had no effect"):
        model, tokenizer = read(small)
    model.save_pretrained(tmp_path / "once")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path / "twice")
    assert getattr(model.generation_config, next(iter(settings))) == next(iter(settings.values()))
    tokenizer.save_pretrained(tmp_path / "twice")
    again, _ = read(tmp_path / "twice")
    torch.testing.assert_close(again(golden.ids(8)).logits, model(golden.ids(8)).logits)
    stored = json.loads((tmp_path / "once/generation_config.json").read_text())
    assert not stored.keys() & settings.keys() and stored["chat_format"] == "chatml"


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [("top_k", 50.0, 50), ("max_new_tokens", 7.0, 7), ("temperature", 1, 1.0), ("top_p", 1, 1.0)],
)
def test_numbers_of_the_other_json_type(small: Path, field: str, value: Any, meant: Any) -> None:
    write_settings(small / "generation_config.json", do_sample=True, **{field: value})
    model, _ = read(small)
    assert getattr(model.generation_config, field) == meant
    assert type(getattr(model.generation_config, field)) is type(meant)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", "0.5"), ("top_p", True), ("top_k", 2.5), ("stop_words_ids", [702]),
                         ("stop_words_ids", ["Observation:"]), ("max_new_tokens", [5])],
)  # fmt: skip
def test_settings_of_no_sense_are_named(small: Path, field: str, value: Any) -> None:
    write_settings(small / "generation_config.json", do_sample=True, **{field: value})
    with pytest.raises(QwenError, match=rf"generation_config.json: {field} is "):
        read(small)


@pytest.mark.parametrize("field", ["rotary_pct", "attn_dropout_prob", "emb_dropout_prob", "seq_length"])
def test_config_numbers_of_the_other_json_type(field: str) -> None:
    value = getattr(QWenConfig(), field)
    other = int(value) if isinstance(value, float) else float(value)
    config = QWenConfig.from_dict({field: other})
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)


class Always(transformers.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, IM_END] = 1e9
        return scores


@pytest.mark.parametrize("eos", [700, [700], None, 702, [702], [700, 702], [700, 702, 701]])
def test_settings_assigned_later_stop_at_the_end_of_a_turn(small: Path, eos: Any) -> None:
    (small / "generation_config.json").write_text(json.dumps({**SETTINGS, "eos_token_id": eos}))
    model = AutoModelForCausalLM.from_pretrained(small)
    for _ in range(2):
        out = model.generate(golden.ids(4), logits_processor=[Always()], max_new_tokens=9)
        assert out.shape[1] == 5 and out[0, -1] == IM_END
        model.generation_config = GenerationConfig.from_pretrained(small)


@pytest.mark.parametrize("stops", [[42, 43], ["Observation:"], 42, [[]], [[1.5]]])
def test_stop_words_of_another_shape(stops: Any) -> None:
    with pytest.raises(QwenError, match="should be a list of lists of token ids"):
        golden.model().generate(golden.ids(4), stop_words_ids=stops, max_new_tokens=1)


# ---- other models ----


@pytest.mark.parametrize(
    ("config", "tensor", "said"),
    [({"visual": {"image_size": 448}}, "", "Qwen-VL"), ({"audio": {"n_mels": 80}}, "", "Qwen-Audio"),
     ({}, "transformer.visual.proj", "Qwen-VL"), ({}, "transformer.audio.conv1.weight", "Qwen-Audio"),
     ({"model_type": "qwen2"}, "", "later generation"), ({"model_type": "qwen3_moe"}, "", "later generation"),
     ({"model_type": "llama"}, "", "only \"qwen\""), ({}, "base_model.model.lm_head.weight", "adapter's wrapper")],
)  # fmt: skip
def test_other_models_are_told_what_they_are(small: Path, config: dict[str, Any], tensor: str, said: str) -> None:
    write_settings(small / "config.json", **config)
    if tensor:
        tensors = {**load_file(small / "model.safetensors"), tensor: torch.ones(2)}
        save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QwenError, match=said):
        read(small)
    if config.get("model_type") is None:
        with pytest.raises(QwenError, match=said):
            AutoModelForCausalLM.from_pretrained(small)


# ---- adapters ----


def adapter(base: Path, path: Path, kind: str = "lora") -> Path:
    """An adapter of `base` that changes its logits."""
    model, _ = read(base)
    config = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    if kind != "lora":
        config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", token_dim=64, num_layers=3)
    get_peft_model(model, config).save_pretrained(path)
    write_settings(path / "adapter_config.json", base_model_name_or_path=str(base))
    return path


@pytest.mark.parametrize("damage", ["renamed", "partly renamed", "missing", "more"])
@pytest.mark.parametrize("way", ["load", "merge"])
def test_adapter_keys_must_match(small: Path, tmp_path: Path, damage: str, way: str) -> None:
    path = adapter(small, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    first = next(iter(tensors))
    if damage == "renamed":
        tensors = {name.replace("c_attn", "qkv"): tensor for name, tensor in tensors.items()}
    elif damage == "more":
        tensors[first.replace("h.0", "h.7")] = tensors[first].clone()
    else:
        taken = tensors.pop(first)
        if damage == "partly renamed":
            tensors[first.replace("c_attn", "qkv")] = taken
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(QwenError, match="tensors belong to nothing there|that the model takes are missing"):
        if way == "load":
            read(path)
        else:
            merge_lora.main(["-c", str(path), "-o", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_whole_adapter_loads_and_merges_to_the_same_logits(small: Path, tmp_path: Path) -> None:
    """Greedy settings beside sampling ones are in the base, and don't stop the merge."""
    write_settings(small / "generation_config.json", do_sample=False, top_p=0.8)
    with pytest.warns(UserWarning, match="had no effect"):
        path = adapter(small, tmp_path / "adapter")
        adapted, _ = read(path)
        merge_lora.main(["-c", str(path), "-o", str(tmp_path / "merged")])
    merged, _ = read(tmp_path / "merged")
    logits = adapted(golden.ids(8)).logits
    torch.testing.assert_close(merged(golden.ids(8)).logits, logits, atol=1e-4, rtol=1e-4)
    assert (logits - golden.model()(golden.ids(8)).logits).abs().max() > 0.01


@pytest.mark.parametrize("way", ["load", "merge"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"base_model_name_or_path": "SELF"}, "names itself as its base"),
     ({"base_model_name_or_path": "ADAPTER"}, "is an adapter too"),
     ({"peft_type": None}, "has no peft_type"), ({"megatron_config": {"x": 1}}, "would import a module")],
)  # fmt: skip
def test_adapters_that_cannot_be_applied(
    small: Path, tmp_path: Path, changes: dict[str, Any], said: str, way: str
) -> None:
    path = adapter(small, tmp_path / "adapter")
    shutil.copytree(path, tmp_path / "first")
    places = {"SELF": str(path), "ADAPTER": str(tmp_path / "first")}
    write_settings(path / "adapter_config.json", **{k: places.get(str(v), v) for k, v in changes.items()})
    with pytest.raises(QwenError, match=said):
        if way == "load":
            read(path)
        else:
            merge_lora.main(["-c", str(path), "-o", str(tmp_path / "merged")])


def test_learned_prompts_chat_and_are_not_merged(small: Path, tmp_path: Path) -> None:
    path = adapter(small, tmp_path / "prompt", kind="prompt")
    model, _ = read(path)
    assert model(input_ids=golden.ids(8)).logits.shape[-1] == 1000
    with pytest.raises(QwenError, match="PROMPT_TUNING, which can't be merged"):
        merge_lora.main(["-c", str(path), "-o", str(tmp_path / "merged")])


# ---- conversations ----


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def test_messages_are_a_history(tokenizer: QWenTokenizer) -> None:
    right = build_prompt(tokenizer, "And?", TURNS)
    assert build_prompt(tokenizer, "And?", messages(TURNS)) == right
    own = [{"role": "system", "content": "Be brief."}, *messages(TURNS)]
    assert build_prompt(tokenizer, "And?", own) == build_prompt(tokenizer, "And?", TURNS, "Be brief.")
    assert build_prompt(tokenizer, "And?", [list(turn) for turn in TURNS], None) == right
    assert build_prompt(tokenizer, "And?", tuple(TURNS)) == right


@pytest.mark.parametrize(
    "history",
    [["ab", "cd"], ["Who are you?", "Lumen."], "ab", [("Hi", None)], [(None, "Hi")], [("a", "b", "c")], [("a",)],
     [{"user": "Hi", "assistant": "Yes"}], ({"user": "Hi", "assistant": "Yes"},), {"Hi": "Yes"}, 3, [3], [("a", 3)],
     messages(TURNS)[:1], messages(TURNS)[::-1], [*messages(TURNS), ("Hi", "Yes")],
     [{"role": "tool", "content": "4"}], [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]],
)  # fmt: skip
def test_histories_of_another_shape(tokenizer: QWenTokenizer, history: Any) -> None:
    """In each way to chat, before the model is run."""
    model = golden.model()
    for call in (
        lambda: build_prompt(tokenizer, "Hi", history),
        lambda: model.chat(tokenizer, "Hi", history),
        lambda: next(model.chat_stream(tokenizer, "Hi", history)),
        lambda: model.chat_batch(tokenizer, ["Hi"], [history]),
    ):
        with pytest.raises(QwenError, match="history"):
            call()


@pytest.mark.parametrize("query", [None, 3, b"Hi", ["Hi"], messages(TURNS)])
def test_queries_of_another_shape(tokenizer: QWenTokenizer, query: Any) -> None:
    for call in (
        lambda: golden.model().chat(tokenizer, query, None),
        lambda: next(golden.model().chat_stream(tokenizer, query, None)),
    ):
        with pytest.raises(QwenError, match="query is"):
            call()


def test_one_text_for_a_batch(tokenizer: QWenTokenizer) -> None:
    with pytest.raises(QwenError, match=r"chat_batch\(\) takes a list"):
        golden.model().chat_batch(tokenizer, "Hi")


# ---- what other libraries read ----


def test_config_has_the_ids_that_libraries_ask_for(small: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(small).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)
    write_settings(small / "config.json", pad_token_id=700, eos_token_id=[702, 700])
    config = AutoModelForCausalLM.from_pretrained(small).config
    assert (config.pad_token_id, config.eos_token_id) == (700, [702, 700])
