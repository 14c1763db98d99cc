"""Fine-tune Qwen-7B: all weights, LoRA or Q-LoRA, on a CPU, one GPU or many.

python finetune.py --model_name_or_path demo --data_path finetune/sample.jsonl --output_dir output --use_lora True
python finetune.py --check_data finetune/sample.jsonl

finetune/*.sh start it on all GPUs of one or several machines; finetune/README.md describes data, memory and flags.
"""

import os
import random
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers  # its trainer, looked up where it is used, imports bitsandbytes, which must find qwen imported
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from demo_checkpoint import ensure_demo_checkpoint
from qwen import QWenTokenizer
from qwen.errors import QwenError
from qwen.paths import check_space
from training.arguments import PREFERENCES, Settings, TrainingArguments, parse_settings, stage
from training.checkpoints import check_output, check_same_run, find_resumable, identify_base
from training.data import LazyDataset, PackedDataset, PaddingCollator, TokenDataset, collate, pack, tokenize
from training.models import Start, count_parameters, find_start, load_model
from training.preference import PreferenceDataset, encode_preferences
from training.preference import make_trainer as make_preference_trainer
from training.progress import CURVE, LOG, Progress, StopOnSignal, Watch, draw_curve
from training.read import Source, check_notes
from training.report import describe_dataset, print_report
from training.samples import Notes, Text
from training.trainer import CheckpointedTrainer, QwenTrainer
from utils import DTYPES, find_checkpoint, load_config, run_script, weight_bytes

ROOT = Path(__file__).resolve().parent


def parse_args(argv: list[str] | None = None) -> Settings:
    return parse_settings(sys.argv[1:] if argv is None else argv, __doc__)


def main(argv: list[str] | None = None) -> int:
    try:
        settings = parse_args(argv)
        if settings.data.check_data is not None:
            return check_data(settings)
        return train(settings)
    except SafetensorError as error:
        raise QwenError(
            f"{settings.training.output_dir} can't be written ({error}): free some space, then resume"
        ) from None
    except QwenError:
        if int(os.environ.get("RANK", 0)):
            sys.exit(1)  # the first process says it
        raise
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save's, where the disk is full
            raise
        raise QwenError(
            f"{settings.training.output_dir} can't be written, the disk is full: free some space, then resume"
        ) from None


def train(settings: Settings) -> int:
    """One run from data to saved model; its exit status."""
    data, training = settings.data, settings.training
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, about each other
    transformers.set_seed(training.seed)
    resume = find_resumable(prepare_output(training), training.resume_from_checkpoint)
    output, adapter = Path(training.output_dir), settings.lora.use_lora
    check_output(output, settings.model.model_name_or_path, adapter)
    names = [data.data_path, data.eval_data_path]
    conversations = [read_data(data.data_path, settings, data.data_weights)]
    if data.eval_data_path:
        conversations.append(read_data(data.eval_data_path, settings))
    if data.val_size:
        conversations, names = hold_out(conversations[0], data.val_size, training.seed), [data.data_path] * 2
    with training.main_process_first(local=True, desc="download"):
        start = find_start(settings)
    if not settings.lora.use_lora:
        needed = weight_bytes(load_config(start.base), DTYPES[training.precision])
        check_space(Path(training.output_dir), needed)
    check_output(output, str(start.base), adapter)
    tokenizer = load_tokenizer(start, settings)
    datasets = [
        make_dataset(each, tokenizer, settings, given) for each, given in zip(conversations, names, strict=False)
    ]
    facts = run_facts(settings, start, datasets[0].fingerprint())
    if resume is not None:
        check_same_run(resume, facts, training.new_learning_rate)
    check_steps(len(datasets[0]), settings)
    model = load_model(settings, start, tokenizer)
    trainer = make_trainer(model, settings, start, datasets, tokenizer, facts)
    parameters = count_parameters(trainer.model)
    stopper, progress = StopOnSignal(), Progress(trainer)
    for shown_otherwise in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(shown_otherwise)
    patience = training.early_stopping_patience
    for callback in (progress, Watch(), stopper, *([transformers.EarlyStoppingCallback(patience)] if patience else [])):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        announce(settings, datasets, parameters, resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return finish(trainer, progress, stopper, settings, parameters)


def make_trainer(
    model: nn.Module, settings: Settings, start: Start, datasets: list, tokenizer: QWenTokenizer, facts: dict[str, Any]
) -> CheckpointedTrainer:
    """The trainer of the stage, for data to train on and perhaps to evaluate on."""
    train, evaluated, *_ = [*datasets, None]
    if settings.data.stage in PREFERENCES:
        return make_preference_trainer(model, settings, start, train, evaluated, tokenizer, facts)
    return QwenTrainer(
        model=model,
        args=settings.training,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        data_collator=PaddingCollator(tokenizer.eod_id) if settings.data.padding else collate,
        facts=facts,
        base=(start.name, start.revision),
    )


def source(name: str, settings: Settings) -> Source:
    """Data as the flags say that they are to be read."""
    data = settings.data
    pairs = [pair.partition("=") for pair in data.columns]
    if bad := next((f"{known}{sign}{own}" for known, sign, own in pairs if not (known and own)), None):
        raise QwenError(f"--columns {bad}: write the name known here, =, and that of your column")
    return Source(name, data.stage, data.data_encoding, data.data_split, {own: known for known, _, own in pairs},
                  tuple(data.ignore_fields))  # fmt: skip


def read_data(names: list[str], settings: Settings, weights: Sequence[float] = ()) -> list:
    """All samples of these data, each taken as often as its weight says; QwenError for bad ones, after a list of all of
    them, unless they are to be skipped."""
    notes, samples = Notes(), []
    for index, name in enumerate(names):
        found = list(source(name, settings).samples(notes))
        taken = repeat(found, weights[index], settings.training.seed) if weights else found
        if weights and settings.training.should_log:
            print(f"{name}: {len(taken):,} samples taken out of {len(found):,}", file=sys.stderr)
        samples += taken
    if settings.training.should_log:
        for text in (notes.list_remarks(), notes.list_faults()):
            if text:
                print(text, file=sys.stderr)
    if notes.bad and settings.data.skip_bad_samples and samples:
        if settings.training.should_log:
            print(f"{notes.bad:,} of {notes.samples:,} samples are bad and left out.", file=sys.stderr)
    else:
        check_notes(notes, names)
    return samples


def repeat(samples: list, weight: float, seed: int) -> list:
    """The samples `weight` times: whole rounds, and of the last one a part drawn by the seed, in their order."""
    rounds, part = divmod(round(weight * len(samples)), len(samples)) if samples else (0, 0)
    drawn = sorted(random.Random(seed).sample(range(len(samples)), part))
    return samples * rounds + [samples[index] for index in drawn]


def hold_out(samples: list, size: float, seed: int) -> list[list]:
    """Samples to train on and others to evaluate on, drawn by the seed; a size below 1 is a share. What comes from one
    row of the data, or from it several times, stays on one side; it is evaluated once."""
    rows = list(dict.fromkeys(sample.where for sample in samples))
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise QwenError(f"--val_size {size:g} takes {count} of {len(rows)} samples: some must be left on both sides")
    chosen = set(random.Random(seed).sample(rows, count))
    evaluated = dict.fromkeys(sample for sample in samples if sample.where in chosen)
    return [[sample for sample in samples if sample.where not in chosen], list(evaluated)]


def run_facts(settings: Settings, start: Start, data: str) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must have in common with the one that wrote it."""
    lora, training = settings.lora, settings.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    facts = {
        "data": data, "stage": settings.data.stage, "loss_on": settings.data.loss_on, "seed": training.seed,
        "adapter": lora.use_lora,
        "base model": identify_base(start.base, start.adapter), "precision": training.precision,
        "optim": str(training.optim), "learning_rate": training.learning_rate,
        "lr_scheduler_type": str(training.lr_scheduler_type), "batch (samples a step)": batch,
        "trainable_layers": lora.trainable_layers, "loraplus_lr_ratio": training.loraplus_lr_ratio,
    }  # fmt: skip
    return facts | (vars(lora) if lora.use_lora else {})


def prepare_output(training: TrainingArguments) -> Path:
    """The output directory, made; QwenError if it can't be."""
    output = Path(training.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise QwenError(f"--output_dir {output} can't be written ({error.strerror}): give another directory") from error
    return output


def load_tokenizer(start: Start, settings: Settings) -> QWenTokenizer:
    """The checkpoint's tokenizer; a warning where samples may be longer than the model was trained for."""
    config = load_config(start.base)
    longest = settings.data.model_max_length
    if longest > config.seq_length:
        print(f"--model_max_length {longest} is more than this model's training length {config.seq_length}: longer "
              "samples teach it positions it has never seen.", file=sys.stderr)  # fmt: skip
    return QWenTokenizer.from_pretrained(start.tokenizer)


def make_dataset(
    conversations: list, tokenizer: QWenTokenizer, settings: Settings, names: list[str]
) -> TokenDataset | PackedDataset | LazyDataset | PreferenceDataset:
    """Tokenised (or soon to be) samples; QwenError if none has anything to learn from."""
    data = settings.data
    quiet = not settings.training.should_log
    if data.stage in PREFERENCES:
        pairs = encode_preferences(conversations, tokenizer, data.model_max_length, data.stage)
        if not quiet:
            print(describe_dataset(pairs), file=sys.stderr)
        return pairs
    if data.lazy_preprocess:
        if any(isinstance(each, Text) for each in conversations):
            raise QwenError(
                "--lazy_preprocess reads conversations; plain texts are cut into pieces first: leave it out"
            )
        lazy = LazyDataset(conversations, tokenizer, data.model_max_length, data.loss_on)
        if lazy.dropped and not quiet:
            print(f"{lazy.dropped:,} of {len(conversations):,} samples dropped: no reply to learn from, or the first "
                  "does not fit", file=sys.stderr)  # fmt: skip
        return lazy
    samples = tokenize(conversations, tokenizer, data.model_max_length, data.loss_on, quiet)
    if not len(samples):
        raise QwenError(
            f"no sample of {', '.join(names)} can be trained on ({describe_dataset(samples)}): give replies to learn, "
            f"or raise --model_max_length {data.model_max_length}"
        )
    if not quiet:
        print(describe_dataset(samples), file=sys.stderr)
    return PackedDataset(samples, pack(samples.lengths, data.model_max_length)) if data.packing else samples


def check_steps(samples: int, settings: Settings) -> None:
    """QwenError if the data would not make a single step."""
    training = settings.training
    batch = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and samples < batch:
        raise QwenError(
            f"{samples} samples or packs don't fill a batch of {batch}, and --dataloader_drop_last drops the rest: no "
            "step would be made"
        )


def announce(settings: Settings, datasets: list, parameters: tuple[int, int], resume: Path | None) -> None:
    """Say what is about to be trained, and on what."""
    training = settings.training
    method = "Q-LoRA" if settings.lora.q_lora else "LoRA" if settings.lora.use_lora else "all weights"
    print(
        f"Training {settings.model.model_name_or_path} ({method}: {parameters[0]:,} of {parameters[1]:,} parameters) "
        f"in {training.precision} on {training.world_size} x {training.device.type}, {len(datasets[0]):,} "
        f"{'packs' if settings.data.packing else 'samples'}, learning rate {training.learning_rate:g}"
        + (f"; going on from {resume}" if resume else ""),
        file=sys.stderr,
    )


def finish(
    trainer: CheckpointedTrainer,
    progress: Progress,
    stopper: StopOnSignal,
    settings: Settings,
    parameters: tuple[int, int],
) -> int:
    """Evaluate, save and report; or say how a stopped run goes on."""
    training, output = settings.training, Path(settings.training.output_dir)
    if stopper.signal is not None:
        print(f"Stopped at step {trainer.state.global_step}: the same command with --resume_from_checkpoint True goes "
              "on from there.", file=sys.stderr)  # fmt: skip
        return 128 + stopper.signal
    if trainer.state.global_step == 0:
        raise QwenError("no step was made: look at --max_steps, --num_train_epochs and the number of samples")
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if isinstance(trainer.model, transformers.PreTrainedModel) and not stage(training):
        trainer.model.to(DTYPES[training.precision])  # as it was computed with; checkpoints keep float32
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        drawn = draw_curve(progress.records, output / CURVE)
        print("\n" + progress.table(parameters))
        print(f"\nSaved in {output}, the log in {output / LOG}{f', the curve in {output / CURVE}' if drawn else ''}.")
        if settings.data.stage != "rm":  # a reward model says nothing
            print(f"python cli_demo.py -c {output}")
    return 0


def check_data(settings: Settings) -> int:
    """Report on data, bad samples and all; no model is loaded."""
    path, name = settings.data.check_data, settings.model.model_name_or_path
    notes = Notes()
    conversations = list(source(path, settings).samples(notes))
    if not notes.samples:
        check_notes(notes, [path])
    if name == "demo" or Path(name).is_dir():
        tokenizer = QWenTokenizer.from_pretrained(find_checkpoint(name))
    else:
        try:
            tokenizer = QWenTokenizer.from_pretrained(name, revision=settings.model.revision)
        except OSError:
            print(f"The vocabulary of {name} is not to be had: counting with the demo model's.", file=sys.stderr)
            tokenizer = QWenTokenizer.from_pretrained(ensure_demo_checkpoint())
    if settings.data.stage in PREFERENCES:
        samples = encode_preferences(conversations, tokenizer, settings.data.model_max_length, settings.data.stage)
    else:
        samples = tokenize(conversations, tokenizer, settings.data.model_max_length, settings.data.loss_on)
    print_report(path, conversations, samples, tokenizer, settings.data, notes)
    return 0 if len(samples) and (settings.data.skip_bad_samples or not notes.bad) else 1


if __name__ == "__main__":
    run_script(main)
