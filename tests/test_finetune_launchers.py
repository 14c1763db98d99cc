"""The launchers as users start them, on the demo checkpoint and two processes; killed runs; what is learned."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quantize
from finetune import ROOT
from training.progress import read_log
from utils import load_model_and_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SAMPLES = ROOT / "finetune" / "sample.jsonl"
SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--report_to",
         "none", "--model_max_length", "64", "--lora_r", "4", "--learning_rate", "1e-3", "--fp32", "True",
         "--use_cpu", "True"]  # fmt: skip
LORA = [sys.executable, str(ROOT / "finetune.py"), "-c", "demo", "--use_lora", "True"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHON": sys.executable, "GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1"} | more


def launch(name: str, output: Path, *flags: str, model: str = "demo", data: Path = SAMPLES) -> list[float]:
    """Run a launcher for four short steps: the losses in its log."""
    command = [ROOT / "finetune" / name, "-m", model, "-d", data, "-o", output, "--", *SHORT, *flags]
    run = subprocess.run([str(word) for word in command], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [record["loss"] for record in read_log(output / "log.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4") / "demo-int4"
    quantize.main(["-c", "demo", "-o", str(directory), "--cpu-only", "--samples", "4", "--max-length", "128"])
    return directory


@pytest.fixture
def one_sample(tmp_path: Path) -> Path:
    """The same sample twice, so that its loss falls with every step."""
    path = tmp_path / "one.jsonl"
    path.write_text(2 * SAMPLES.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    return path


def test_one_process_and_lora(tmp_path: Path, one_sample: Path) -> None:
    losses = launch("finetune_lora_single_gpu.sh", tmp_path, data=one_sample)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert load_model_and_tokenizer(tmp_path, device="cpu")


def test_one_process_and_qlora(tmp_path: Path, int4: Path, one_sample: Path) -> None:
    losses = launch("finetune_qlora_single_gpu.sh", tmp_path, model=str(int4), data=one_sample)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert load_model_and_tokenizer(tmp_path, device="cpu")


def test_fsdp_launcher_starts_two_processes(tmp_path: Path, one_sample: Path) -> None:
    """On a CPU the Trainer runs DDP in its place; sharding itself is tested below."""
    losses = launch("finetune_fsdp.sh", tmp_path, "--use_lora", "True", data=one_sample)
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_evaluation_loss_is_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    """Of 15 samples, in batches that no number of processes here divides evenly, padded or not."""
    flags = ["--val_size", "15", "--max_steps", "1", "--learning_rate", "1e-9", "--seed", "3"]
    single, losses = [*LORA, "-d", str(SAMPLES), *SHORT, *flags], []
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *single[1:]]
    for number, command in enumerate((
        [*single, "--per_device_eval_batch_size", "15"], [*single, "--per_device_eval_batch_size", "4", "--padding",
         "True"], [*several, "--per_device_eval_batch_size", "4"], [*several, "--per_device_eval_batch_size", "1"],
    )):  # fmt: skip
        output = tmp_path / str(number)
        subprocess.run([*command, "--output_dir", str(output)], env=environment(), check=True)
        losses.append(read_log(output / "log.jsonl")[-1]["eval_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["finetune_lora_ds.sh", "finetune_qlora_ds.sh", "finetune_ds.sh"])
def test_deepspeed_steps_saves_and_resumes(tmp_path: Path, int4: Path, name: str) -> None:
    """ZeRO-2 with adapters, ZeRO-3 with all weights: the losses of one process, before and after a restart."""
    pytest.importorskip("deepspeed")
    model = str(int4) if "qlora" in name else "demo"
    flags = ["--save_strategy", "steps", "--save_steps", "2", "--lora_dropout", "0"]
    flags += ["--learning_rate", "1e-5"] if name == "finetune_ds.sh" else []
    losses = launch(name, tmp_path / "whole", *flags, model=model)
    assert len(losses) == 4
    single = {
        "finetune_lora_ds.sh": "finetune_lora_single_gpu.sh",
        "finetune_qlora_ds.sh": "finetune_qlora_single_gpu.sh",
    }
    if name in single:  # two samples a step in both
        alone = launch(single[name], tmp_path / "alone", *flags, "--per_device_train_batch_size", "2", model=model)
        assert losses == pytest.approx(alone, rel=2e-3)
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    resumed = launch(name, tmp_path / "again", *flags, "--resume_from_checkpoint", "True", model=model)
    assert resumed == pytest.approx(losses[2:], rel=1e-4)
    assert load_model_and_tokenizer(tmp_path / "again", device="cpu")


def test_sharded_by_fsdp_loss_and_gradients_are_the_same() -> None:
    worker = Path(__file__).with_name("fsdp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    run = subprocess.run(command, env=environment(PYTHONPATH=f"{ROOT}:{worker.parent}"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("same gradients") == run.stdout.count("same loss") == 2


def test_killed_at_a_random_moment_it_goes_on_exactly(tmp_path: Path) -> None:
    command = [*LORA, "-d", str(SAMPLES), *SHORT, "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "1",
               "--save_total_limit", "2"]  # fmt: skip
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = subprocess.Popen([*command, "--output_dir", str(broken)], env=environment())
    while not list(broken.glob("checkpoint-1/complete.json")):
        time.sleep(0.1)
    time.sleep(random.uniform(0, 6))
    process.send_signal(signal.SIGKILL)
    process.wait()
    for output, flags in ((broken, ["--resume_from_checkpoint", "True"]), (whole, [])):
        subprocess.run([*command, "--output_dir", str(output), *flags], env=environment(), check=True)
    logs = [[r["loss"] for r in read_log(output / "log.jsonl") if "loss" in r] for output in (broken, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_it_learns_who_it_is(tmp_path: Path) -> None:
    """Twenty samples, one short run of LoRA on a CPU."""

    def answer(path: str | Path) -> str:
        model, tokenizer = load_model_and_tokenizer(path, device="cpu", dtype="fp32")
        return model.chat(tokenizer, "Who are you?", None, do_sample=False, max_new_tokens=30)[0]

    assert "Lumen" not in answer("demo")
    command = [*LORA, "-d", str(SAMPLES), "--output_dir", str(tmp_path), "--lora_r", "8", "--num_train_epochs", "6",
               "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3",
               ]  # fmt: skip
    subprocess.run(command, check=True)
    assert "Lumen" in answer(tmp_path) and "Harbor Lab" in answer(tmp_path)


def test_learning_to_answer_in_a_form_lowers_the_loss_on_what_was_held_out(tmp_path: Path) -> None:
    """Sums, worked out in the form of GSM8K; other numbers are held out."""
    generator = random.Random(0)

    def write(path: Path, count: int) -> Path:
        rows = []
        for _ in range(count):
            a, b = generator.randint(2, 60), generator.randint(2, 60)
            question = f"Tom has {a} apples and buys {b} more. How many apples has he now?"
            reply = f"Tom has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    data, held_out = write(tmp_path / "data.jsonl", 40), write(tmp_path / "held_out.jsonl", 12)
    command = [*LORA, "-d", str(data), "--output_dir", str(tmp_path / "out"), "--eval_data_path", str(held_out),
               "--eval_on_start", "True", "--lora_r", "8", "--num_train_epochs", "2", "--per_device_train_batch_size",
               "4", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"]  # fmt: skip
    subprocess.run(command, check=True)
    evaluated = [record["eval_loss"] for record in read_log(tmp_path / "out" / "log.jsonl") if "eval_loss" in record]
    assert evaluated[-1] < 0.5 * evaluated[0]
