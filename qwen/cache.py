"""A key-value cache that grows in place, for transformers' own loops; the engine has pages (see pages.py).

transformers' DynamicCache copies all keys and values for every new token. Here each layer keeps some room behind them,
so a token costs its own bytes; the layer copies itself only when the room is used up.
"""

from torch import Tensor
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


def is_growing(cache: Cache | None) -> bool:
    """Whether every layer of the cache grows in place, with torch tensors."""
    return cache is not None and bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)
