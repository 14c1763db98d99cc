"""Preferences: a prompt, the chosen reply and the rejected one (TRL's, LLaMA-Factory's and ms-swift's names)."""

from typing import Any

from ..samples import BadSample, Message, Notes, Preference
from .fields import note_unknown, read_switch, refuse_fields
from .messages import Turn, add_system, finish_turns, read_turns
from .pairs import read_prompt, read_reply

EXAMPLE = '{"prompt": ..., "chosen": ..., "rejected": ...}'
PROMPTS = ("prompt", "query", "question", "instruction", "messages", "conversations")
REJECTED = ("rejected", "rejected_response")
KNOWN = (*PROMPTS, *REJECTED, "chosen", "response", "input", "system", "history")


def matches(row: dict[str, Any]) -> bool:
    return any(row.get(name) is not None for name in REJECTED) and (
        row.get("chosen") is not None or row.get("response") is not None
        or row.get("messages") is not None or row.get("conversations") is not None
    )  # fmt: skip


def read(row: dict[str, Any], where: str, notes: Notes) -> list[Preference]:
    refuse_fields(row, ("chosen", *REJECTED))
    if read_switch(row, "the sample") is False:
        notes.add("sample left out, as it says itself")
        return []
    rejected_name = next(name for name in REJECTED if row.get(name) is not None)
    given = next((name for name in PROMPTS if row.get(name) is not None), None)
    chosen_name = next((name for name in ("chosen", "response") if row.get(name) is not None), None)
    chosen, rejected = (_turns(row.get(name), name, notes) for name in (chosen_name, rejected_name))
    prompt = read_question(row, given, notes)
    if not prompt or len(chosen) > 1:  # the replies hold the prompt, too: TRL's implicit form
        whole = chosen or prompt
        prompt, chosen = whole[:-1], whole[-1:]
        if len(rejected) > 1 and [turn["content"] for turn in rejected[:-1]] != [turn["content"] for turn in prompt]:
            raise BadSample('"chosen" and "rejected" differ before their last reply: they answer different prompts',
                            "replies to different prompts")  # fmt: skip
        rejected = rejected[-1:]
    elif not chosen:  # messages and a rejected response
        prompt, chosen = prompt[:-1], prompt[-1:]
    note_unknown(row, KNOWN, notes)
    before = as_messages(add_system(prompt, row.get("system"), notes), chosen, notes)
    as_messages(prompt, rejected, notes)
    if chosen[0]["content"] == rejected[0]["content"]:
        raise BadSample("the chosen and the rejected reply are the same", "equal replies")
    return [Preference(before, chosen[0]["content"], rejected[0]["content"], where)]


def read_question(row: dict[str, Any], name: str | None, notes: Notes) -> list[Turn]:
    if name is None:
        return []
    value = row[name]
    if name == "instruction" and row.get("input"):
        value = f"{value}\n{row['input']}"
    return read_prompt(value, name, notes, row.get("history"))


def _turns(value: Any, name: str | None, notes: Notes) -> list[Turn]:
    if value is None:
        return []
    if isinstance(value, dict):  # LLaMA-Factory's single message
        value = [value]
    return read_turns(value, name, notes) if isinstance(value, list) else read_reply(value, name, notes)


def as_messages(prompt: list[Turn], reply: list[Turn], notes: Notes) -> tuple[Message, ...]:
    """The prompt's messages; BadSample unless exactly one reply of the assistant follows it."""
    if not reply or reply[0]["role"] != "assistant" or len(reply) > 1:
        raise BadSample("a preference ends with one reply of the assistant", "no reply to prefer")
    [messages] = finish_turns([*prompt, *reply], None, notes)[-1:]
    return messages[:-1]
