"""Log-probabilities as clients read them: tokens as text, or by a name where they are no text."""

from collections.abc import Sequence
from typing import Any

from qwen import QWenTokenizer
from qwen.engine import Request
from qwen.sampling import Choice

LOWEST = -9999.0  # JSON has no infinity


def token_bytes(tokenizer: QWenTokenizer, token: int) -> bytes:
    value = tokenizer.decoder.get(token, b"")
    return value if isinstance(value, bytes) else value.encode()


def token_name(tokenizer: QWenTokenizer, token: int) -> str:
    """A token's text; of a part of a character its bytes, of what the vocabulary lacks its number: names differ."""
    data = token_bytes(tokenizer, token)
    if not data:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def describe_token(tokenizer: QWenTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, token)
    return {"token": token_name(tokenizer, token), "logprob": max(logprob, LOWEST), "bytes": list(data)}


def describe_choice(tokenizer: QWenTokenizer, choice: Choice) -> dict[str, Any]:
    """OpenAI's entry of chat completions."""
    top = [describe_token(tokenizer, token, logprob) for token, logprob in choice.top]
    return {**describe_token(tokenizer, choice.token, choice.logprob or 0.0), "top_logprobs": top}


def top_by_name(tokenizer: QWenTokenizer, choice: Choice) -> dict[str, float] | None:
    """OpenAI's entry of completions: the likeliest tokens, and the one that came."""
    if choice.logprob is None:
        return None
    pairs = [*choice.top, (choice.token, choice.logprob)]
    return {token_name(tokenizer, token): max(logprob, LOWEST) for token, logprob in pairs}


def prompt_scores(tokenizer: QWenTokenizer, request: Request, choices: Sequence[Choice]) -> list[dict | None]:
    """vLLM's prompt_logprobs: for each token of the prompt, by id; null for the first, which follows nothing."""
    scores: list[dict | None] = [None]
    for choice in choices[: len(request.prompt) - 1]:
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(choice.top, 1)]
        if choice.token not in [token for token, _, _ in ranked]:
            ranked.append((choice.token, choice.logprob or 0.0, None))
        scores.append(
            {
                str(token): {
                    "logprob": max(logprob, LOWEST),
                    "rank": rank,
                    "decoded_token": token_name(tokenizer, token),
                }
                for token, logprob, rank in ranked
            }
        )
    return scores
