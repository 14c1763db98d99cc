"""ChatML, the prompt format of Qwen-7B-Chat: messages to token ids, and the history window.

Role, newline and content are encoded apart, and text never becomes a control token: a user who types `<|im_end|>` has
typed ten characters. So the ids made here are the only way in which prompts are built.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import QwenError
from .history import check_history, check_text

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .tokenization_qwen import QWenTokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."  # Qwen-7B-Chat's; a tokenizer's `default_system` may be another
DEFAULT_WINDOW = 6144  # tokens of system and history; what the first release of Qwen-7B-Chat set

Turn = tuple[str, str]  # a query and its reply
Message = dict[str, Any]  # {"role": ..., "content": ...}


def encode_block(tokenizer: "QWenTokenizer", role: str, content: str, closed: bool = True) -> list[int]:
    """Ids of `<|im_start|>role\\ncontent<|im_end|>`; without the end token where `closed` is false."""
    ids = [tokenizer.im_start_id, *tokenizer.encode_text(role), *tokenizer.encode_text("\n")]
    ids += tokenizer.encode_text(content)
    return [*ids, tokenizer.im_end_id] if closed else ids


def encode_messages(
    tokenizer: "QWenTokenizer",
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of a conversation; the checkpoint's default system message goes first where the messages bring none.

    `add_generation_prompt` opens the assistant's turn; `continue_final_message` leaves the last message open instead.
    """
    return encode_with_mask(tokenizer, messages, add_generation_prompt, continue_final_message)[0]


def encode_with_mask(
    tokenizer: "QWenTokenizer",
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> tuple[list[int], list[int]]:
    """`encode_messages`, and a mask that is 1 where the assistant writes: its texts and what ends them."""
    messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": tokenizer.default_system}, *messages]
    newline = tokenizer.encode_text("\n")
    ids: list[int] = []
    mask: list[int] = []
    for i, message in enumerate(messages):
        closed = not (continue_final_message and i == len(messages) - 1)
        head = encode_block(tokenizer, message["role"], "", closed=False)
        block = encode_block(tokenizer, message["role"], message["content"], closed)
        ids += [*block, *newline] if closed else block
        mask += [0] * len(head) + [int(message["role"] == "assistant")] * (len(block) - len(head))
        mask += [0] * (len(ids) - len(mask))
    if add_generation_prompt:
        ids += encode_block(tokenizer, "assistant", "", closed=False)
    return ids, mask + [0] * (len(ids) - len(mask))


def history_window(
    tokenizer: "QWenTokenizer", history: Sequence[Turn], system: str, max_window_size: int
) -> list[tuple[Turn, list[int]]]:
    """The newest turns that fit, in order, each with its ids (a newline before each of its two blocks).

    From the newest turn back, a turn is kept while system + turn + kept turns stay below `max_window_size` tokens;
    the first that does not fit drops all older ones too, so that no reply loses what it refers to.
    """
    newline = tokenizer.encode_text("\n")
    total = len(encode_block(tokenizer, "system", system))
    kept: list[tuple[Turn, list[int]]] = []
    for query, reply in reversed(history):
        ids = [
            *newline,
            *encode_block(tokenizer, "user", query),
            *newline,
            *encode_block(tokenizer, "assistant", reply),
        ]
        total += len(ids)
        if total >= max_window_size:
            break
        kept.append(((query, reply), ids))
    return kept[::-1]


class Prompt(NamedTuple):
    text: str  # for people to read; only the ids are exact
    ids: list[int]
    dropped_turns: int  # oldest turns of the history that did not fit


def build_prompt(
    tokenizer: "QWenTokenizer",
    query: str,
    history: Sequence[Turn] | None = None,
    system: str | None = None,
    max_window_size: int = DEFAULT_WINDOW,
    chat_format: str = "chatml",
) -> Prompt:
    """The prompt for `query`: the history is cut to the window, the query never is.

    `chat_format` "raw" (base models) is the query alone. Where `system` is None, the message that a history of messages
    begins with holds, else the checkpoint's default.

    Raises:
        QwenError: query, history or system is of another shape.
    """
    check_text(query, "query")
    own_system, history = check_history(history)
    if system is None:
        system = tokenizer.default_system if own_system is None else own_system
    check_text(system, "system")
    if chat_format == "raw":
        return Prompt(query, tokenizer.encode_text(query), dropped_turns=0)
    if chat_format != "chatml":
        raise QwenError(f'chat_format is {chat_format!r}: use "chatml" (chat models) or "raw" (base models)')
    newline = tokenizer.encode_text("\n")
    kept = history_window(tokenizer, history, system, max_window_size)
    ids = encode_block(tokenizer, "system", system)
    for _, turn_ids in kept:
        ids += turn_ids
    ids += [*newline, *encode_block(tokenizer, "user", query), *newline]
    ids += encode_block(tokenizer, "assistant", "", closed=False)
    return Prompt(render_text(system, [turn for turn, _ in kept], query), ids, len(history) - len(kept))


def make_context(
    tokenizer: "QWenTokenizer",
    query: str,
    history: Sequence[Turn] | None = None,
    system: str | None = None,
    max_window_size: int = DEFAULT_WINDOW,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """`build_prompt` with the published signature: (text, ids)."""
    return build_prompt(tokenizer, query, history, system, max_window_size, chat_format)[:2]


def render_text(system: str, history: Iterable[Turn], query: str) -> str:
    """The same prompt as text."""
    text = f"<|im_start|>system\n{system}<|im_end|>"
    for past_query, reply in history:
        text += f"\n<|im_start|>user\n{past_query}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>"
    return text + f"\n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"


def stop_sequences(tokenizer: "QWenTokenizer", chat_format: str) -> list[list[int] | str]:
    """What ends a reply: the control tokens of ChatML, or of a base model its end of text and the next `Human:`."""
    if chat_format == "raw":
        return ["Human:", [tokenizer.eod_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id], [tokenizer.eod_id]]


def complete_eos_ids(generation_config: "GenerationConfig") -> None:
    """Add ChatML's stop ids to `eos_token_id`, in place, so that every engine stops where a chat model's turn ends.

    Official chat checkpoints name only <|endoftext|> there; <|im_start|> and <|im_end|> are the two ids after it.
    """
    eos, pad = generation_config.eos_token_id, generation_config.pad_token_id
    ids = [pad] if eos is None else eos if isinstance(eos, list) else [eos]
    if getattr(generation_config, "chat_format", None) != "chatml" or not all(isinstance(i, int) for i in ids):
        return
    # Official files name <|endoftext|> as the padding too. The three may be there in another order, or in part.
    eod_id = pad if isinstance(pad, int) and all(pad <= i <= pad + 2 for i in ids) else min(ids, default=None)
    if eod_id is not None and max(ids) <= eod_id + 2 and not (len(set(ids)) == 3 and ids[0] == eod_id + 2):
        generation_config.eos_token_id = [eod_id + 2, eod_id, eod_id + 1]  # <|im_end|> first: some take that alone
