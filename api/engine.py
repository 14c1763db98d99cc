"""Continuous batching: one thread decodes all running requests together, a token each in every step.

A request joins and leaves between any two steps; its keys and values are its own (qwen.cache.JointCache), so nobody is
copied or waits for it. Prompts are read in chunks between the steps, so that others keep streaming meanwhile.

transformers' ContinuousBatchingManager would be the other way to do this. It can't know a request's repetition penalty,
stop words, grammar or NTK factor, and its paged attention can't run the compiled CPU decoder: hence this one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen import QWenTokenizer
from qwen.cache import JointCache
from qwen.errors import first_line
from qwen.modeling_qwen import dynamic_ntk_alpha
from qwen.reply import ReplyDecoder, StopWord
from qwen.sampling import Choice, Sampler, Sampling, describe

from .grammar import Constraint
from .metrics import Metrics
from .prefix_cache import Conversation, PrefixCache


@dataclass(frozen=True)
class Limits:
    """What the engine takes on at once; more waits, and more than that is refused."""

    max_batch: int = 16  # requests that decode together
    max_queue: int = 64  # requests that wait
    kv_tokens: int = 32768  # tokens of running requests and kept prompts, together
    chunk: int = 128  # tokens of a prompt read between two steps
    timeout: float = 600.0  # seconds a request may take, waiting included


class QueueFull(Exception):
    """No more requests can wait."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """One reply to make."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_words: Sequence[StopWord] = ()
    stop_ids: Sequence[int] = ()
    constraint: Constraint | None = None
    strip: bool = True  # leave out blanks at either end of the reply
    prompt_logprobs: int | None = None  # wanted for the prompt's tokens too: for how many of the likeliest
    include_stop: bool = False  # the reply ends after its stop, not before it

    @property
    def size(self) -> int:
        """Tokens it may come to hold."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Update:
    """What one step adds to a reply. The last one has a finish_reason (stop, stop_word, length) or an error."""

    text: str = ""
    choices: Sequence[Choice] = ()
    prompt_choices: Sequence[Choice] = ()
    finish_reason: str | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    stop: str | Sequence[int] | None = None  # what ended the reply: a stop word, or ids


class Job:
    """A request on its way through the engine."""

    def __init__(self, request: Request, deliver: Callable[[Update], None], timeout: float) -> None:
        self.request = request
        self.deliver = deliver
        self.cancelled = False  # set by any thread; noticed before the next step
        self.submitted = time.monotonic()
        self.deadline = self.submitted + timeout
        self.last_token: float | None = None
        self.cached_tokens = 0
        self.prompt_choices: list[Choice] = []
        self.conversation: Conversation | None = None  # from its first chunk on
        self.slot: int | None = None  # in the sampler
        self.decoder: ReplyDecoder | None = None

    @property
    def is_read(self) -> bool:
        """Whether its prompt is read, so that it decodes."""
        return self.conversation is not None and len(self.conversation) >= len(self.request.prompt)


class Engine:
    """Owns the model and the thread that runs it; `submit` and `cancel` may be called from any thread."""

    def __init__(
        self, model: Any, tokenizer: QWenTokenizer, limits: Limits | None = None, metrics: Metrics | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limits, self.metrics = limits or Limits(), metrics or Metrics()
        self.prefixes = PrefixCache()
        self.context = min(model.config.max_context_length, self.limits.kv_tokens)
        self.sampler = Sampler(model.config.vocab_size, model.device, self.limits.max_batch)
        self.free_slots = list(range(self.limits.max_batch))
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.closing: float | None = None  # when what still runs is ended
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="qwen-engine", daemon=True)
        self.thread.start()

    # ---- for other threads ----

    def submit(self, requests: Sequence[Request], deliver: Callable[[int, Update], None]) -> list[Job]:
        """Queue requests, all or none; `deliver(number of the request, update)` is called from the engine's thread.

        Raises:
            QueueFull, Closed: they are not taken.
        """
        if any(request.size > self.context or not request.prompt for request in requests):
            raise ValueError(f"a request holds 1 to {self.context} tokens, its reply included")
        with self.wake:
            if self.closing is not None:
                raise Closed
            wanted = [job for job in (*self.running, *self.waiting) if not job.cancelled]
            if len(wanted) + len(requests) > self.limits.max_queue + self.limits.max_batch:
                raise QueueFull
            jobs = [
                Job(request, lambda update, number=number: deliver(number, update), self.limits.timeout)
                for number, request in enumerate(requests)
            ]
            self.waiting.extend(jobs)
            self.wake.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs before their next step, without another word to whoever asked for them."""
        for job in jobs:
            job.cancelled = True
        with self.wake:
            self.wake.notify()

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, and end with an error what has not ended in `grace` seconds."""
        with self.wake:
            if self.closing is None:
                self.closing = time.monotonic() + grace
            self.wake.notify()

    def close_now(self) -> None:
        """End with an error what still runs."""
        self.close()
        self.closing = 0.0

    def join(self) -> None:
        """Wait until nothing runs any more, after `close`."""
        self.thread.join()

    # ---- the thread ----

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self.wake:
                    while not self.running and not self.waiting and self.closing is None:
                        self.wake.wait()
                    if self.closing is not None and not self.running and not self.waiting:
                        return
                try:
                    self._step()
                except Exception as error:  # nothing that can be foreseen; still nobody shall wait for ever
                    for job in (*self.running, *self.waiting):
                        self._fail(job, error)

    def _step(self) -> None:
        """Drop who is done with, let in who fits, read one chunk of one prompt, then one token for all others."""
        self._drop()
        self._admit()
        unread = next((job for job in self.running if not job.is_read), None)
        decoding = [job for job in self.running if job.is_read]
        if unread is not None:
            self._guard([unread], lambda: self._read(unread, alone=not decoding))
        if decoding:
            self._guard(decoding, lambda: self._decode(decoding))
        self._count()

    def _drop(self) -> None:
        now = time.monotonic()
        for job in (*self.running, *self.waiting):
            if job.cancelled:
                self._leave(job)
            elif now > job.deadline:
                self._fail(job, TimeoutError(f"the request took longer than {self.limits.timeout:g} seconds"))
            elif self.closing is not None and now > self.closing:
                self._fail(job, Closed("the server is shutting down"))

    def _admit(self) -> None:
        """Whoever waits, in order, as long as there is memory for all that it may come to hold."""
        with self.wake:
            while self.waiting and len(self.running) < self.limits.max_batch:
                if self.reserved + self.waiting[0].request.size > self.limits.kv_tokens:
                    break
                self.running.append(self.waiting.popleft())
        self.prefixes.shrink(self.limits.kv_tokens - self.reserved)

    @property
    def reserved(self) -> int:
        """Tokens that running requests may come to hold."""
        return sum(job.request.size for job in self.running)

    def _begin(self, job: Job) -> None:
        """Before a job's first chunk. Not earlier: the prompt it shares with another may have been read meanwhile."""
        request, config = job.request, self.model.config
        alpha = float(dynamic_ntk_alpha(torch.tensor([len(request.prompt)]), config.seq_length))
        conversation = Conversation(list(request.prompt), alpha if config.use_dynamic_ntk else 1.0)
        if request.prompt_logprobs is None:
            others = [other.conversation for other in self.running if other.conversation is not None]
            conversation.cache = self.prefixes.take(request.prompt, conversation.alpha, others)
        job.slot = self.free_slots.pop()
        self.sampler.begin(job.slot, request.sampling, request.prompt)
        job.decoder = ReplyDecoder(
            self.tokenizer, request.stop_ids, request.stop_words, request.strip, request.sampling.min_tokens,
            request.include_stop,
        )  # fmt: skip
        job.conversation = conversation
        job.cached_tokens = len(conversation)
        self.metrics.prompt_tokens.inc(len(request.prompt))
        self.metrics.cached_tokens.inc(job.cached_tokens)

    def _read(self, job: Job, alone: bool) -> None:
        """The next chunk of a prompt, a larger one where nobody waits for it; after the last one, the first token."""
        if job.conversation is None:
            self._begin(job)
        conversation, prompt = job.conversation, job.request.prompt
        start = len(conversation)
        ids = prompt[start : start + self.limits.chunk * (4 if alone else 1)]
        logits = self.model(
            torch.tensor([ids], device=self.model.device),
            past_key_values=conversation.cache,
            ntk_alpha=torch.tensor([conversation.alpha]),
            use_cache=True,
            logits_to_keep=1 if job.request.prompt_logprobs is None else 0,
        ).logits[0]  # fmt: skip
        if job.request.prompt_logprobs is not None:
            following = prompt[start + 1 : start + 1 + len(ids)]
            job.prompt_choices += describe(logits[: len(following)], following, job.request.prompt_logprobs)
        if job.is_read and job.request.max_tokens == 0:
            self._tell(job, Update(prompt_choices=job.prompt_choices, finish_reason="length"))
            self._leave(job)
        elif job.is_read:
            self._choose([job], logits[-1:])

    def _decode(self, jobs: Sequence[Job]) -> None:
        """One more token for each job."""
        conversations = [job.conversation for job in jobs]
        device = self.model.device
        logits = self.model(
            torch.tensor([[c.ids[-1]] for c in conversations], device=device),
            position_ids=torch.tensor([[len(c)] for c in conversations], device=device),
            past_key_values=JointCache([c.cache for c in conversations]),
            ntk_alpha=torch.tensor([c.alpha for c in conversations]),
            use_cache=True,
        ).logits[:, -1]  # fmt: skip
        self.metrics.steps.inc()
        self._choose(jobs, logits)

    def _choose(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """The next token of each job from logits (jobs, V), told to whoever asked for it. Who fails, fails alone."""
        allowed, failed = {}, {}
        for row, job in enumerate(jobs):
            if job.request.constraint is not None:
                try:
                    mask = job.request.constraint.allowed(logits.device, logits.shape[-1])
                except Exception as error:  # of the grammar
                    failed[row] = error
                    continue
                if mask is not None:
                    allowed[row] = mask
        choices = self.sampler.choose(logits, [job.slot for job in jobs], allowed)
        for row, (job, choice) in enumerate(zip(jobs, choices, strict=True)):
            error = failed.get(row, choice)
            try:
                if isinstance(error, Exception):
                    raise error
                self._take(job, choice)
            except Exception as error:  # whatever it is, the others' replies go on
                self._fail(job, error)

    def _take(self, job: Job, choice: Choice) -> None:
        """The next token of a job."""
        constraint = job.request.constraint
        job.conversation.ids.append(choice.token)
        text = job.decoder.push(choice.token)
        if constraint is not None:
            constraint.push(choice.token)
        if job.decoder.tokens >= job.request.max_tokens:
            text += job.decoder.close("length")
        now = time.monotonic()
        if job.last_token is None:
            self.metrics.first_token.observe(now - job.submitted)
        else:
            self.metrics.between_tokens.observe(now - job.last_token)
        job.last_token = now
        self.metrics.completion_tokens.inc()
        reason = job.decoder.finish_reason
        prompt_choices, job.prompt_choices = job.prompt_choices, []
        self._tell(
            job,
            Update(
                text, [choice], prompt_choices, reason, None, job.cached_tokens, job.decoder.tokens,
                job.decoder.stopped_by,
            ),
        )  # fmt: skip
        if reason:
            self._leave(job)

    def _guard(self, jobs: Sequence[Job], step: Callable[[], None]) -> None:
        """Run a step; where it fails, each job tries it alone, and only who fails alone is told so."""
        lengths = [len(job.conversation) if job.conversation else 0 for job in jobs]
        try:
            step()
        except Exception as error:  # whatever it is, the others' replies go on
            for job, length in zip(jobs, lengths, strict=True):
                if job.conversation is not None:
                    job.conversation.rewind(length)
            if isinstance(error, torch.OutOfMemoryError):
                self.prefixes.shrink(0)
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._guard([job], lambda job=job: self._decode([job]))

    def _fail(self, job: Job, error: Exception) -> None:
        job.conversation = None  # it is not known how far it is right
        self._tell(job, Update(error=error))
        self._leave(job)

    def _tell(self, job: Job, update: Update) -> None:
        try:
            job.deliver(update)
        except RuntimeError:  # whoever asked is gone, and its event loop with it
            job.cancelled = True

    def _leave(self, job: Job) -> None:
        """A job ends, its keys and values are kept for prompts that begin alike."""
        with self.wake:
            if job in self.running:
                self.running.remove(job)
            elif job in self.waiting:
                self.waiting.remove(job)
        if job.slot is not None:
            self.free_slots.append(job.slot)
            job.slot = None
        if job.conversation is not None:
            self.prefixes.add(job.conversation)
        self.prefixes.shrink(self.limits.kv_tokens - self.reserved)
        self.metrics.seconds.observe(time.monotonic() - job.submitted)

    def _count(self) -> None:
        self.metrics.running.set(len(self.running))
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.kv_tokens.set(
            sum(len(job.conversation) for job in self.running if job.conversation) + self.prefixes.tokens
        )


def describe_error(error: Exception) -> str:
    """A sentence for whoever asked."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device ran out of memory: send less, or serve fewer at once"
    return first_line(error)
