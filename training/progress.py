"""What a run tells: a bar, the log as JSON lines, a loss curve, a table at the end, and why it had to stop."""

import json
import math
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from profiling.measure import peak_bytes
from qwen.errors import QwenError

from .arguments import TrainingArguments, precision
from .speed import peak_flops, training_flops
from .trainer import CheckpointedTrainer

LOG, CURVE = "log.jsonl", "loss.png"
RANKED = ("rewards/accuracies", "accuracy")  # TRL's names: of DPO, of a reward model


class Progress(TrainerCallback):
    """Bar, log and figures of speed; on the first process alone, but counted over all."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer
        self.path = Path(trainer.args.output_dir) / LOG
        self.records: list[dict[str, float]] = []
        self.bar: tqdm | None = None
        self.start = self.last = time.perf_counter()
        self.counted = (0.0, 0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Of the run that this one goes on with, up to its checkpoint.
            before = read_log(self.path) if state.global_step else []
            self.records = [record for record in before if record["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", file=sys.stderr,
                dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30,
            )  # fmt: skip
        self.start = self.last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float],
        model: nn.Module | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if "train_loss" in logs:  # the Trainer's summary
            return
        record = {"step": state.global_step, **logs}
        if "loss" in logs:
            record |= self.speed(time.perf_counter())
        if self.bar is None:
            return
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.bar.set_postfix_str(
            " ".join(f"{name} {record[key]:{form}}" for name, key, form in (
                ("loss", "loss", ".4f"), ("eval loss", "eval_loss", ".4f"), ("tok/s", "tokens_per_s", ",.0f"),
            ) if key in record)
        )  # fmt: skip

    def speed(self, now: float) -> dict[str, float]:
        """Figures since the last call; every process calls this."""
        trainer = self.trainer
        totals = trainer.work.totals(trainer.accelerator)
        tokens, supervised, pairs = (total - before for total, before in zip(totals, self.counted, strict=True))
        seconds, self.last, self.counted = now - self.last, now, totals
        device = trainer.args.device
        figures = {
            "tokens_per_s": round(tokens / seconds, 1),
            "supervised_tokens_per_s": round(supervised / seconds, 1),
            "peak_gib": round(peak_bytes(device) / 2**30, 2),
        }
        if peak := peak_flops(device, precision(trainer.args)):
            flops = training_flops(trainer.model, trainer.accelerator.unwrap_model(trainer.model).config, tokens,
                                   supervised, pairs)  # fmt: skip
            figures["mfu"] = round(flops / seconds / peak / trainer.args.world_size, 4)
        return figures

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def table(self, parameters: tuple[int, int]) -> str:
        """The run in figures, as Markdown."""
        seconds = self.last - self.start
        losses = [record["loss"] for record in self.records if "loss" in record]
        evaluated = [record["eval_loss"] for record in self.records if "eval_loss" in record]
        shares = [record["mfu"] for record in self.records if "mfu" in record]
        tokens, supervised, _ = self.counted
        rows = [
            ("steps", f"{self.trainer.state.global_step}"),
            ("loss, first and last", f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "–"),
            ("evaluation loss", f"{evaluated[-1]:.4f}" if evaluated else "–"),
            *(
                (f"share of pairs ranked rightly, {place}", f"{ranked[-1]:.1%}")
                for place, prefix in (("training", ""), ("evaluation", "eval_"))
                if (
                    ranked := [
                        record[prefix + name] for record in self.records for name in RANKED if prefix + name in record
                    ]
                )
            ),
            ("tokens trained on in this run", f"{tokens:,.0f} ({supervised:,.0f} with loss)"),
            ("tokens/s", f"{tokens / seconds:,.0f} ({supervised / seconds:,.0f} with loss)" if seconds else "–"),
            ("share of the hardware's peak (MFU)", f"{sum(shares) / len(shares):.1%}" if shares else "–"),
            ("peak memory", f"{peak_bytes(self.trainer.args.device) / 2**30:.2f} GiB"),
            ("parameters trained", f"{parameters[0]:,} of {parameters[1]:,} ({parameters[0] / parameters[1]:.2%})"),
            ("time", f"{seconds:,.0f} s"),
        ]
        return "\n".join(["| run | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


class Watch(TrainerCallback):
    """Stops a run that learns nothing, with the likely cause."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            cause = (
                "float16 overflowed: use --bf16 True where the GPU can, or" if args.fp16 else "most often the cause is"
            )
            raise QwenError(
                f"the loss is {loss} at step {state.global_step}: {cause} a learning rate that is too high "
                f"(--learning_rate {args.learning_rate}); the last checkpoint in {args.output_dir} is still good"
            )
        if loss == 0:
            raise QwenError(
                f"the loss is exactly 0 at step {state.global_step}: no token carries loss, or the weights are broken; "
                "look at the data with --check_data"
            )


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    torchrun passes a Ctrl-C on to processes that the terminal has sent it to: twice at once is once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT and time.monotonic() - self.since > 2:
                raise KeyboardInterrupt
            return
        self.signal, self.since = number, time.monotonic()
        print("\nStopping after this step, with a checkpoint; again to stop at once.", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop = self.signal is not None
        if args.world_size > 1:  # all stop after the same step, or they would wait for each other forever
            flag = torch.tensor(float(stop), device=args.device)
            torch.distributed.all_reduce(flag)
            stop = bool(flag)
        if stop:
            self.signal = self.signal or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a log; a line that a killed run left half written is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def draw_curve(records: list[dict[str, float]], path: Path) -> bool:
    """Write the loss curve as a PNG; whether matplotlib is there to do it."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 60 else None)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)
    return True
