"""Write a checkpoint as one GGUF file with tokenizer, chat template and stop tokens, for llama.cpp and Ollama.

    python export_gguf.py -c Qwen/Qwen-7B-Chat -o qwen-7b-chat-q8_0.gguf --type q8_0
    llama-server -m qwen-7b-chat-q8_0.gguf --jinja
    ollama create qwen-7b-chat -f qwen-7b-chat-q8_0.Modelfile

Takes Qwen's layout, full or GPTQ, and Qwen2's layout that convert_to_qwen2.py writes. An Int4 checkpoint becomes q4_0
and an Int8 one q8_0 without a change: those formats hold the very same numbers and scales. Matrices of unquantised
checkpoints are rounded to blocks of 32. llama.cpp has neither dynamic NTK nor logn: beyond `seq_length` give
--context, which stretches RoPE by one factor for all lengths.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from convert_to_qwen2 import WeightFiles, told_system
from hub import HUBS
from qwen import QWenConfig, QWenTokenizer
from qwen.checkpoint import check_weight_files, read_json
from qwen.errors import QwenError
from qwen.fast_tokenizer import fast_tokenizer, restore_vocabulary
from qwen.int4 import Int4Linear, unpack_words
from qwen.paths import replacing
from qwen.qwen2 import fixed_rotary_base, join_parts, qwen_settings, qwen_sources
from utils import DEFAULT_CHECKPOINT, check_loadable, find_checkpoint, load_config, run_script

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# llama.cpp's names for the tensors of a block; w2 is what Llama calls the gate.
BLOCK_NAMES = {
    "ln_1.weight": "attn_norm.weight",
    "attn.c_attn.weight": "attn_qkv.weight",
    "attn.c_attn.bias": "attn_qkv.bias",
    "attn.c_proj.weight": "attn_output.weight",
    "ln_2.weight": "ffn_norm.weight",
    "mlp.w2.weight": "ffn_gate.weight",
    "mlp.w1.weight": "ffn_up.weight",
    "mlp.c_proj.weight": "ffn_down.weight",
}
OTHER_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BITS_OF_TYPE = {"q4_0": 4, "q8_0": 8}  # of a GPTQ checkpoint that fits in without a change
NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens

MODELFILE = '''FROM ./{name}
TEMPLATE """<|im_start|>system
{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{system}{{{{ end }}}}<|im_end|>
{{{{ range .Messages }}}}{{{{ if ne .Role "system" }}}}<|im_start|>{{{{ .Role }}}}
{{{{ .Content }}}}<|im_end|>
{{{{ end }}}}{{{{ end }}}}<|im_start|>assistant
"""
PARAMETER num_ctx {context}
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|im_start|>"
PARAMETER stop "<|endoftext|>"
'''
OLLAMA_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repeat_penalty",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-c", "--checkpoint-path", default=DEFAULT_CHECKPOINT, metavar="PATH",
        help="directory, hub name or `demo` (default: %(default)s); a directory in Qwen2's layout, too",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="file to write: NAME.gguf")
    parser.add_argument("--type", default="f16", choices=TYPES, help="of the matrices (default: %(default)s)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to stretch RoPE to (default: seq_length)")
    parser.add_argument("--hub", default=HUBS[0], choices=HUBS, help="where hub names are looked up")
    parser.add_argument("--revision", help="branch, tag or commit of a hub checkpoint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output.suffix != ".gguf":
        raise QwenError(f"--output {args.output}: give the file a name that ends in .gguf")
    if not args.output.absolute().parent.is_dir():
        raise QwenError(f"--output {args.output}: there is no folder {args.output.absolute().parent}")
    import_gguf()
    source = find_checkpoint(args.checkpoint_path, args.hub, args.revision)
    if (source / "adapter_config.json").is_file():
        raise QwenError(f"{source} is an adapter: merge it first, with merge_lora.py, then export the result")
    checkpoint = open_checkpoint(source)
    if args.context is not None:
        checkpoint.stretch(args.context)
    tokenizer = open_tokenizer(source)
    write_gguf(checkpoint, args.output, args.type, tokenizer)
    written = [args.output]
    if checkpoint.is_chat:
        written.append(args.output.with_suffix(".Modelfile"))
        with replacing(written[-1]) as draft:
            draft.write_text(modelfile(args.output.name, checkpoint, tokenizer), encoding="utf-8")
    print(f"Saved {' and '.join(map(str, written))}.", file=sys.stderr)


def import_gguf() -> ModuleType:
    """The package gguf; QwenError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise QwenError("GGUF files are written with the package gguf: pip install gguf") from error
    return gguf


# ---- the checkpoint ----


class Layer(NamedTuple):
    """A tensor of the checkpoint by Qwen's name: plain, or a GPTQ layer's weight made of several."""

    name: str
    shape: tuple[int, ...]
    is_quantized: bool


class Checkpoint:
    """A directory's settings, and its tensors one by one under Qwen's names, whichever the layout."""

    def __init__(self, config: QWenConfig, files: WeightFiles, sources: dict[str, list[str]], generation: dict) -> None:
        self.config = config
        self.files = files
        self.sources = sources
        self.generation = generation
        quantization = config.to_dict().get("quantization_config") or {}
        self.bits, self.group_size = quantization.get("bits"), quantization.get("group_size")
        self.context = config.seq_length
        self.rope_base = float(config.rotary_emb_base)

    @property
    def is_chat(self) -> bool:
        return self.generation.get("chat_format") == "chatml"

    def stretch(self, context: int) -> None:
        """RoPE by the factor that dynamic NTK has at `context` tokens."""
        self.rope_base = fixed_rotary_base(self.config, context)
        self.context = context

    def layers(self) -> list[Layer]:
        """What goes into the file, in a fixed order: no buffers of old releases, no biases that are zeros."""
        found = []
        for name in sorted(self.sources):
            base = name.removesuffix(".qweight")
            if base != name:
                height, width = self._shape(name)
                found.append(Layer(f"{base}.weight", (width, height * 32 // self.bits), True))
            elif gguf_name(name) is not None:
                found.append(Layer(name, self._shape(name), False))
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [self.files.shape(part) for part in self.sources[name]]
        if len(shapes) == 1:
            return shapes[0]
        joined = list(shapes[0])
        place = len(joined) - 1 if name.endswith((".qweight", ".qzeros", ".scales")) else 0
        joined[place] = sum(shape[place] for shape in shapes)
        return tuple(joined)

    def read(self, name: str) -> Tensor:
        return join_parts(name, [self.files.read(part) for part in self.sources[name]])

    def read_quantized(self, name: str) -> Int4Linear:
        """The GPTQ layer of `name`, checked."""
        base = name.removesuffix(".weight")
        parts = {kind: self.read(f"{base}.{kind}") for kind in ("qweight", "qzeros", "scales", "g_idx")}
        height, width = parts["qweight"].shape
        layer = Int4Linear(height * 32 // self.bits, width, self.bits, self.group_size, bias=False)
        layer.load_state_dict(parts)
        layer.check(base)
        return layer


def open_checkpoint(directory: Path) -> Checkpoint:
    """A checkpoint directory of Qwen's layout or, as convert_to_qwen2.py writes it, of Qwen2's.

    Raises:
        QwenError: it is of another architecture, damaged, or quantised in a way that can't be read.
    """
    settings = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    is_qwen2 = settings.get("model_type") == "qwen2"
    if is_qwen2:
        config = QWenConfig(**qwen_settings(settings))
    else:
        check_loadable(directory)
        check_weight_files(directory)
        config = load_config(directory)
    if not config.no_bias:
        raise QwenError("this checkpoint has biases that llama.cpp does not know (no_bias is false)")
    files = WeightFiles(directory)
    sources = qwen_sources(files.names()) if is_qwen2 else {name: [name] for name in files.names()}
    names = [f"{prefix}generation_config.json" for prefix in ("qwen_", "")]  # the first as before the conversion
    generation = next((read_json(directory / name) for name in names if (directory / name).is_file()), {})
    if is_qwen2 and (directory / "chat_template.jinja").is_file():
        generation = {"chat_format": "chatml", **generation}
    return Checkpoint(config, files, sources, generation)


def open_tokenizer(directory: Path) -> QWenTokenizer:
    """Its tokenizer; that of Qwen2's layout is made from tokenizer.json."""
    if (directory / "qwen.tiktoken").is_file() or not (directory / "tokenizer.json").is_file():
        return QWenTokenizer.from_pretrained(directory)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "qwen.tiktoken"
        restore_vocabulary(directory / "tokenizer.json", vocabulary)
        return QWenTokenizer(str(vocabulary), **told_system(directory))


# ---- the file ----


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a checkpoint's tensor; None for what it does not have."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    layer, _, rest = name.removeprefix("transformer.h.").partition(".")
    return f"blk.{layer}.{BLOCK_NAMES[rest]}" if rest in BLOCK_NAMES else None


def write_gguf(
    source: Path | Checkpoint, path: Path, kind: str, tokenizer: QWenTokenizer | None = None, outer: str = "q8_0"
) -> Path:
    """Write a checkpoint's weights to `path`, norms and biases always in float32.

    One tensor is in memory at a time. The file appears whole or not at all.

    Args:
        kind: type of the matrices, one of TYPES.
        tokenizer: its vocabulary and chat template go into the file, which a server needs; without it ids are fed.
        outer: type of embedding and head where `kind` has blocks.

    Raises:
        QwenError: the package gguf is missing, or blocks don't fit the checkpoint's sizes.
    """
    gguf = import_gguf()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layers = checkpoint.layers()
    kinds = {layer.name: tensor_kind(gguf, layer, kind, outer) for layer in layers}
    with replacing(path) as draft:
        writer = gguf.GGUFWriter(draft, "qwen")
        add_sizes(writer, checkpoint)
        add_vocabulary(writer, checkpoint, tokenizer)
        # The header comes first in the file, so that every tensor's shape is told before any tensor is written.
        total = 0
        for layer in layers:
            numbers, size = gguf.GGML_QUANT_SIZES[kinds[layer.name]]  # of a block
            if layer.shape[-1] % numbers:
                raise QwenError(f"{layer.name} has {layer.shape[-1]} inputs: {kind} takes multiples of {numbers}")
            count = int(np.prod(layer.shape)) // numbers * size
            writer.add_tensor_info(gguf_name(layer.name), layer.shape, None, count, raw_dtype=kinds[layer.name])
            total += count
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(desc="Writing", total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
            for layer in layers:
                data = tensor_data(gguf, checkpoint, layer, kinds[layer.name])
                writer.write_tensor_data(data)
                bar.update(data.nbytes)
        writer.close()
    return path


def tensor_kind(gguf: ModuleType, layer: Layer, kind: str, outer: str) -> Any:
    """The GGMLQuantizationType of a tensor in a file of type `kind`."""
    kinds = gguf.GGMLQuantizationType
    if len(layer.shape) == 1:
        return kinds.F32
    return kinds[(outer if kind in BITS_OF_TYPE and layer.name in OTHER_NAMES else kind).upper()]


def tensor_data(gguf: ModuleType, checkpoint: Checkpoint, layer: Layer, kind: Any) -> np.ndarray:
    """A tensor's bytes."""
    if layer.is_quantized:
        quantized = checkpoint.read_quantized(layer.name)
        if quantized.bits == BITS_OF_TYPE.get(kind.name.lower()) and quantized.group_size % 32 == 0:
            return same_blocks(quantized)
        weight = quantized.dequantize()
    else:
        weight = checkpoint.read(layer.name)
    if kind == gguf.GGMLQuantizationType.BF16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(weight.float().contiguous().numpy(), kind)


def same_blocks(layer: Int4Linear) -> np.ndarray:
    """A GPTQ layer as Q4_0 or Q8_0, value for value: (out, bytes of a row).

    A block holds 32 inputs of one output: the scale in float16, then the numbers, in Q4_0 input j and input j + 16 to a
    byte. Both formats are scale * (number - middle), as is GPTQ's, whose groups are several blocks long.
    """
    numbers = unpack_words(layer.qweight, layer.bits).T.reshape(layer.out_features, -1, 32).numpy()
    if layer.bits == 4:
        numbers = numbers[..., :16] | numbers[..., 16:] << 4
    else:
        numbers = numbers - 128  # below zero uint8 wraps around to the same octets as int8
    scales = layer.scales.T.repeat_interleave(layer.group_size // 32, dim=1).contiguous().numpy()
    blocks = np.concatenate([scales[..., None].view(np.uint8), numbers.astype(np.uint8)], axis=-1)
    return blocks.reshape(layer.out_features, -1)


def add_sizes(writer: Any, checkpoint: Checkpoint) -> None:
    """The sizes that llama.cpp's architecture "qwen" asks for; its feed-forward length counts both halves, as ours."""
    config = checkpoint.config
    writer.add_context_length(checkpoint.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(config.kv_channels)
    writer.add_rope_freq_base(checkpoint.rope_base)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)


def add_vocabulary(writer: Any, checkpoint: Checkpoint, tokenizer: QWenTokenizer | None) -> None:
    """Tokens, merges and what ends a reply; Qwen2 splits text by the same pattern. Rows without a token get a name."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    fast = json.loads(fast_tokenizer(tokenizer).to_str())
    names = {rank: name for name, rank in fast["model"]["vocab"].items()}
    specials = {token["id"]: token["content"] for token in fast["added_tokens"]}
    rows = range(checkpoint.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([specials.get(i) or names.get(i) or f"[unused {i}]" for i in rows])
    writer.add_token_types([CONTROL if i in specials else NORMAL if i in names else UNUSED for i in rows])
    writer.add_token_merges([" ".join(pair) for pair in fast["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokenizer.im_end_id if checkpoint.is_chat else tokenizer.eod_id)
    if checkpoint.is_chat:
        writer.add_eot_token_id(tokenizer.im_end_id)
        writer.add_eom_token_id(tokenizer.im_start_id)  # a reply that opens a turn has ended, too
        writer.add_chat_template(str(tokenizer.chat_template))
        add_sampling(writer, checkpoint.generation)


def add_sampling(writer: Any, generation: dict[str, Any]) -> None:
    """The checkpoint's settings as the file's defaults, without those that llama.cpp would add of its own."""
    writer.add_sampling_temp(float(generation.get("temperature", 1.0)) if generation.get("do_sample", True) else 0.0)
    writer.add_sampling_top_k(int(generation.get("top_k", 0) or 0))
    writer.add_sampling_top_p(float(generation.get("top_p", 1.0)))
    writer.add_sampling_min_p(0.0)
    writer.add_sampling_penalty_repeat(float(generation.get("repetition_penalty", 1.0)))
    writer.add_sampling_penalty_last_n(-1)  # all tokens count, as in transformers


def modelfile(name: str, checkpoint: Checkpoint, tokenizer: QWenTokenizer) -> str:
    """Ollama's description of the file. Its templates can't break control tokens that a user's text spells."""
    system = tokenizer.default_system.replace('"""', '"')
    text = MODELFILE.format(name=name, system=system, context=checkpoint.context)
    settings = {theirs: checkpoint.generation[ours] for ours, theirs in OLLAMA_NAMES.items()
                if checkpoint.generation.get(ours) is not None}  # fmt: skip
    return text + "".join(f"PARAMETER {theirs} {value}\n" for theirs, value in settings.items())


if __name__ == "__main__":
    run_script(main)
