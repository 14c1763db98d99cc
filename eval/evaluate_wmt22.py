"""WMT22, Chinese-English news, base models: five example pairs, then the sentence; scored with sacrebleu.

    python eval/evaluate_wmt22.py -c Qwen/Qwen-7B
    python eval/evaluate_wmt22.py -c Qwen/Qwen-7B -d data/wmt22 --subjects en-zh

Without -d sacrebleu downloads the test sets. A directory holds zh-en.src, zh-en.ref, en-zh.src and en-zh.ref, a
sentence a line, as `sacrebleu -t wmt22 -l zh-en --echo src` prints them. The examples are drawn from the test
set, never the sentence itself, by --seed.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.runner import make_parser, run
from eval.sources import Origin, choose_subjects, missing
from eval.task import Record, Sample, Score, Task, Verdict
from qwen import QwenError
from qwen.errors import first_line
from utils import run_script

PAIRS = ("zh-en", "en-zh")
LANGUAGES = {"zh": "Chinese", "en": "English"}
SHOTS = 5
ORIGIN = Origin("WMT22", "`sacrebleu -t wmt22 -l zh-en --echo src > zh-en.src` (and ref; and en-zh)")


class EvaluateWmt22(Task):
    name = "wmt22"
    title = "WMT22, 5-shot"
    stop_words = ("\n",)

    def load(self) -> list[Sample]:
        samples = []
        for pair in choose_subjects(self.args.subjects, PAIRS):
            source, reference = (read_side(self.args.data, pair, side) for side in ("src", "ref"))
            if len(source) != len(reference):
                raise QwenError(
                    f"{pair}.src has {len(source)} sentences and {pair}.ref has {len(reference)}: a line is missing in "
                    f"one of them; make them again with {ORIGIN.where}"
                )
            rows = list(zip(source, reference, strict=True))
            for number, (source, reference) in enumerate(rows[: self.args.limit]):
                draw = random.Random(f"{self.args.seed} {pair} {number}")
                others = draw.sample([i for i in range(len(rows)) if i != number], min(SHOTS, len(rows) - 1))
                row = {"source": source, "reference": reference, "shots": [rows[i] for i in others]}
                samples.append(Sample(f"{pair}/{number}", pair, row))
        return samples

    def question(self, sample: Sample) -> str:
        source, target = (LANGUAGES[language] for language in sample.group.split("-"))
        asked = [f"{source} phrase: {text}\n{target} phrase:" for text, _ in sample.row["shots"]]
        shots = [f"{text} {answer}" for text, (_, answer) in zip(asked, sample.row["shots"], strict=True)]
        return "\n\n".join([*shots, f"{source} phrase: {sample.row['source']}\n{target} phrase:"])

    def judge(self, sample: Sample, record: Record) -> Verdict:
        """A sentence has no score of its own: BLEU is that of all of them."""
        return Verdict(0.0, record["text"].strip(), sample.row["reference"])

    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        result = []
        for pair in dict.fromkeys(sample.group for sample in samples):
            chosen = [v for s, v in zip(samples, verdicts, strict=True) if s.group == pair]
            texts, references = [v.answer for v in chosen], [v.gold for v in chosen]
            if pair == "en-zh":
                result.append(bleu("en-zh, BLEU of jieba words", *map(split_words, (texts, references))))
                result.append(bleu("en-zh, BLEU (sacrebleu, tokenize=zh)", texts, references, tokenize="zh"))
            else:
                result.append(bleu("zh-en, BLEU", texts, references))
        return result


def read_side(folder: Path | None, pair: str, side: str) -> list[str]:
    """The sentences of one side, from files or through sacrebleu."""
    if folder is None:
        from sacrebleu import utils

        try:
            dataset = utils.DATASETS["wmt22"]
            file = dataset.get_source_file(pair) if side == "src" else dataset.get_reference_files(pair)[0]
            path = Path(file)
        except Exception as error:  # whatever a download raises
            raise QwenError(
                f"sacrebleu could not download WMT22 ({first_line(error)}): make the files elsewhere with "
                f"{ORIGIN.where} and name their directory with -d"
            ) from error
    else:
        path = folder / f"{pair}.{side}"
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise missing(path, ("a sentence a line",), ORIGIN, header=False) from None
    except (OSError, UnicodeDecodeError) as error:
        raise QwenError(f"cannot read {path} ({error}): make it again with {ORIGIN.where}") from None
    if not any(line.strip() for line in lines):
        raise QwenError(f"{path} is empty: make it again with {ORIGIN.where}")
    return lines


def split_words(texts: Sequence[str]) -> list[str]:
    """Chinese text with blanks between words, as the published score counts them."""
    import jieba

    jieba.setLogLevel("ERROR")
    return [" ".join(jieba.cut(text.strip())) for text in texts]


def bleu(name: str, texts: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Score:
    """sacrebleu's corpus BLEU; the standard error is that of 1000 resampled corpora."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize)
    if len(texts) < 2:
        return Score(name, metric.corpus_score(texts, [references]).score, None, len(texts))
    found = metric.corpus_score(texts, [references], n_bootstrap=1000)
    return Score(name, found.score, found._ci / 1.96, len(texts))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateWmt22, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateWmt22, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
