"""Keys and values of prompts already read, for prompts that begin alike: a shared system message, a chat that grows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers.cache_utils import DynamicCache

from qwen.cache import GrowingLayer

WORTHWHILE = 16  # tokens: less is read as quickly as it is copied


@dataclass(eq=False)
class Conversation:
    """Token ids and their keys and values: those of the first `len(cache)` ids, all with one factor of dynamic NTK."""

    ids: list[int]
    alpha: float
    cache: DynamicCache = field(default_factory=DynamicCache)

    def __len__(self) -> int:
        """Tokens that the cache holds."""
        return self.cache.get_seq_length() if self.cache.layers else 0

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of `ids` the cache holds already."""
        size = min(len(self), len(ids))
        if self.ids[:size] == ids[:size]:
            return size
        return next(i for i in range(size) if self.ids[i] != ids[i])

    def rewind(self, length: int) -> None:
        """Forget what the cache holds beyond `length` tokens."""
        for layer in self.cache.layers:
            layer.length = min(layer.length, length)

    def copy(self, length: int) -> DynamicCache:
        """A cache of its own for the first `length` tokens."""
        cache = DynamicCache()
        for layer in self.cache.layers:
            copy = GrowingLayer()
            copy.update(layer.keys[:, :, :length], layer.values[:, :, :length])
            cache.layers.append(copy)
        return cache


class PrefixCache:
    """Finished conversations, the one used longest ago first."""

    def __init__(self) -> None:
        self.conversations: list[Conversation] = []

    @property
    def tokens(self) -> int:
        return sum(map(len, self.conversations))

    def add(self, conversation: Conversation) -> None:
        """Keep a conversation, in place of those whose tokens it begins with."""
        if len(conversation) >= WORTHWHILE:
            self.conversations = [
                kept
                for kept in self.conversations
                if kept.alpha != conversation.alpha or conversation.common(kept.ids[: len(kept)]) < len(kept)
            ]
            self.conversations.append(conversation)

    def take(self, ids: Sequence[int], alpha: float, running: Iterable[Conversation]) -> DynamicCache:
        """A cache with as much of the beginning of `ids` as is known, though not the last: its logits are wanted.

        A conversation kept here that goes on is handed over; where another branches off, it is copied, and so it is
        from those that are running.
        """
        kept = self.conversations
        known = [(c.common(ids[:-1]), c in kept, c) for c in (*kept, *running) if c.alpha == alpha]
        length, is_kept, best = max(known, key=lambda entry: entry[:2], default=(0, False, None))
        if best is None or length < WORTHWHILE:
            return DynamicCache()
        if not is_kept:
            return best.copy(length)
        kept.remove(best)
        if len(best) - length < WORTHWHILE:  # such as the end of a turn, which was never read
            best.rewind(length)
            return best.cache
        kept.append(best)
        return best.copy(length)

    def shrink(self, tokens: int) -> None:
        """Forget conversations until no more than so many tokens are kept."""
        while self.conversations and self.tokens > tokens:
            self.conversations.pop(0)
