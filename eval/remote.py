"""Answer a benchmark through an OpenAI-compatible server: ours, vLLM, llama-server, or a cluster of them.

Prompts go to /v1/completions as token ids, made here by the tokenizer of -c: no chat template and no tokenizer of the
server's has a part in them, so every engine is asked the very same thing. A choice's log-probability is looked for
among the likeliest next tokens; where it is not there, it is that of its token at the end of an echoed prompt.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx

from eval.engine import single_token
from eval.task import Record
from qwen import QWenConfig, QwenError, QWenTokenizer
from utils import find_checkpoint, load_config

ATTEMPTS, FIRST_PAUSE = 6, 1.0  # of a request that fails; seconds, doubled each time
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
TOP_TOKENS = 20  # that every server tells of the next one
MANY_TOKENS = 20_000  # that llama-server tells, which echoes no prompts
API_KEY = "OPENAI_API_KEY"


def add_api_arguments(group: argparse._ActionsContainer) -> None:
    """Flags for a model that a server runs; --checkpoint-path then names its tokenizer only."""
    group.add_argument(
        "--api-base", metavar="URL", help=f"ask this server, as http://127.0.0.1:8000/v1 (key: ${API_KEY}); -c names "
        "the tokenizer"
    )  # fmt: skip
    group.add_argument("--api-model", metavar="NAME", help="the model's name there (default: the first it lists)")
    group.add_argument(
        "--api-requests", type=int, default=32, metavar="N", help="requests at once (default: %(default)s)"
    )


def load_tokenizer(args: argparse.Namespace) -> tuple[QWenTokenizer, QWenConfig]:
    """Tokenizer and config of --checkpoint-path, without its weights."""
    path = str(args.checkpoint_path)
    if path == "demo" or Path(path).exists() or args.hub != "huggingface":
        directory = find_checkpoint(path, args.hub, args.revision)
        return QWenTokenizer.from_pretrained(directory), load_config(directory)
    try:
        pinned = {"revision": args.revision} if args.revision else {}
        return QWenTokenizer.from_pretrained(path, **pinned), QWenConfig.from_pretrained(path, **pinned)
    except OSError as error:
        raise QwenError(f"{path}: its tokenizer can't be fetched ({str(error).splitlines()[0]})") from None


class Remote:
    """A server's model, with the interface of `eval.engine.Engine`.

    Raises:
        QwenError: there is no such server or model, or it refuses a request.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: QWenTokenizer,
        choices: Sequence[str] = (),
        stop_words: Sequence[str] = (),
        max_new_tokens: int = 512,
    ) -> None:
        self.tokenizer = tokenizer
        self.choices = {choice: single_token(tokenizer, choice) for choice in choices}
        self.stop_words = list(stop_words)
        self.max_new_tokens = max_new_tokens
        self.workers = args.api_requests
        key = os.environ.get(API_KEY)
        self.client = httpx.Client(
            base_url=args.api_base.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=self.workers),
        )
        try:
            models = self._send("GET", "models").get("data") or []
        except QwenError:
            self.client.close()
            raise
        self.lists_all = any(model.get("owned_by") == "llamacpp" for model in models)
        self.model = args.api_model or next((model["id"] for model in models), None)
        if self.model is None:
            raise QwenError(f"--api-base {args.api_base} lists no model: name one with --api-model")

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def answer(
        self, prompts: Sequence[Sequence[int]], answered: Callable[[int, Record], None] = lambda number, record: None
    ) -> list[Record]:
        """A record for each prompt, in order; `answered` hears of each as soon as it is there, one at a time."""
        ask = self._score if self.choices else self._generate
        records: dict[int, Record] = {}
        left = threading.Event()

        def work(prompt: Sequence[int]) -> Record | None:
            return None if left.is_set() else ask(prompt)

        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(work, prompt): number for number, prompt in enumerate(prompts)}
            try:
                for future in as_completed(futures):
                    number = futures[future]
                    records[number] = future.result()
                    answered(number, records[number])
            except BaseException:  # Ctrl-C, or a refusal: what is not begun is not asked any more
                left.set()
                raise
        return [records[number] for number in range(len(prompts))]

    # ---- one prompt ----

    def _generate(self, prompt: Sequence[int]) -> Record:
        body = {"prompt": list(prompt), "max_tokens": self.max_new_tokens, "temperature": 0}
        if self.stop_words:
            body["stop"] = self.stop_words
        found = self._complete(body)
        [choice] = found["choices"]
        usage = found.get("usage") or {}
        return {
            "text": choice["text"],
            "finish_reason": choice["finish_reason"],
            "prompt_tokens": len(prompt),
            "completion_tokens": usage.get("completion_tokens"),
        }

    def _score(self, prompt: Sequence[int]) -> Record:
        """The log-probabilities of the choices as the next token, among all tokens."""
        found = self._likeliest(prompt, TOP_TOKENS)
        missing = [choice for choice in self.choices if choice not in found]
        if missing and self.lists_all:
            found |= self._likeliest(prompt, MANY_TOKENS)
        elif missing:
            found |= {choice: self._last_logprob([*prompt, self.choices[choice]]) for choice in missing}
        if any(found.get(choice) is None for choice in self.choices):
            raise QwenError(
                f"the server tells no log-probability of {missing[0]!r}: it is not among the likeliest tokens, and the "
                "server echoes none of a prompt; score with vLLM, or with openai_api.py"
            )
        return {"logprobs": {choice: found[choice] for choice in self.choices}, "prompt_tokens": len(prompt)}

    def _likeliest(self, prompt: Sequence[int], count: int) -> dict[str, float]:
        """The choices among the likeliest next tokens, with their log-probabilities."""
        body = {"prompt": list(prompt), "max_tokens": 1, "logprobs": count, "temperature": 0}
        [choice] = self._complete(body)["choices"]
        logprobs = choice.get("logprobs") or {}
        if "content" in logprobs:  # llama-server: in the form of chats, tokens with their ids
            names = {token: choice for choice, token in self.choices.items()}
            entries = [entry for part in logprobs["content"][:1] for entry in part.get("top_logprobs", [])]
            return {names[entry["id"]]: entry["logprob"] for entry in entries if entry.get("id") in names}
        told = next(iter(logprobs.get("top_logprobs") or []), None) or {}
        return {choice: told[choice] for choice in self.choices if choice in told}

    def _last_logprob(self, ids: list[int]) -> float | None:
        """That of the last token after all before it, where the server echoes prompts."""
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        [choice] = self._complete(body)["choices"]
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
        return told[-1] if len(told) == len(ids) else None

    # ---- requests ----

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        # Else the checkpoint's own penalty, of its generation settings, would hold for greedy replies too.
        neutral = {"repetition_penalty": 1.0} | ({"repeat_penalty": 1.0} if self.lists_all else {})
        return self._send("POST", "completions", {"model": self.model, **neutral, **body})

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer; what may pass, as a restart or too many requests, is tried again."""
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self.client.request(method, path, json=body)
            except httpx.HTTPError as error:
                wrong = f"{self.client.base_url}{path}: {type(error).__name__} {error}".rstrip()
                if isinstance(error, httpx.ConnectError) and body is None:
                    break  # at the very beginning: nobody is there
            else:
                if answer.status_code == 200:
                    return answer.json()
                wrong = f"{answer.url} answers {answer.status_code}: {explain(answer)}"
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    break
            if attempt < ATTEMPTS:
                time.sleep(pause)
                pause *= 2
        raise QwenError(f"{wrong}; answers that are there are kept, --resume goes on")


def explain(answer: httpx.Response) -> str:
    """The message in an error of any of these servers."""
    try:
        error = answer.json()
    except ValueError:
        return answer.text[:200]
    error = error.get("error", error) if isinstance(error, dict) else error
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
