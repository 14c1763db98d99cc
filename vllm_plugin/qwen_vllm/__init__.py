"""Qwen-7B checkpoints as published, in vLLM: no conversion, and no code from the checkpoint is run.

    pip install ./vllm_plugin            # in vLLM's environment
    vllm serve Qwen/Qwen-7B-Chat --enable-auto-tool-choice --tool-call-parser qwen_react

The model is qwen/modeling_qwen.py, run by vLLM's Transformers backend; tokenizer and chat template are the package's.
"""

import os


def register() -> None:
    """Make model, tokenizer and tool parser known; vLLM calls it in each of its processes."""
    import transformers
    from vllm import ModelRegistry
    from vllm.tool_parsers import ToolParserManager

    import qwen

    transformers.QWenLMHeadModel = qwen.QWenLMHeadModel  # the backend looks architectures up there
    # Else a context beyond the config's seq_length would be refused: the model stretches RoPE for it.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    ModelRegistry.register_model("QWenLMHeadModel", "qwen_vllm.model:QWenForCausalLM")
    ToolParserManager.register_lazy_module("qwen_react", "qwen_vllm.tool_parser", "ReactToolParser")
