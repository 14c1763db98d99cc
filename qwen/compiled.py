"""Compiled replies on a GPU: a cache of fixed size, so that one recorded CUDA graph is every step of every reply.

Launching a step's kernels one by one takes longer than a GPU needs for them; a graph launches all of them at once.
transformers' `generate` compiles the steps by itself as soon as the cache is static. What is added here: one thread
that runs all of them, because a graph belongs to the thread that recorded it, and one cache that they all use, because
it belongs to the addresses too.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from tqdm import tqdm
from transformers.cache_utils import StaticCache

CACHE_STEP = 2048  # tokens; a longer conversation gets a cache of the next multiple, and new graphs once
WARM_UP = 3  # replies: the first compiles, the second records, the third shows that nothing is left to do


class CompiledReplies:
    """Runs `generate` calls one after another in one thread, and keeps their cache."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        self.cache: StaticCache | None = None
        self.rows = self.room = 0  # of the cache
        self.thread = threading.Thread(target=self._work, daemon=True, name="qwen-compiled")
        self.thread.start()

    def __reduce__(self) -> tuple:
        """A copy of the model has no thread: it is not compiled, None."""
        return type(None), ()

    def run(self, call: Callable[[], Any]) -> Any:
        """The result of `call()`, run in the one thread; what it raises is raised here."""
        if threading.current_thread() is self.thread:
            return call()
        done: Future = Future()
        self.calls.put((done, call))
        return done.result()

    def _work(self) -> None:
        while True:
            done, call = self.calls.get()
            try:
                done.set_result(call())
            except BaseException as error:  # whatever it is, the caller must hear of it, or would wait for ever
                done.set_exception(error)

    def cache_for(self, rows: int, tokens: int, make: Callable[[int], StaticCache]) -> StaticCache:
        """The kept cache, emptied, if it has so many rows and room for so many tokens; else a new one."""
        if self.cache is not None and self.rows == rows and self.room >= tokens:
            self.cache.reset()
            return self.cache
        self.cache = None  # before the new one is made: both may not fit
        self.rows, self.room = rows, -(-tokens // CACHE_STEP) * CACHE_STEP
        self.cache = make(self.room)
        return self.cache


def warm_up(model: Any, show_progress: bool = True) -> None:
    """Compile a model's steps and record their graphs, which takes a minute or two, before somebody waits for them."""
    ids = torch.arange(8, device=model.device)[None]
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": model.config.vocab_size, "pad_token_id": 0}
    for _ in tqdm(range(WARM_UP), desc="Compiling", unit="step", disable=not show_progress, leave=False):
        model.generate(ids, attention_mask=ids.new_ones(ids.shape), **settings)
