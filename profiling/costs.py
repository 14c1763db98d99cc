"""What a token costs by the model's sizes: bytes read in decoding, operations in a prefill."""

from typing import NamedTuple

from qwen import QWenConfig


class Row(NamedTuple):
    """One line of a table: the precision of the weights and of everything around them.

    Args:
        dtype: precision of activations, norms, embedding and head.
        bits: of a quantised linear layer of a block, in groups of `group` inputs; 0 where it is in `dtype`.
        kv_bits: of a key or value in the cache; 0 where it is in `dtype`.
    """

    dtype: str
    bits: int = 0
    kv_bits: int = 0


ROWS = {
    "bf16": Row("bf16"),
    "fp16": Row("fp16"),
    "fp32": Row("fp32"),
    "int8": Row("bf16", bits=8),
    "int4": Row("bf16", bits=4),
    "bf16-kv8": Row("bf16", kv_bits=8),
    "int8-kv8": Row("bf16", bits=8, kv_bits=8),
    "int4-kv8": Row("bf16", bits=4, kv_bits=8),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def block_matrices(config: QWenConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of the linear layers of one block."""
    hidden, width = config.hidden_size, config.intermediate_size // 2
    heads = config.num_attention_heads * config.kv_channels
    return [(3 * heads, hidden), (hidden, heads), (width, hidden), (width, hidden), (hidden, width)]


def weight_bytes_per_token(config: QWenConfig, row: Row, group: int = 128) -> int:
    """Bytes of weights that one decoding step reads: all but the embedding, of which it reads one row."""
    item = BYTES[row.dtype]
    matrices = block_matrices(config)
    if row.bits:
        block = sum(o * i * row.bits // 8 + o * (i // group) * 2 for o, i in matrices)
    else:
        block = sum(o * i for o, i in matrices) * item
    biases = matrices[0][0] + (0 if config.no_bias else sum(o for o, _ in matrices[1:]))
    block += (biases + 2 * config.hidden_size) * item  # and two norms
    head = config.vocab_size * config.hidden_size * item
    return config.num_hidden_layers * block + head + 2 * config.hidden_size * item  # the last norm, the embedding's row


def kv_bytes_per_position(config: QWenConfig, row: Row) -> int:
    """Bytes of keys and values that each earlier token adds to a step; scales of an int8 cache are left out."""
    item = row.kv_bits / 8 if row.kv_bits else BYTES[row.dtype]
    return int(2 * config.num_hidden_layers * config.num_attention_heads * config.kv_channels * item)


def bytes_per_token(config: QWenConfig, row: Row, context: int, new_tokens: int, group: int = 128) -> float:
    """Mean bytes that a step reads while `new_tokens` are written after `context`: the first comes from the prefill,
    and the step for token t + 1 looks at context + t positions."""
    mean_positions = context + new_tokens / 2
    return weight_bytes_per_token(config, row, group) + kv_bytes_per_position(config, row) * mean_positions


def prefill_flops(config: QWenConfig, tokens: int) -> int:
    """Operations of a prefill that gives one token: matrix products, causal attention, the head for the last token."""
    matrices = sum(o * i for o, i in block_matrices(config))
    heads = config.num_attention_heads * config.kv_channels
    attention = 2 * heads * tokens * (tokens + 1) // 2  # q times k and weights times v, each for half of all pairs
    layers = config.num_hidden_layers * (tokens * matrices + attention)
    return 2 * (layers + config.vocab_size * config.hidden_size)
