"""The model in vLLM's Transformers backend, with what that backend needs to be told of long prompts."""

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.transformers import TransformersForCausalLM

from qwen.qwen2 import fixed_rotary_base

logger = init_logger(__name__)


class QWenForCausalLM(TransformersForCausalLM):
    """Qwen-7B, its RoPE stretched by one factor for all prompts where the context is longer than the training length.

    Dynamic NTK takes its factor from a prompt's length. vLLM gives the model all requests in one row, and cached keys
    are rotated already, so that length is not to be had there; up to `seq_length` tokens the factor is 1 anyway.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        fix_rotary_base(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def fix_rotary_base(vllm_config: Any) -> None:
    """Turn dynamic NTK off in the model's config, in favour of the factor that it has at --max-model-len."""
    config, context = vllm_config.model_config.hf_config, vllm_config.model_config.max_model_len
    if not config.use_dynamic_ntk:
        return
    if context > config.seq_length:
        config.rotary_emb_base = fixed_rotary_base(config, context)
        logger.warning(
            "Qwen-7B was trained on %d tokens: for --max-model-len %d RoPE is stretched by one factor, for short "
            "prompts too; without that flag, or at %d, nothing changes.", config.seq_length, context, config.seq_length,
        )  # fmt: skip
    config.use_dynamic_ntk = False
