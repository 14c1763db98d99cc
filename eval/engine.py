"""Run a model over many prompts with its engine, which reads once what they have in common (qwen/engine.py)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from eval.task import Prompt, Record
from qwen import QwenError, QWenTokenizer
from qwen import engine as serving
from qwen.chat import check_lengths, new_decoder
from qwen.engine import Limits, Request, Update
from qwen.pages import kv_room
from qwen.reply import StopWord
from qwen.sampling import Sampling

MOST_ROWS = 32  # prompts that are computed together
CHUNK = 256  # tokens of prompts in a step beside replies; four times as many where there are none
BATCH = 64  # prompts that are asked at once: rows that end are followed by others, up to the end of the batch


def plan_batches(prompts: Sequence[Prompt], size: int = BATCH) -> list[tuple[int, ...]]:
    """The prompts' numbers in batches of `size`: family after family, longest first within one.

    They depend on the prompts alone, not on what is done already or on how many processes share the work, so a run
    that was interrupted or spread computes the very same numbers.
    """
    families: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        families.setdefault(prompt.family, []).append(number)
    batches = []
    for members in families.values():
        members = sorted(members, key=lambda number: (-len(prompts[number].ids), number))
        batches += [tuple(members[i : i + size]) for i in range(0, len(members), size)]
    return batches


class Engine:
    """Answers batches of prompts: the log-probabilities of `choices`, or greedy replies that end at `stops`."""

    def __init__(
        self,
        model: Any,
        tokenizer: QWenTokenizer,
        choices: Sequence[str] = (),
        stops: Sequence[StopWord] = (),
        max_new_tokens: int = 512,
        rows: int = MOST_ROWS,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.choices = {choice: single_token(tokenizer, choice) for choice in choices}
        self.stops = list(stops)
        self.max_new_tokens = max_new_tokens
        limits = Limits(rows, max_queue=10**6, kv_tokens=kv_room(model), chunk=CHUNK, timeout=math.inf)
        self.engine = serving.Engine(model, tokenizer, limits)

    def answer(
        self, prompts: Sequence[Sequence[int]], answered: Callable[[int, Record], None] = lambda number, record: None
    ) -> list[Record]:
        """A record for each prompt; `answered` hears of each as soon as it is there, in the engine's thread.

        Raises:
            QwenError: a prompt is too long, memory can't hold it, or logits are not finite.
        """
        check_lengths(self.model, prompts)
        requests = [self._request(prompt) for prompt in prompts]
        for request in requests:
            if request.size > self.engine.context:
                raise QwenError(
                    f"a prompt of {len(request.prompt):,} tokens and its reply of up to {request.max_tokens:,} don't "
                    f"fit into the {self.engine.context:,} tokens that the memory for keys and values holds"
                )
        records: dict[int, Record] = {}

        def hear(number: int, update: Update) -> None:
            if update.finish_reason:
                records[number] = self._record(requests[number], update)
                answered(number, records[number])

        self.engine.write(requests, hear=hear)
        return [records[number] for number in range(len(requests))]

    def _request(self, prompt: Sequence[int]) -> Request:
        greedy = Sampling(temperature=0.0)
        if self.choices:
            return Request(prompt, 0, greedy, scored=list(self.choices.values()))
        room = self.model.config.max_context_length - len(prompt)
        decoder = new_decoder(self.tokenizer, self.model.generation_config, self.stops, strip=False)
        return Request(prompt, min(self.max_new_tokens, room), greedy, decoder=decoder)

    def _record(self, request: Request, update: Update) -> Record:
        if self.choices:
            logprobs = dict(zip(self.choices, update.scores, strict=True))
            return {"logprobs": logprobs, "prompt_tokens": len(request.prompt)}
        decoder = request.decoder
        return {
            "text": decoder.text,
            "finish_reason": decoder.finish_reason,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": decoder.tokens,
        }


def single_token(tokenizer: QWenTokenizer, text: str) -> int:
    ids = tokenizer.encode_text(text)
    if len(ids) != 1:
        raise QwenError(f"{text!r} is {len(ids)} tokens of this checkpoint's vocabulary, and a choice must be one")
    return ids[0]
