"""One model over several processes, each with a slice of every layer (tensor parallelism). torchrun starts them:

    torchrun --nproc_per_node 2 cli_demo.py -c Qwen/Qwen-7B-Chat --tp 2

Only rank 0, the leader, runs the program: it reads, samples, stops and prints. The others, the followers, load their
slices and repeat each call of the model that the leader makes, so nothing but the model has to know of them. Whatever
ends the leader ends the followers; an error in one process ends all.
"""

import atexit
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from qwen import QWenConfig, QwenError, QWenLMHeadModel
from qwen.errors import first_line

FOR_EVER = timedelta(days=365)  # followers wait while the user thinks
LAST_STEP_S = 10  # how long the end of the program waits for a call in another thread
PACKED_QKV = "qwen_packed_qkv"


# ---- processes ----


def is_leader() -> bool:
    """Whether this process is the one that reads and prints: any but torchrun's ranks from 1 on."""
    return os.environ.get("RANK", "0") == "0"


def join_processes(tp: int, device: str = "auto") -> None:
    """Meet the other processes that torchrun has started.

    Raises:
        QwenError: torchrun has not started this process, or not `tp` of them, or there are fewer GPUs.
    """
    if tp < 1:
        raise QwenError(f"--tp {tp}: a model is cut into 1 slice or more")
    command = f"torchrun --nproc_per_node {tp} {Path(sys.argv[0]).name} ... --tp {tp}"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise QwenError(f"--tp {tp} needs {tp} processes: start it with `{command}`")
    if int(os.environ["WORLD_SIZE"]) != tp:
        if not is_leader():
            sys.exit(1)  # the leader says why
        raise QwenError(f"--tp {tp} runs in {tp} processes, not {os.environ['WORLD_SIZE']}: start it with `{command}`")
    backend = "gloo"
    if torch.cuda.is_available():
        rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        problem = f"PyTorch finds {count} here" if count <= rank else ""
        if device == "cpu":
            problem = "hide them with CUDA_VISIBLE_DEVICES= to run on the CPU"
        if problem:
            raise QwenError(f"--tp {tp} takes a GPU for each process: {problem}")
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"  # calls travel by the first, tensors by the second
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=FOR_EVER)
    if not is_leader():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
        logging.disable_progress_bar()


def send(message: Any) -> None:
    """Give an object to all followers."""
    dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))


def receive() -> Any:
    """Wait for an object from the leader; ends this process, silently, where the leader has gone."""
    box = [None]
    try:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    except RuntimeError:
        sys.exit(1)  # the leader has said why
    return box[0]


@contextmanager
def leader_first() -> Iterator[None]:
    """Let the leader do the block before the followers do: it downloads, and says what is wrong, once."""
    if not is_leader():
        receive()
    yield
    if is_leader():
        send("done")


# ---- the model ----


@dataclass
class Call:
    """A call of the model as followers get it: its cache is a number, its tensors are on the CPU."""

    arguments: dict[str, Any]
    cache: int | None = None
    past: int = 0  # tokens that the leader's cache holds before the call: it may have dropped some
    forgotten: list[int] = field(default_factory=list)  # caches that are no more


class ParallelQWen(QWenLMHeadModel):
    """QWenLMHeadModel with a slice of every layer, for inference. The leader's calls are followed by the others.

    Caches must be DynamicCache; beam search, which reorders them, is refused.
    """

    def lead(self) -> None:
        """Make this process's calls those of all, until the program ends."""
        self.lock = threading.Lock()  # replies may be generated in several threads
        self.cache_numbers: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self.forgotten: list[int] = []
        self.next_number = 0
        self.broken = False
        atexit.register(self._end)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        use_cache = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is None and (self.config.use_cache if use_cache is None else use_cache):
            kwargs["past_key_values"] = DynamicCache()
        kwargs["input_ids"] = input_ids
        with self.lock:
            send(self._describe(kwargs))
            try:
                return super().__call__(**kwargs)
            except Exception as error:
                # The followers stand somewhere in this call, and no message reaches them there.
                self.broken = True
                raise SystemExit(f"tensor parallel: rank 0 failed, which ends all: {first_line(error)}") from error
            except BaseException:
                self.broken = True
                raise

    def _describe(self, kwargs: dict[str, Any]) -> Call:
        """The call for the followers; QwenError if they could not follow it."""
        arguments = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        cache = arguments.pop("past_key_values", None)
        if cache is None:
            return Call(arguments)
        if type(cache) is not DynamicCache:
            raise QwenError(f"--tp works with a DynamicCache only, not with {type(cache).__name__}")
        past = cache.get_seq_length()
        if cache not in self.cache_numbers:
            if past:
                raise QwenError("--tp: this cache is a copy, which the other processes don't have; begin an empty one")
            self.cache_numbers[cache] = self.next_number
            weakref.finalize(cache, self.forgotten.append, self.next_number)
            self.next_number += 1
        forgotten = [self.forgotten.pop() for _ in range(len(self.forgotten))]
        return Call(arguments, self.cache_numbers[cache], past, forgotten)

    def follow(self) -> NoReturn:
        """Repeat the leader's calls until it ends."""
        caches: dict[int, DynamicCache] = {}
        while (call := receive()) is not None:
            for number in call.forgotten:
                caches.pop(number, None)
            arguments = {n: x.to(self.device) if isinstance(x, Tensor) else x for n, x in call.arguments.items()}
            if call.cache is not None:
                cache = arguments["past_key_values"] = caches.setdefault(call.cache, DynamicCache())
                if cache.get_seq_length() > call.past:
                    cache.crop(call.past - cache.get_seq_length())
            try:
                with torch.no_grad():
                    super().__call__(**arguments)
            except Exception as error:
                sys.exit(f"tensor parallel: rank {dist.get_rank()} failed, which ends all: {first_line(error)}")
        dist.destroy_process_group()
        sys.exit(0)

    def _end(self) -> None:
        """Let the followers go. Where they are stuck in a call, fail, so that torchrun ends them."""
        if not self.lock.acquire(timeout=LAST_STEP_S) or self.broken:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        with suppress(RuntimeError):  # Ctrl-C has ended the followers already
            send(None)
        dist.destroy_process_group()

    def _engine_can(self, *args: Any, **kwargs: Any) -> bool:
        """No: the followers know caches of single calls, not the leader's pages."""
        return False

    def _beam_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise QwenError("--tp does not do beam search: set num_beams to 1")


def sharding_plan(config: QWenConfig, tp: int) -> dict[str, str]:
    """What differs from the config's own plan: where the heads can be dealt out evenly, each rank computes its own.

    Else c_attn's output is gathered, and every rank attends with all heads and holds the whole cache.
    """
    if config.num_attention_heads % tp:
        return {}
    register_packed_qkv()
    return {"transformer.h.*.attn.c_attn": PACKED_QKV, "transformer.h.*.attn.c_proj": "rowwise"}


def register_packed_qkv() -> None:
    """Teach transformers to cut c_attn, which is q, k and v in one, so that a rank gets the same heads of all three."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel

    class PackedQKV(ColwiseParallel):
        def shard_param(self, module: torch.nn.Module, param: str, mesh: Any) -> None:
            whole = module._parameters.get(param)
            if whole is not None:
                pieces = distribute_tensor(whole, mesh, [_StridedShard(0, split_factor=3)], src_data_rank=None)
                module._parameters[param] = torch.nn.Parameter(pieces, requires_grad=whole.requires_grad)

    ALL_PARALLEL_STYLES.register(PACKED_QKV, PackedQKV())


def load_parallel(
    directory: str | os.PathLike, config: QWenConfig, tp: int, dtype: torch.dtype, attn: str
) -> ParallelQWen:
    """This process's slices of a checkpoint, after `join_processes`. It returns on the leader only: the others follow
    it until it ends, and end with it."""
    from transformers.distributed import DistributedConfig

    sharding = sharding_plan(config, tp)
    plan = DistributedConfig(tp_size=tp, tp_plan=sharding or None)
    model = ParallelQWen.from_pretrained(directory, dtype=dtype, attn_implementation=attn, distributed_config=plan)
    model.eval()
    if sharding:
        for block in model.transformer.h:
            block.attn.width //= tp  # c_attn's output here is a rank's own heads
    if not is_leader():
        model.follow()
    model.lead()
    return model
