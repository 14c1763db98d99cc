"""Chat with the model: `chat`, `chat_stream` and `chat_batch`, and the stop and sanity rules they share.

All of them prompt through `make_context`, run transformers' `generate`, and read its tokens through `ReplyDecoder`.
"""

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from .chatml import DEFAULT_WINDOW, Prompt, Turn, build_prompt, make_context, stop_sequences
from .errors import QwenError, not_finite
from .history import check_history
from .reply import Reply, ReplyDecoder, StopWord

if TYPE_CHECKING:
    from .tokenization_qwen import QWenTokenizer

__all__ = ["ChatMixin", "Reply", "generate_replies", "make_context", "stream_reply"]


class FiniteLogits(LogitsProcessor):
    """Stop with the cause where logits are NaN or infinite; sampling from them is a CUDA assert that names none."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.isfinite(scores).all():
            return scores
        raise not_finite(self.dtype)


class StopSequences(StoppingCriteria):
    """End a row of `generate` when it ends with one of the id sequences."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [list(sequence) for sequence in sequences]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        longest = max(map(len, self.sequences))
        tails = input_ids[:, -longest:].tolist()
        done = [any(tail[-len(stop) :] == stop for stop in self.sequences) for tail in tails]
        return torch.tensor(done, device=input_ids.device)


def light_criterion(criterion: StoppingCriteria) -> StoppingCriteria:
    """The same criterion; transformers' test for end tokens, a search in sorted tensors, as the comparison it is."""
    if type(criterion) is not EosTokenCriteria:
        return criterion
    return StopSequences([[token] for token in criterion.eos_token_id.tolist()])


class ReplyCriteria(StoppingCriteria):
    """Hands every new token of `generate` to its row's decoder, and ends the rows whose replies have ended."""

    def __init__(
        self,
        decoders: list[ReplyDecoder],
        prompt_length: int,
        cancelled: Callable[[], bool] = lambda: False,
        on_step: Callable[[], Any] = lambda: None,
    ) -> None:
        self.decoders = decoders
        self.read = prompt_length
        self.cancelled = cancelled
        self.on_step = on_step

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, self.read :].tolist()  # several at once where decoding is assisted
        self.read = input_ids.shape[1]
        for decoder, tokens in zip(self.decoders, new, strict=True):
            for token in tokens:
                decoder.push(token)
        self.on_step()
        stop_all = self.cancelled()
        done = [stop_all or decoder.finish_reason is not None for decoder in self.decoders]
        return torch.tensor(done, device=input_ids.device)


def reply_config(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> GenerationConfig:
    """The settings of one call: a copy of the given or the model's own, changed by what `kwargs` names (taken out).

    Qwen's two own settings, chat_format and max_window_size, are always there afterwards.
    """
    config = copy.deepcopy(generation_config or model.generation_config)
    for name, default in (("chat_format", "chatml"), ("max_window_size", DEFAULT_WINDOW)):
        given = kwargs.pop(name, None)
        setattr(config, name, given if given is not None else getattr(config, name, None) or default)
    unused = config.update(**kwargs)
    for name in kwargs.keys() - unused.keys():
        del kwargs[name]
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise ValueError("chat gives one reply, token by token: for num_beams or num_return_sequences call generate()")
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = 512  # as the published generation_config.json; transformers would stop after 20
    return config


def reply_stops(
    tokenizer: "QWenTokenizer", config: GenerationConfig, stop_words: Sequence[StopWord] | None
) -> list[StopWord]:
    """The chat format's own stops and the caller's, in a new list."""
    return [*stop_sequences(tokenizer, config.chat_format), *(stop_words or [])]


def generate_replies(
    model: Any,
    tokenizer: "QWenTokenizer",
    prompts: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    stop_words: Sequence[StopWord] = (),
    decoders: list[ReplyDecoder] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    on_step: Callable[[], Any] = lambda: None,
    **kwargs: Any,
) -> list[ReplyDecoder]:
    """Reply to several prompts (ids) at once; each decoder returned holds one reply's text and how it ended.

    Args:
        decoders: to read the replies while they grow: `on_step` is called after every step.
        cancelled: asked at every step; true ends all replies.
        kwargs: go to `generate`.

    Raises:
        QwenError: a prompt is longer than the model can read, or logits are not finite.
    """
    check_lengths(model, prompts)
    decoders = decoders or [new_decoder(tokenizer, generation_config, stop_words) for _ in prompts]
    # Every ChatML prompt holds <|im_start|> already: as padding it gives the repetition penalty nothing to punish
    # that it would not punish in a single reply.
    pad = tokenizer.im_start_id
    config = copy.deepcopy(generation_config)
    config.pad_token_id = pad
    if len(prompts) > 1:
        config.prompt_lookup_num_tokens = None  # guesses are checked for one row at a time
    if config.prompt_lookup_num_tokens:
        config.cache_implementation = None  # wrong guesses are taken back, which a static cache can't
    input_ids, attention_mask = left_padded(prompts, pad, model.device)
    model.generate(
        input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList(
            [*kwargs.pop("stopping_criteria", []), ReplyCriteria(decoders, input_ids.shape[1], cancelled, on_step)]
        ),
        **kwargs,
    )
    for decoder in decoders:
        decoder.close("cancelled" if cancelled() else "length")
    return decoders


def check_lengths(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """QwenError for a prompt (ids) that leaves no room for a reply."""
    limit = model.config.max_context_length
    for prompt in prompts:
        if len(prompt) >= limit:
            raise QwenError(f"the prompt has {len(prompt):,} tokens and the model reads at most {limit:,}: shorten it")


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask (B, T) of prompts that end in the same column."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def new_decoder(
    tokenizer: "QWenTokenizer", generation_config: GenerationConfig, stop_words: Sequence[StopWord], strip: bool = True
) -> ReplyDecoder:
    eos = generation_config.eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else eos or []
    return ReplyDecoder(tokenizer, stop_ids=eos_ids, stop_words=stop_words, strip=strip)


def snapshot(decoder: ReplyDecoder, prompt: Prompt) -> Reply:
    """What there is of a reply now."""
    return Reply(decoder.text, decoder.finish_reason, len(prompt.ids), decoder.tokens, prompt.dropped_turns)


def stream_reply(
    model: Any,
    tokenizer: "QWenTokenizer",
    prompt: Prompt,
    generation_config: GenerationConfig,
    stop_words: Sequence[StopWord] = (),
    cancel: threading.Event | None = None,
    **kwargs: Any,
) -> Iterator[Reply]:
    """Reply to one prompt, yielding the text so far whenever it grows, and at last with its finish_reason.

    Generation runs in a thread of its own. It ends with the reply, when `cancel` is set, or when the reader leaves
    this generator; an error in it is raised here.
    """
    decoder = new_decoder(tokenizer, generation_config, stop_words)
    left = threading.Event()
    steps: queue.SimpleQueue[Reply | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            generate_replies(
                model,
                tokenizer,
                [prompt.ids],
                generation_config,
                decoders=[decoder],
                cancelled=lambda: left.is_set() or (cancel is not None and cancel.is_set()),
                on_step=lambda: None if decoder.finish_reason else steps.put(snapshot(decoder, prompt)),
                **kwargs,
            )
            steps.put(snapshot(decoder, prompt))
        except BaseException as error:  # whatever it is, the reader must hear of it, or would wait for ever
            steps.put(error)

    thread = threading.Thread(target=work, daemon=True, name="qwen-reply")
    thread.start()
    shown, wait = None, True
    try:
        while True:
            try:
                step = steps.get(timeout=1.0)  # with a timeout, because a bare wait ignores Ctrl-C on Windows
            except queue.Empty:
                continue
            if isinstance(step, BaseException):
                raise step
            if step != shown or step.finish_reason:
                shown = step
                yield step
            if step.finish_reason:
                return
    except KeyboardInterrupt:
        wait = False  # a step can take a minute, in the prefill of a long prompt: whoever wants out gets out
        raise
    finally:
        left.set()
        if wait:
            thread.join()


class ChatMixin:
    """The chat methods of QWenLMHeadModel, with the published signatures.

    Keyword arguments that GenerationConfig knows (temperature, top_p, max_new_tokens, ...) change this call only.
    `temperature=0` is greedy. `system` None is the checkpoint's default message. `stop_words_ids` takes words as ids or
    as text; ChatML's own stops always hold.
    """

    def chat(
        self,
        tokenizer: "QWenTokenizer",
        query: str,
        history: Sequence[Turn] | None = None,
        system: str | None = None,
        append_history: bool = True,
        stream: None = None,
        stop_words_ids: Sequence[StopWord] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> tuple[Reply, list[Turn]]:
        """The reply to `query` and the history with this turn (or, without `append_history`, as it was)."""
        if stream is not None:
            raise ValueError("chat() does not stream: iterate over chat_stream()")
        [reply] = self.chat_batch(
            tokenizer, [query], [history or []], system, stop_words_ids, generation_config, **kwargs
        )
        _, past = check_history(history)
        return reply, [*past, (query, str(reply))] if append_history else past

    def chat_stream(
        self,
        tokenizer: "QWenTokenizer",
        query: str,
        history: Sequence[Turn] | None = None,
        system: str | None = None,
        stop_words_ids: Sequence[StopWord] | None = None,
        generation_config: GenerationConfig | None = None,
        cancel: threading.Event | None = None,
        **kwargs: Any,
    ) -> Iterator[Reply]:
        """The reply to `query`, yielded as the text so far; the last one has its finish_reason."""
        config = reply_config(self, generation_config, kwargs)
        prompt = build_prompt(tokenizer, query, history, system, config.max_window_size, config.chat_format)
        stops = reply_stops(tokenizer, config, stop_words_ids)
        return stream_reply(self, tokenizer, prompt, config, stops, cancel, **kwargs)

    def chat_batch(
        self,
        tokenizer: "QWenTokenizer",
        queries: Sequence[str],
        histories: Sequence[Sequence[Turn]] | None = None,
        system: str | None = None,
        stop_words_ids: Sequence[StopWord] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> list[Reply]:
        """Replies to several queries in one left-padded batch: greedily, what `chat` gives to each alone."""
        if isinstance(queries, str):
            raise QwenError("queries is a text: chat_batch() takes a list of them, chat() takes one")
        if not queries:
            return []
        config = reply_config(self, generation_config, kwargs)
        prompts = [
            build_prompt(tokenizer, query, history, system, config.max_window_size, config.chat_format)
            for query, history in zip(queries, histories or [[]] * len(queries), strict=True)
        ]
        stops = reply_stops(tokenizer, config, stop_words_ids)
        decoders = generate_replies(self, tokenizer, [prompt.ids for prompt in prompts], config, stops, **kwargs)
        return [snapshot(decoder, prompt) for decoder, prompt in zip(decoders, prompts, strict=True)]
