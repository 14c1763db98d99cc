"""Two processes with a slice of every layer each against one with all of them, and how they end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import cli_demo
import golden
import tensor_parallel
from qwen import QwenError
from utils import load_model_and_tokenizer

ROOT = Path(tensor_parallel.__file__).parent


def torchrun(tmp_path: Path, *command: str, processes: int = 2, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script in several processes; those that hang fail the test by the timeout."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command],
        input=lines, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the golden outputs: 4 heads, seq_length 64."""
    return golden.checkpoint(tmp_path_factory.mktemp("tiny"))


COMPARE = """
import json, sys
import torch
from transformers.cache_utils import DynamicCache, QuantizedCache
import golden
from qwen import QwenError
from utils import describe_placement, load_model_and_tokenizer

directory, tp = sys.argv[1], int(sys.argv[2])
model, tokenizer = load_model_and_tokenizer(directory, tp=tp, dtype="fp32")
single = golden.model()
greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
found = {
    "placement": describe_placement(model),
    "slice": list(model.transformer.h[0].attn.c_attn.weight.to_local().shape),
    "difference": (model(golden.ids(100)).logits - single(golden.ids(100)).logits).abs().max().item(),
}

# Two conversations in turns, the second beyond the training length, with tokens taken back in between.
caches = {"ours": [DynamicCache(), DynamicCache()], "theirs": [DynamicCache(), DynamicCache()]}
worst = 0.0
for start, end in ((0, 50), (50, 60), (55, 70)):
    for i, ids in enumerate((golden.ids(70), torch.cat([golden.ids(70), golden.ids(70, 1)], dim=1))):
        pair = []
        for who, m in (("ours", model), ("theirs", single)):
            cache = caches[who][i]
            if start == 55:
                cache.crop(-5)
            piece = ids[:, (i + 1) * start : (i + 1) * end] if start != 55 else ids[:, cache.get_seq_length() :]
            pair.append(m(piece, past_key_values=cache).logits)
        worst = max(worst, (pair[0] - pair[1]).abs().max().item())
found["interleaved"] = worst
for name, more in {
    "greedy": {},
    "chunked": {"prefill_chunk_size": 16},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "sampled": {"do_sample": True, "temperature": 0.5, "top_k": 5},
}.items():
    pair = []
    for m in (model, single):
        torch.manual_seed(0)
        pair.append(m.generate(golden.ids(100), **(greedy | more)).tolist())
    found[name] = pair[0] == pair[1]
refused = []
for more in ({"num_beams": 2}, {"past_key_values": QuantizedCache("hqq", model.config)}):
    try:
        model.generate(golden.ids(10), **(greedy | more))
    except QwenError as error:
        refused.append(str(error))
found["refused"] = refused
found["caches kept"] = len(model.cache_numbers)
print(json.dumps(found))
"""


@pytest.mark.parametrize(("processes", "rows"), [(2, 96), (3, 64)])
def test_slices_compute_what_the_whole_does(tiny: Path, tmp_path: Path, processes: int, rows: int) -> None:
    """By heads where they can be dealt out evenly (4 heads on 2), else with c_attn gathered (on 3)."""
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    done = torchrun(tmp_path, str(script), str(tiny), str(processes), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["placement"] == f"fp32 on {processes} processes (cpu), sdpa attention"
    assert found["slice"] == [rows, 64]
    assert found["difference"] < 1e-4 and found["interleaved"] < 1e-4
    assert all(found[name] for name in ("greedy", "chunked", "lookup", "sampled"))
    assert "beam search" in found["refused"][0] and "QuantizedCache" in found["refused"][1]
    assert found["caches kept"] == 2, "those of the two conversations; the others were forgotten"


LINES = ":conf do_sample=off max_new_tokens=16\nWhat is the capital of France?\nAnd of Italy?\n"


def test_the_chat_gives_the_same_replies(demo_checkpoint: Path, tmp_path: Path) -> None:
    """The demo model's 9 heads can't be halved. Only rank 0 prints, and the end of input ends both."""
    model, tokenizer = load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")
    replies, history = [], None
    for query in LINES.splitlines()[1:]:
        reply, history = model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=16)
        replies.append(str(reply))
    flags = ["-c", str(demo_checkpoint), "--tp", "2", "--dtype", "fp32"]
    done = torchrun(tmp_path, str(ROOT / "cli_demo.py"), *flags, lines=LINES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == "\n".join(replies).splitlines()
    assert done.stderr.count(f"Loading {demo_checkpoint}") == 1


ENDINGS = """
import sys
import torch
from utils import load_model_and_tokenizer, run_script
import golden

def main():
    model, _ = load_model_and_tokenizer(sys.argv[1], tp=2, dtype="fp32")
    if sys.argv[2] == "leader":
        model.transformer.h[1].mlp.forward = broken  # inside a call that the other process has entered
        model(golden.ids(10))
    elif sys.argv[2] == "follower":
        model(torch.tensor([[5]]), labels=Trap())
    elif sys.argv[2] == "interrupt":
        raise KeyboardInterrupt
    print("went on")

def broken(x):
    raise RuntimeError("out of luck")

class Trap:
    # Fails where it is unpacked: in the follower.
    def __reduce__(self):
        return eval, ("[][0]",)

run_script(main)
"""


@pytest.mark.parametrize(
    ("ending", "said"),
    [("leader", "rank 0 failed, which ends all: out of luck"), ("follower", "IndexError"), ("interrupt", "")],
)
def test_one_process_ends_all(tiny: Path, tmp_path: Path, ending: str, said: str) -> None:
    script = tmp_path / "endings.py"
    script.write_text(ENDINGS)
    done = torchrun(tmp_path, str(script), str(tiny), ending)
    assert done.returncode != 0 and said in done.stderr and "went on" not in done.stdout


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    verbosity = logging.get_verbosity()
    try:
        with pytest.raises(QwenError, match=r"start it with `torchrun --nproc_per_node 2 \S+ \.\.\. --tp 2`"):
            cli_demo.main(["-c", "demo", "--tp", "2"])
    finally:
        logging.set_verbosity(verbosity)
    with pytest.raises(QwenError, match="--tp 0: a model is cut into 1 slice or more"):
        load_model_and_tokenizer("demo", tp=0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(QwenError, match="--tp 2 runs in 2 processes, not 3"):
        load_model_and_tokenizer("demo", tp=2)


def test_flags_that_contradict() -> None:
    with pytest.raises(QwenError, match="--tp chooses the devices itself"):
        cli_demo.main(["-c", "demo", "--tp", "2", "--num-gpus", "2"])


def test_what_cannot_be_split(tiny: Path, tmp_path: Path) -> None:
    from utils import check_splittable

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(QwenError, match="is a LoRA adapter, which --tp can't split: merge it"):
        check_splittable(tmp_path)
    int4 = tmp_path / "int4"
    int4.mkdir()
    config = json.loads((tiny / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (int4 / "config.json").write_text(json.dumps(config))
    with pytest.raises(QwenError, match="is quantised, which --tp can't split: use the unquantised checkpoint"):
        check_splittable(int4)


def test_one_slice_is_the_model_itself(tiny: Path) -> None:
    model, _ = load_model_and_tokenizer(tiny, device="cpu", dtype="fp32", tp=1)
    torch.testing.assert_close(model(golden.ids(10)).logits, golden.model()(golden.ids(10)).logits)
