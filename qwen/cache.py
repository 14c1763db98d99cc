"""A key-value cache that grows in place.

transformers' DynamicCache copies all keys and values for every new token. Here each layer keeps some room behind them,
so a token costs its own bytes; the layer copies itself only when the room is used up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

MIN_ROOM = 64  # tokens
ROOM_SHARE = 16  # a full layer grows by a sixteenth: at most 6% of the cache is room, and copies stay rare


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (B, H, S, D), views of larger tensors (B, H, capacity, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys
        self.length = 0 if keys is None else keys.shape[-2]

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def reserve(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The whole buffers of keys and values, with room for so many tokens behind the present ones."""
        needed = self.length + tokens
        if needed > self._keys.shape[2]:
            capacity = max(needed, self.length + max(MIN_ROOM, self.length // ROOM_SHARE))
            self._keys, self._values = (_grown(x, self.length, capacity) for x in (self._keys, self._values))
        return self._keys, self._values

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        """Append new keys and values (B, H, T, D); returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        for buffer, new in zip(self.reserve(tokens), (key_states, value_states), strict=True):
            buffer[:, :, self.length : self.length + tokens] = new
        self.length += tokens
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens (a negative number, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, not {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)


def _grown(buffer: Tensor, length: int, capacity: int) -> Tensor:
    larger = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    larger[:, :, :length] = buffer[:, :, :length]
    return larger


def let_grow(cache: Cache | None, num_layers: int) -> None:
    """Give an empty DynamicCache growing layers; any other cache stays as it is."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if not any(layer.is_initialized or isinstance(layer, GrowingLayer) for layer in cache.layers):
        cache.layers = [GrowingLayer() for _ in range(num_layers)]


class JointCache(Cache):
    """Caches of single conversations, of any lengths, as the rows of one batch.

    They stay what they are: a conversation joins and leaves a batch between any two steps, without being copied.
    """

    def __init__(self, rows: Sequence[Cache]) -> None:
        super().__init__(layers=[layer for row in rows for layer in row.layers])
        self.rows = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(row.get_seq_length() for row in self.rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple:
        """Append row b of new keys and values (B, H, T, D) to cache b; returns them all, padded on the right."""
        pairs = [
            row.update(key_states[b : b + 1], value_states[b : b + 1], layer_idx) for b, row in enumerate(self.rows)
        ]
        longest = max(keys.shape[2] for keys, _ in pairs)
        keys, values = (
            torch.cat([pad(x, (0, 0, 0, longest - x.shape[2])) for x in rows]) for rows in zip(*pairs, strict=True)
        )
        return keys, values

    def masks(
        self, position_ids: Tensor, windows: Sequence[int | None], dtype: torch.dtype
    ) -> dict[int | None, Tensor]:
        """By window: what is added to the scores (B, 1, T, S) of the queries at `position_ids` (B, T)."""
        keys = torch.arange(int(position_ids.max()) + 1, device=position_ids.device)
        queries = position_ids[:, None, :, None]
        masks = {}
        for window in set(windows):
            hidden = (keys > queries) if window is None else (keys > queries) | (keys <= queries - window)
            masks[window] = torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill(hidden, -torch.inf)
        return masks


def is_growing(cache: Cache | None) -> bool:
    """Whether every layer of the cache grows in place, with torch tensors."""
    return cache is not None and bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)
