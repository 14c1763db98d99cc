"""The engine that makes all replies: a thread decodes every running request together, a token each in every step.

A request joins and leaves between any two steps. Its keys and values lie in pages of the model's pool (pages.py), so
nobody is copied, padded or waits for another, and prompts that begin alike are read once. A step is one call of the
model for single tokens of those who decode and chunks of the prompts that are still read (paged_attention.py). The
thread lives as long as there is work.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import QwenError, first_line, not_finite
from .graphs import DecodeGraphs, can_record
from .long_context import dynamic_ntk_alpha
from .paged_attention import PagedStep
from .pages import WORTHWHILE, PagedSequence, PagePool, common_length, layer_devices, pool_for
from .reply import ReplyDecoder, StopWord
from .sampling import Choice, Sampler, Sampling, describe
from .tokenization_qwen import QWenTokenizer


@dataclass(frozen=True)
class Limits:
    """What the engine takes on at once; more waits, and more than that is refused."""

    max_batch: int = 16  # requests that decode together
    max_queue: int = 64  # requests that wait
    kv_tokens: int = 32768  # tokens of running requests and known prompts together, in whole pages
    chunk: int = 128  # tokens of prompts read in a step while others decode; four times as many while none does
    timeout: float = 600.0  # seconds a request may take, waiting included


class QueueFull(Exception):
    """No more requests can wait."""


class Closed(Exception):
    """The engine takes no more requests."""


class Constraint(Protocol):
    """What a reply must be, a grammar for one."""

    def allowed(self, device: torch.device, vocab_size: int) -> Tensor | None:
        """The tokens (V,) bool that may come next; None where any may."""

    def push(self, token: int) -> None:
        """The next token."""


class Decoder(Protocol):
    """Reads a reply token by token and says when it ends; see ReplyDecoder."""

    tokens: int
    finish_reason: Any
    stopped_by: Any

    def push(self, token: int) -> str: ...

    def close(self, reason: Any) -> str: ...


@dataclass(frozen=True)
class Request:
    """One reply to make, to the ids of a prompt."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_words: Sequence[StopWord] = ()
    stop_ids: Sequence[int] = ()
    constraint: Constraint | None = None
    strip: bool = True  # leave out blanks at either end of the reply
    prompt_logprobs: int | None = None  # wanted for the prompt's tokens too: for how many of the likeliest
    include_stop: bool = False  # the reply ends after its stop, not before it
    decoder: Decoder | None = None  # reads the reply instead of one made of stops and `strip`
    scored: Sequence[int] = ()  # wanted are the log-probabilities of these tokens behind the prompt, and no reply
    random: torch.Generator | None = None  # draws from it instead of the settings' seed

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
    scores: Sequence[float] = ()  # of the tokens in `scored`


class Observer:
    """Hears how the engine is doing. A server counts; who only wants replies does not."""

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt is read from here on; `cached_tokens` of it were known."""

    def chose(self, is_first: bool, seconds: float) -> None:
        """A token, so long after the one before or, the first one, after the request."""

    def stepped(self) -> None:
        """A step has been computed."""

    def ended(self, seconds: float) -> None:
        """A request has left, so long after it came."""

    def counted(self, running: int, waiting: int, kv_tokens: int) -> None:
        """The requests there are, and the tokens that the used and known pages have room for."""


class Job:
    """A request on its way through the engine."""

    def __init__(self, request: Request, alpha: float, deliver: Callable[[Update], None], timeout: float) -> None:
        self.request = request
        self.alpha = alpha  # its factor of dynamic NTK
        self.deliver = deliver
        self.cancelled = False  # set by any thread; noticed before the next step
        self.submitted = time.monotonic()
        self.deadline = self.submitted + timeout
        self.last_token: float | None = None
        self.cached_tokens = 0
        self.prompt_choices: list[Choice] = []
        self.sequence: PagedSequence | None = None  # from its first chunk on
        self.slot: int | None = None  # in the sampler
        self.decoder: Decoder | None = None

    @property
    def is_read(self) -> bool:
        """Whether its prompt is read, so that it decodes."""
        return self.sequence is not None and self.sequence.length >= len(self.request.prompt)


@dataclass(frozen=True)
class Part:
    """The next `count` tokens of a job in a step."""

    job: Job
    count: int

    @property
    def wanted(self) -> int:
        """Of how many of its last tokens the logits are wanted; none inside a prompt."""
        job, request = self.job, self.job.request
        if request.prompt_logprobs is not None and not job.is_read:
            return self.count
        return int(job.sequence.length + self.count >= len(request.prompt))


class Engine:
    """Owns the model and the thread that runs it; `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        model: Any,
        tokenizer: QWenTokenizer | None = None,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limits, self.observer = limits or Limits(), observer or Observer()
        self.context = min(model.config.max_context_length, self.limits.kv_tokens)
        self.weights: Hashable = None  # those that the pages were computed with
        self.pool: PagePool = pool_for(model, self.limits.kv_tokens)
        self.graphs = DecodeGraphs(model, self.pool, self.context) if can_record(model) else None
        self.sampler = Sampler(model.config.vocab_size, model.device, self.limits.max_batch)
        self.free_slots = list(range(self.limits.max_batch))
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.closing: float | None = None  # when what still runs is ended
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None  # while there is work

    # ---- for other threads ----

    def submit(self, requests: Sequence[Request], deliver: Callable[[int, Update], None]) -> list[Job]:
        """Queue requests, all or none; `deliver(number of the request, update)` is called from the engine's thread.

        Raises:
            QueueFull, Closed: they are not taken.
        """
        if any(request.size > self.context or not request.prompt for request in requests):
            raise ValueError(f"a request holds 1 to {self.context} tokens, its reply included")
        with self.changed:
            if self.closing is not None:
                raise Closed
            wanted = [job for job in (*self.running, *self.waiting) if not job.cancelled]
            if len(wanted) + len(requests) > self.limits.max_queue + self.limits.max_batch:
                raise QueueFull
            jobs = [
                Job(
                    request,
                    self._alpha(request),
                    lambda update, number=number: deliver(number, update),
                    self.limits.timeout,
                )
                for number, request in enumerate(requests)
            ]
            self.waiting.extend(jobs)
            if jobs and (self.thread is None or not self.thread.is_alive()):
                self.thread = threading.Thread(target=self._run, name="qwen-engine", daemon=True)
                self.thread.start()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs before their next step, without another word to whoever asked for them."""
        for job in jobs:
            job.cancelled = True

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, and end with an error what has not ended in `grace` seconds."""
        with self.changed:
            if self.closing is None:
                self.closing = time.monotonic() + grace

    def close_now(self) -> None:
        """End with an error what still runs."""
        self.close()
        self.closing = 0.0

    def join(self) -> None:
        """Wait until nothing runs any more, after `close`."""
        with self.changed:
            self.changed.wait_for(lambda: self.thread is None)

    def write(
        self,
        requests: Sequence[Request],
        cancelled: Callable[[], bool] = lambda: False,
        hear: Callable[[int, Update], None] = lambda number, update: None,
    ) -> None:
        """Make replies and wait for them.

        Args:
            cancelled: asked at every token and twice a second; true ends all of them where they are.
            hear: is told, in the engine's thread, the number of a request and what a step adds to its reply.

        Raises:
            the error of the first reply that failed, or of `hear`.
        """
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def deliver(number: int, update: Update) -> None:
            error = update.error
            try:
                hear(number, update)
            except Exception as problem:  # whatever it is, who waits must be told
                error = problem
            if update.finish_reason or error or cancelled():
                ended.put(error)

        jobs = self.submit(requests, deliver)
        try:
            left = len(jobs)
            while left and not cancelled():
                with suppress(queue.Empty):
                    error = ended.get(timeout=0.5)
                    if error is not None:
                        raise error
                    left -= 1
        except KeyboardInterrupt:  # a step can take a minute, in a long prompt: whoever wants out gets out
            self.cancel(jobs)
            raise
        except BaseException:
            self._end(jobs)
            raise
        self._end(jobs)

    def _end(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs and wait until they have left."""
        self.cancel(jobs)
        with self.changed:
            self.changed.wait_for(lambda: not any(job in self.running or job in self.waiting for job in jobs))

    def fits(self) -> bool:
        """Whether the model is still where its pages are, and of their type."""
        return self.pool.dtype == self.model.dtype and self.pool.devices == layer_devices(self.model)

    def __reduce__(self) -> tuple:
        """A copy of a model has an engine of its own, when it needs one."""
        return type(None), ()

    # ---- the thread ----

    def _run(self) -> None:
        is_first = True
        with torch.inference_mode():
            while True:
                with self.changed:
                    if not self.running and not self.waiting:
                        self.thread = None
                        self.changed.notify_all()
                        return
                try:
                    if is_first:
                        self._notice_changes()
                        is_first = False
                    self._step()
                except Exception as error:  # nothing that can be foreseen; still nobody shall wait for ever
                    for job in (*self.running, *self.waiting):
                        self._fail(job, error)

    def _notice_changes(self) -> None:
        """Forget what was computed with other weights: trained on meanwhile, or with another adapter."""
        state = weights_state(self.model)
        if state != self.weights:
            self.pool.forget()
            self.weights = state

    def _step(self) -> None:
        """Drop who is done with, let in who fits, and compute a token for each who decodes and a chunk of prompts."""
        self._drop()
        self._admit()
        parts = self._plan()
        if parts:
            self._guard(parts)
        self.observer.counted(len(self.running), len(self.waiting), self.pool.tokens_kept)

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
        """Whoever waits, in order, as long as there are pages for all that it may come to hold."""
        with self.changed:
            while self.waiting and len(self.running) < self.limits.max_batch:
                if self.pool.pages_for(self.waiting[0].request.size) > self.pool.available - self.promised:
                    break
                self.running.append(self.waiting.popleft())

    @property
    def promised(self) -> int:
        """Pages that running requests may still come to take."""
        return sum(
            self.pool.pages_for(job.request.size) - (len(job.sequence.pages) if job.sequence else 0)
            for job in self.running
        )

    def _plan(self) -> list[Part]:
        """What the next step computes: a token of each who decodes, then prompts in order, as far as a chunk goes."""
        parts = [Part(job, 1) for job in self.running if job.is_read]
        left = self.limits.chunk * (1 if parts else 4)
        reading: list[Job] = []
        for job in self.running:
            if job.is_read or not left:
                continue
            if job.sequence is None:
                if any(self._will_know_more(job, other) for other in reading):
                    continue
                self._begin(job)
            reading.append(job)
            parts.append(Part(job, min(left, len(job.request.prompt) - job.sequence.length)))
            left -= parts[-1].count
        return parts

    def _will_know_more(self, job: Job, other: Job) -> bool:
        """Whether a job had better wait for what another is reading: its prompt begins alike."""
        if job.request.prompt_logprobs is not None or job.alpha != other.alpha:
            return False
        common = common_length(list(job.request.prompt[:-1]), list(other.request.prompt))
        return common - other.sequence.length >= WORTHWHILE

    def _alpha(self, request: Request) -> float:
        """What keys depend on besides tokens: the factor of dynamic NTK, which the whole prompt's length decides."""
        config = self.model.config
        if not config.use_dynamic_ntk:
            return 1.0
        return float(dynamic_ntk_alpha(torch.tensor([len(request.prompt)]), config.seq_length))

    def _begin(self, job: Job) -> None:
        """Before a job's first chunk. Not earlier: the prompt it shares with another may have been read meanwhile."""
        request = job.request
        job.sequence = self.pool.begin(request.prompt, job.alpha, share=request.prompt_logprobs is None)
        job.cached_tokens = job.sequence.length
        job.decoder = request.decoder or ReplyDecoder(
            self.tokenizer, request.stop_ids, request.stop_words, request.strip, request.sampling.min_tokens,
            request.include_stop,
        )  # fmt: skip
        job.slot = self.free_slots.pop()
        self.sampler.begin(job.slot, request.sampling, request.prompt, request.random)
        self.observer.began(len(request.prompt), job.cached_tokens)

    def _guard(self, parts: Sequence[Part]) -> None:
        """Compute parts together; where that fails, each alone, and only who fails alone is told so."""
        wanted = [part.wanted for part in parts]
        try:
            logits = self._compute(parts, wanted)
        except Exception as error:  # whatever it is, the others' replies go on
            if isinstance(error, torch.OutOfMemoryError):
                self.pool.forget()
            if len(parts) == 1:
                self._fail(parts[0].job, error)
                return
            for part in parts:
                self._guard([part])
            return
        self.observer.stepped()
        self._read_out(parts, logits.split(wanted))

    def _compute(self, parts: Sequence[Part], wanted: Sequence[int]) -> Tensor:
        """Keys and values of the parts' tokens into their pages; logits (rows, V) of the last `wanted` of each."""
        sequences, counts = [part.job.sequence for part in parts], [part.count for part in parts]
        for sequence, count in zip(sequences, counts, strict=True):
            self.pool.extend(sequence, count)
        step = PagedStep.of(self.pool, sequences, counts)
        alphas = [part.job.alpha for part in parts]
        ids = [
            token for s, count in zip(sequences, counts, strict=True) for token in s.ids[s.length : s.length + count]
        ]
        if self.graphs is not None and all(count == 1 for count in counts) and all(wanted):
            logits = self.graphs.logits(ids, step, alphas)
        else:
            logits = self._forward(step, ids, alphas, wanted)
        for sequence, count in zip(sequences, counts, strict=True):
            self.pool.written(sequence, count)
        return logits

    def _forward(self, step: PagedStep, ids: Sequence[int], alphas: Sequence[float], wanted: Sequence[int]) -> Tensor:
        """A step that is not recorded."""
        ends = accumulate(step.counts)
        kept = [i for size, end in zip(wanted, ends, strict=True) for i in range(end - size, end)]
        device = self.model.device
        return self.model(
            torch.tensor([ids], device=device),
            position_ids=step.positions()[None].to(device),
            past_key_values=step,
            ntk_alpha=step.per_token(alphas)[None],
            use_cache=True,
            logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device),
        ).logits[0]

    def _read_out(self, parts: Sequence[Part], logits: Sequence[Tensor]) -> None:
        """What a step's logits, (wanted, V) of each part, say to each job whose prompt is read now."""
        chosen, rows = [], []
        for part, own in zip(parts, logits, strict=True):
            job, request = part.job, part.job.request
            if request.prompt_logprobs is not None and job.decoder.tokens == 0:
                begin = job.sequence.length - len(own) + 1
                following = request.prompt[begin : begin + len(own)]
                job.prompt_choices += describe(own[: len(following)], following, request.prompt_logprobs)
            if not job.is_read:
                continue
            if request.scored:
                self._score(job, own[-1])
            elif request.max_tokens == 0:
                self._tell(job, Update(prompt_choices=job.prompt_choices, finish_reason="length"))
                self._leave(job)
            else:
                chosen.append(job)
                rows.append(own[-1])
        if chosen:
            self._choose(chosen, torch.stack(rows))

    def _score(self, job: Job, logits: Tensor) -> None:
        """Log-probabilities of the wanted tokens among all, from logits (V)."""
        if logits.sum().isfinite():
            scores = logits.log_softmax(-1)[list(job.request.scored)].tolist()
            self._tell(job, Update(scores=scores, finish_reason="length", cached_tokens=job.cached_tokens))
            self._leave(job)
        else:
            self._fail(job, not_finite(self.model.dtype))

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
            try:
                if row in failed:
                    raise failed[row]
                if isinstance(choice, QwenError):
                    raise not_finite(self.model.dtype)
                self._take(job, choice)
            except Exception as error:  # whatever it is, the others' replies go on
                self._fail(job, error)

    def _take(self, job: Job, choice: Choice) -> None:
        """The next token of a job."""
        constraint = job.request.constraint
        job.sequence.ids.append(choice.token)
        text = job.decoder.push(choice.token)
        if constraint is not None:
            constraint.push(choice.token)
        if job.decoder.tokens >= job.request.max_tokens:
            text += job.decoder.close("length")
        now, is_first = time.monotonic(), job.last_token is None
        self.observer.chose(is_first, now - (job.submitted if is_first else job.last_token))
        job.last_token = now
        reason = job.decoder.finish_reason
        prompt_choices, job.prompt_choices = job.prompt_choices, []
        update = Update(
            text, [choice], prompt_choices, reason, None, job.cached_tokens, job.decoder.tokens,
            job.decoder.stopped_by,
        )  # fmt: skip
        self._tell(job, update)
        if reason:
            self._leave(job)

    def _fail(self, job: Job, error: Exception) -> None:
        self._tell(job, Update(error=error))
        self._leave(job)

    def _tell(self, job: Job, update: Update) -> None:
        try:
            job.deliver(update)
        except RuntimeError:  # whoever asked is gone, and its event loop with it
            job.cancelled = True

    def _leave(self, job: Job) -> None:
        """A job ends; its pages stay known to prompts that begin alike."""
        if job.slot is not None:
            self.free_slots.append(job.slot)
            job.slot = None
        if job.sequence is not None:
            self.pool.release(job.sequence)
            job.sequence = None
        with self.changed:
            if job in self.running:
                self.running.remove(job)
            elif job in self.waiting:
                self.waiting.remove(job)
            self.changed.notify_all()
        self.observer.ended(time.monotonic() - job.submitted)


def weights_state(model: Any) -> Hashable:
    """Something that changes with a model's weights and adapters."""
    modules = list(model.modules())
    tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None]
    layers = [m for m in modules if isinstance(getattr(m, "disable_adapters", None), bool)]  # of peft
    adapters = [(layer.disable_adapters, *layer.active_adapters) for layer in layers]
    return hash((tuple(state), tuple(adapters)))


def describe_error(error: Exception) -> str:
    """A sentence for whoever asked."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device ran out of memory: send less, or serve fewer at once"
    return first_line(error)
