"""Keys and values in pages: one pool for a model, out of which every sequence takes as many pages as it fills.

A page holds the keys and values of some consecutive tokens in all layers. Pages that begin alike are the same pages:
they hang in a tree, each under the page before it, and are found there by their tokens. So what prompts have in common
(a system message, examples, a conversation that goes on) is computed once and kept once, as in PagedAttention (Kwon et
al., 2023) with the prefix tree of SGLang (Zheng et al., 2024).
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from .hardware import free_memory

CPU_SHARE, GPU_SHARE = 0.5, 0.85  # of the free memory: prompts in chunks need little besides
CPU_PAGE = 64  # tokens: the block of keys that the CPU kernels read at once
GPU_PAGE = 256  # tokens: the least that FlashAttention 2 takes
WORTHWHILE = 16  # tokens: less is read as quickly as it is copied
FIRST_PAGES = 16  # of a pool; it doubles when they are used up


@dataclass(eq=False)
class Page:
    """A place in the pool. `tokens` are those whose keys and values it holds."""

    number: int
    users: int = 0
    tokens: list[int] = field(default_factory=list)
    parent: "Page | None" = None  # in the tree; None outside
    full: dict[tuple[int, ...], "Page"] = field(default_factory=dict)  # its children by their tokens
    begun: list["Page"] = field(default_factory=list)  # its children that still have room


@dataclass(eq=False)
class PagedSequence:
    """Token ids and the pages with the keys and values of the first `length` of them.

    `kind` is what the keys depend on besides the tokens: the factor of dynamic NTK, for one.
    """

    ids: list[int]
    kind: Hashable
    pages: list[Page] = field(default_factory=list)
    length: int = 0


class OutOfPages(Exception):
    """Every page is in use."""


class PagePool:
    """The pages of a model with `limit` tokens at most, on the devices of its layers.

    Args:
        devices: of each layer.
        heads, head_dim: H and D of keys and values.
        limit: tokens, rounded up to whole pages.
    """

    def __init__(
        self, devices: Sequence[torch.device], dtype: torch.dtype, heads: int, head_dim: int, limit: int
    ) -> None:
        self.devices, self.dtype, self.heads, self.head_dim = list(devices), dtype, heads, head_dim
        self.page_size = GPU_PAGE if any(device.type == "cuda" for device in devices) else CPU_PAGE
        self.limit = -(-limit // self.page_size)
        self.has_spare = self.page_size == GPU_PAGE  # page 0, for rows of recorded steps that nobody needs
        self.layers: list[Tensor] = [self._room(device, 0) for device in devices]  # each (2, pages, H, page_size, D)
        self.addresses = torch.empty(0, 2, dtype=torch.long)  # of each layer's keys and values, for the CPU kernels
        self.free: list[int] = []
        if self.has_spare:
            self.limit += 1
        self.unused: OrderedDict[Page, None] = OrderedDict()  # nobody's, but known by their tokens; oldest first
        self.roots: dict[Hashable, Page] = {}

    # ---- memory ----

    @property
    def size(self) -> int:
        """Pages there are now."""
        return self.layers[0].shape[1]

    @property
    def available(self) -> int:
        """Pages that can still be taken."""
        return self.limit - self.size - (self.has_spare and not self.size) + len(self.free) + len(self.unused)

    @property
    def taken(self) -> int:
        """Pages in use."""
        return self.limit - self.has_spare - self.available

    @property
    def tokens_kept(self) -> int:
        """Tokens that the pages in use and the known ones have room for."""
        return (self.size - len(self.free)) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def reserve(self, pages: int) -> None:
        """Make room for so many pages at once, up to the limit."""
        old, new = self.size, min(pages, self.limit)
        if new <= old:
            return
        for i, layer in enumerate(self.layers):  # one after the other: never two copies of all
            larger = self._room(self.devices[i], new)
            larger[:, :old] = layer
            self.layers[i] = larger
        self.addresses = torch.tensor([[part.data_ptr() for part in layer] for layer in self.layers])
        self.free += range(new - 1, max(old, self.has_spare) - 1, -1)

    def _room(self, device: torch.device, pages: int) -> Tensor:
        """Keys and values (2, pages, H, page_size, D); on a GPU the heads of a token lie together, as FlashAttention
        wants it, on a CPU the tokens of a head."""
        if device.type == "cuda":
            shape = (2, pages, self.page_size, self.heads, self.head_dim)
            return torch.empty(shape, dtype=self.dtype, device=device).transpose(2, 3)
        return torch.empty((2, pages, self.heads, self.page_size, self.head_dim), dtype=self.dtype, device=device)

    def _take(self) -> Page:
        if not self.free and self.size < self.limit:
            self.reserve(max(FIRST_PAGES, 2 * self.size))
        if not self.free:
            if not self.unused:
                raise OutOfPages
            self._forget(next(iter(self.unused)))
        return Page(self.free.pop(), users=1)

    # ---- sequences ----

    def begin(self, ids: Sequence[int], kind: Hashable = None, share: bool = True) -> PagedSequence:
        """A sequence with the pages that are known of `ids`, but not of the last: its logits are wanted."""
        sequence = PagedSequence(list(ids), kind)
        if share:
            page, P = self._root(kind), self.page_size
            while sequence.length + P < len(ids):
                known = page.full.get(tuple(ids[sequence.length : sequence.length + P]))
                if known is None:
                    break
                self._use(known)
                sequence.pages.append(known)
                sequence.length += P
                page = known
            self._begin_within(sequence, page)
        return sequence

    def _begin_within(self, sequence: PagedSequence, parent: Page) -> None:
        """The beginning of one more page, from the page that has most in common with it."""
        rest = sequence.ids[sequence.length : min(len(sequence.ids) - 1, sequence.length + self.page_size)]
        found = [(common_length(page.tokens, rest), page) for page in (*parent.begun, *parent.full.values())]
        size, best = max(found, key=lambda entry: entry[0], default=(0, None))
        if best is None or size < WORTHWHILE:
            return
        if best.users == 0 and len(best.tokens) < self.page_size and len(best.tokens) - size < WORTHWHILE:
            self._use(best)  # such as the end of a turn, which goes on otherwise
            page, page.tokens = best, best.tokens[:size]
        else:
            self._use(best)  # so that it is not what makes room for its copy
            try:
                page = self._take()
            except OutOfPages:
                return
            finally:
                self._leave(best)
            for layer in self.layers:
                layer[:, page.number] = layer[:, best.number]
            page.tokens, page.parent = best.tokens[:size], parent
            parent.begun.append(page)
        sequence.pages.append(page)
        sequence.length += size

    def extend(self, sequence: PagedSequence, count: int) -> None:
        """Pages for `count` tokens more.

        Raises:
            OutOfPages: there are none left.
        """
        while len(sequence.pages) < self.pages_for(sequence.length + count):
            sequence.pages.append(self._take())

    def written(self, sequence: PagedSequence, count: int) -> None:
        """The keys and values of the next `count` ids are in the pages: others may share them from now on."""
        P = self.page_size
        while count:
            place = sequence.length // P
            page, parent = sequence.pages[place], sequence.pages[place - 1] if place else self._root(sequence.kind)
            new = sequence.ids[sequence.length : min(sequence.length + count, (place + 1) * P)]
            if page.parent is None:
                page.parent = parent
                parent.begun.append(page)
            page.tokens += new
            sequence.length += len(new)
            count -= len(new)
            if len(page.tokens) == P:
                sequence.pages[place] = self._completed(page, parent)

    def _completed(self, page: Page, parent: Page) -> Page:
        """A page that is full becomes a child by its tokens; where there is one already, that one."""
        parent.begun.remove(page)
        known = parent.full.setdefault(tuple(page.tokens), page)
        if known is not page:
            page.parent = None
            self._use(known)
            self._leave(page)
        return known

    def release(self, sequence: PagedSequence) -> None:
        """Nobody reads on here. What is known stays until its room is needed, the end of a sequence going first."""
        for page in reversed(sequence.pages):
            self._leave(page)
        sequence.pages, sequence.length = [], 0

    def forget(self) -> None:
        """Share nothing any more of what has been computed up to now."""
        for page in list(self.unused):
            self._forget(page)
        self.roots.clear()

    def _root(self, kind: Hashable) -> Page:
        return self.roots.setdefault(kind, Page(-1))

    def _use(self, page: Page) -> None:
        page.users += 1
        self.unused.pop(page, None)

    def _leave(self, page: Page) -> None:
        page.users -= 1
        if page.users == 0:
            self.unused[page] = None
            if page.parent is None or len(page.tokens) < WORTHWHILE or self._is_beginning_of_another(page):
                self._forget(page)

    def _is_beginning_of_another(self, page: Page) -> bool:
        size = len(page.tokens)
        others = (*page.parent.begun, *page.parent.full.values()) if size < self.page_size else ()
        return any(other is not page and other.tokens[:size] == page.tokens for other in others)

    def _forget(self, page: Page) -> None:
        """Take an unused page out of the tree, and all that is unused below it."""
        del self.unused[page]
        for child in (*page.full.values(), *page.begun):
            child.parent = None
            if child.users == 0:
                self._forget(child)
        page.full.clear()
        page.begun.clear()
        if page.parent is not None:
            if page in page.parent.begun:
                page.parent.begun.remove(page)
            elif page.parent.full.get(tuple(page.tokens)) is page:
                del page.parent.full[tuple(page.tokens)]
            page.parent = None
        self.free.append(page.number)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return next(i for i in range(size) if a[i] != b[i])


def layer_devices(model: Any) -> list[torch.device]:
    """Where each of the model's layers runs."""
    devices = []
    for block in model.transformer.h:
        device = getattr(getattr(block, "_hf_hook", None), "execution_device", None)  # of accelerate
        if device is None:
            device = block.ln_1.weight.device
        devices.append(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))
    return devices


def pool_for(model: Any, limit: int) -> PagePool:
    """A pool on the devices where the model's layers run."""
    config = model.config
    return PagePool(layer_devices(model), model.dtype, config.num_attention_heads, config.kv_channels, limit)


def layer_bytes(model: Any) -> int:
    """Bytes of a token's keys and values in one layer."""
    return 2 * model.config.num_attention_heads * model.config.kv_channels * model.dtype.itemsize


def kv_room(model: Any) -> int:
    """How many tokens' keys and values fit into the memory that is free on the devices of the model's layers."""
    layers = Counter(layer_devices(model))
    return min(free_bytes(device) // (count * layer_bytes(model)) for device, count in layers.items())


def free_bytes(device: torch.device) -> int:
    """Bytes that keys and values may take on a device: of what is free there, the share that leaves room to compute."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    free = free_memory()
    return int((psutil.virtual_memory().available if free is None else free) * CPU_SHARE)
