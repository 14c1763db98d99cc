"""The Qwen-7B model: norm, rotary embedding, attention, MLP, block, decoder, language-model head.

Shapes: B batch, T new tokens, S all tokens (cached and new), H heads, D size of a head, C hidden size, V vocabulary.
Parameter names equal the keys of the official checkpoints, so loading needs no map.

Three things set Qwen-7B apart from Llama, all of them at inference only: dynamic NTK stretches the rotary base for
prompts longer than the training length, logn scales late queries, and window attention limits how far layers look back.
"""

import math
import os
import re
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import let_grow
from .chatml import complete_eos_ids
from .checkpoint import check_loaded_keys, check_weight_files, compare_shapes, without_code
from .configuration_qwen import QWenConfig
from .cpu import CpuDecoder, load_kernels
from .errors import QwenError
from .generation import QWenGenerationMixin
from .int4 import check_layers  # importing it also tells transformers how to load Int4 checkpoints
from .keywords import translate_keywords
from .long_context import dynamic_ntk_alpha, logn_scale
from .loss import LMHead
from .paged_attention import PagedStep
from .push_code import push_code_to
from .settings import prepare, saveable

ATTENTION_PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}

# The int8 cache of transformers that stands for the publisher's `use_cache_quantization`; it needs the package hqq.
INT8_CACHE = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1}

Rotary = tuple[Tensor, Tensor]  # cos and sin, each (B, 1, T, D), float32


class QWenRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the model's type (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return x32.type_as(x) * self.weight


def rotary_embedding(position_ids: Tensor, alpha: Tensor | None, config: QWenConfig) -> Rotary:
    """Angles of RoPE for `position_ids` (B, T), its base stretched to base * alpha**(D/(D-2)) where given, by row
    (B,) or by token (B, T).

    Computed at each call rather than kept in a buffer: it is small, and each conversation may have its own alpha.
    """
    even = torch.arange(0, config.kv_channels, 2, device=position_ids.device, dtype=torch.float32)  # (D/2,)
    inv_freq = 1 / config.rotary_emb_base ** (even / config.kv_channels)  # so written, equal to Qwen2 to the last bit
    if alpha is not None:
        alpha = alpha.view(len(alpha), 1, -1, 1)  # (B, 1, 1 or T, 1)
        inv_freq = inv_freq * alpha ** (-even / (config.kv_channels - 2))  # (B, 1, 1 or T, D/2)
    angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate `x` (B, H, T, D) in float32: dimension i turns with dimension i + D/2."""
    cos, sin = rotary
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as written in the paper: the readable reference, and the one that can return its weights."""
    weights = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).type_as(query)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (B, T, H, D)


class QWenAttention(nn.Module):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.num_key_value_groups = 1  # read by transformers' attention functions: every query head has its own key
        self.is_causal = True
        projection_size = config.num_attention_heads * config.kv_channels
        self.width = projection_size  # of query, key and value each; of a slice of the layer, its share
        self.c_attn = nn.Linear(config.hidden_size, 3 * projection_size)
        self.c_proj = nn.Linear(projection_size, config.hidden_size, bias=not config.no_bias)
        self.c_proj.adds_to_residual = True

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        query_rotary: Rotary,
        key_rotary: Rotary,
        window: int | None = None,
        past_key_values: Cache | PagedStep | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        B, T, _ = x.shape
        # Split by fixed sizes: so other engines see three projections, and cut each of them over their processes.
        query, key, value = self.c_attn(x).split((self.width, self.width, self.width), dim=-1)
        query = query.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        key = key.view(B, T, -1, self.head_dim).transpose(1, 2)
        value = value.view(B, T, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary(query, query_rotary), apply_rotary(key, key_rotary)
        if isinstance(past_key_values, PagedStep):
            output = past_key_values.attend(self.layer_idx, query, key, value, self.scaling, window)
            return self.c_proj(output.reshape(B, T, -1)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            sliding_window=window,  # flash attention has no mask to read it from
            **kwargs,
        )
        return self.c_proj(output.reshape(B, T, -1)), weights  # (B, T, C)


class QWenMLP(nn.Module):
    """SwiGLU: in Llama's words w2 is the gate, w1 the up and c_proj the down projection."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)
        self.c_proj.adds_to_residual = True

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


class QWenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture, and how checkpoint directories are read and written."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"attn\.masked_bias$"]  # buffers of old releases
    _new_tensors: tuple[str, ...] = ()  # what a checkpoint may lack, because it is still to be trained
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "adds_to_residual", False):
            # What is added to the residual stream shrinks with depth, so that its variance does not grow (GPT-2).
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as transformers does; also takes the keywords published over the years (see keywords.py).

        Raises:
            QwenError: a file of a local directory is missing, truncated or a git-lfs pointer, or weights are missing.
            ImportError: `attn_implementation` needs a package that is not installed; the message names it.
        """
        kwargs = without_code(kwargs)
        stored = check_weight_files(pretrained_model_name_or_path, kwargs)
        quantize_cache = kwargs.pop("use_cache_quantization", False)
        if isinstance(config := kwargs.get("config"), QWenConfig):
            config.complete(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        translate_keywords(kwargs, pretrained_model_name_or_path)
        want_info = kwargs.pop("output_loading_info", False)
        accept_other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            if stored and not kwargs.get("key_mapping"):
                config = kwargs.get("config") or cls.config_class.from_pretrained(pretrained_model_name_or_path)
                cls._check_shapes(pretrained_model_name_or_path, stored, config, accept_other_sizes)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except UnpicklingError as error:
            raise QwenError(
                f"{pretrained_model_name_or_path} holds more than tensors in a .bin file, which is not unpickled "
                "because that could run code: take a copy of the checkpoint in safetensors"
            ) from error
        except ImportError as error:
            # AutoModel hands it over on the config.
            attn = kwargs.get("attn_implementation") or getattr(kwargs.get("config"), "_attn_implementation", None)
            if attn not in ATTENTION_PACKAGES:
                raise
            package = ATTENTION_PACKAGES[attn]
            raise ImportError(f"{attn} needs the package {package}, on a CUDA GPU; sdpa needs nothing") from error
        check_loaded_keys(pretrained_model_name_or_path, info, accept_other_sizes, cls._new_tensors)
        check_layers(model)
        if model.can_generate():
            prepare(model.generation_config, f"generation settings of {pretrained_model_name_or_path}")
            if quantize_cache or getattr(model.config, "use_cache_quantization", False):
                model.generation_config.cache_implementation = "quantized"
                model.generation_config.cache_config = dict(INT8_CACHE)
        return (model, info) if want_info else model

    @classmethod
    def _check_shapes(
        cls, source: str | os.PathLike, stored: dict[str, tuple[int, ...]], config: QWenConfig, accept_other_sizes: bool
    ) -> None:
        """QwenError if the tensors of the files are not those of this class, as far as the header tells."""
        quantization = getattr(config, "quantization_config", None)
        if not isinstance(config, QWenConfig) or quantization:  # quantised layers have tensors of their own
            return
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        prefix = f"{cls.base_model_prefix}."
        if not any(name.startswith(prefix) for name in expected):  # the decoder alone
            stored = {name.removeprefix(prefix): shape for name, shape in stored.items()}
        tied = cls._tied_weights_keys if config.tie_word_embeddings and cls._tied_weights_keys else ()
        known = {name: shape for name, shape in stored.items() if name in expected or not cls._ignores(name)}
        check_loaded_keys(source, compare_shapes(known, expected, tied), accept_other_sizes, cls._new_tensors)

    @classmethod
    def _ignores(cls, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in cls._keys_to_ignore_on_load_unexpected)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_code: bool = False, **kwargs: Any
    ) -> None:
        """Write a checkpoint that loads here; `push_code` adds the model's code, to load it in plain transformers."""
        own = self.generation_config if self.can_generate() else None
        try:
            if own is not None:
                self.generation_config = saveable(own)
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if own is not None:
                self.generation_config = own
        if push_code:
            push_code_to(save_directory)


class QWenModel(QWenPreTrainedModel):
    """The decoder without its head: token ids to hidden states."""

    _keys_to_ignore_on_load_unexpected = [
        *QWenPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(lm_head|score)\.",
    ]

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.cpu_decoder: CpuDecoder | None = None  # set by `use_cpu_kernels`
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[int | None, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        ntk_alpha: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C) of `input_ids` (B, T) or `inputs_embeds` (B, T, C).

        Args:
            attention_mask: (B, S), 0 at padding; it covers cached tokens too.
            position_ids: (B, T); by default each row counts its own tokens, padding left out.
            ntk_alpha: (B,) factors of dynamic NTK. By default they are chosen from the lengths of the prompts when
                the cache is empty, and kept on the cache as `ntk_alpha`. Whoever prefills in chunks passes
                `dynamic_ntk_alpha(whole lengths, seq_length)` with the first chunk.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, not both and not neither")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        let_grow(past_key_values, len(self.h))

        if position_ids is None:
            position_ids = true_positions(attention_mask, inputs_embeds, past_key_values)
        ntk_alpha = self.choose_ntk_alpha(ntk_alpha, attention_mask, inputs_embeds, past_key_values)
        key_rotary = query_rotary = rotary_embedding(position_ids, ntk_alpha, self.config)
        if self.config.use_logn_attn and not self.training:
            scale = logn_scale(position_ids, self.config.seq_length)
            query_rotary = (key_rotary[0] * scale, key_rotary[1] * scale)

        if self.cpu_decoder is not None and self.cpu_decoder.fits(
            inputs_embeds, attention_mask, past_key_values if use_cache else None, self.training, kwargs
        ):
            hidden = self.cpu_decoder(inputs_embeds, query_rotary, key_rotary, attention_mask, past_key_values)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

        windows = [None] * len(self.h) if self.training else self.config.attention_windows
        # By window; a dict already where `generate` has made them for a static cache.
        masks = attention_mask
        if not isinstance(masks, dict):
            if isinstance(past_key_values, PagedStep):
                masks = dict.fromkeys(windows)  # it knows by itself what each token sees
            else:
                masks = attention_masks(
                    self.config, inputs_embeds, attention_mask, past_key_values, position_ids, windows
                )

        hidden = self.drop(inputs_embeds)
        # Early-exit assistants lower num_hidden_layers.
        for block, window in zip(self.h[: self.config.num_hidden_layers], windows, strict=False):
            hidden = block(
                hidden,
                attention_mask=masks[window],
                window=window,
                query_rotary=query_rotary,
                key_rotary=key_rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values if use_cache else None
        )

    def choose_ntk_alpha(
        self, given: Tensor | None, attention_mask: Any, inputs_embeds: Tensor, cache: Cache | None
    ) -> Tensor | None:
        """The alphas (B,) of these rows, None where dynamic NTK is off.

        They belong to the conversation, not to the module: keys in the cache are rotated already, so alpha is chosen
        once, at prefill, and travels on the cache.
        """
        if self.training or not self.config.use_dynamic_ntk:
            return None
        alpha = given
        if alpha is None and cache is not None and cache.get_seq_length() > 0:
            alpha = getattr(cache, "ntk_alpha", None)
        if alpha is None:
            lengths = true_lengths(attention_mask, inputs_embeds)
            alpha = dynamic_ntk_alpha(lengths, self.config.seq_length)
        alpha = alpha.to(inputs_embeds.device)
        if cache is not None and getattr(cache, "ntk_alpha", None) is not alpha:
            cache.ntk_alpha = alpha
        return alpha


def true_lengths(attention_mask: Any, tokens: Tensor) -> Tensor:
    """Tokens in each row (B,), padding left out; `tokens` is (B, T, ...)."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.long().sum(-1)
    return torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)


def true_positions(attention_mask: Any, inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """Each new token's position (B, T) in its own row, as if there were no padding."""
    T = inputs_embeds.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:].to(inputs_embeds.device)
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(T, device=inputs_embeds.device) + past)[None, :]


def attention_masks(
    config: QWenConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None = None,
    windows: list[int | None] | None = None,
    **kwargs: Any,
) -> dict[int | None, Any]:
    """One causal mask for each different window, by default the config's, in the form the attention function wants."""
    sizes = set(config.attention_windows if windows is None else windows)
    return {
        size: create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=None if size is None else sliding_window_overlay(size),
        )
        for size in sizes
    }


class QWenLMHeadModel(QWenPreTrainedModel, QWenGenerationMixin):
    """Qwen-7B as a language model: next-token logits, loss, `generate`, and `chat` (see generation.py)."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings of `generate`; whatever is assigned gets ChatML's stop ids, which published files leave out."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        if config is not None:
            complete_eos_ids(config)
        self._generation_config = config

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers would derive it from a class name in its own style
        self.post_init()

    def train(self, mode: bool = True) -> "QWenLMHeadModel":
        """As of any module; keys and values kept of replies go, being those of weights that are about to change."""
        if mode:
            self._engine = None
        return super().train(mode)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        ntk_alpha: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) float32 and, with `labels` (B, T; -100 is ignored), the mean next-token loss.

        `logits_to_keep` counts the last positions to compute logits of (0 is all): a long prompt needs one row of
        151,936, not thousands. `skip_logits` computes the loss without logits to return, in far less memory (see
        loss.py). The other arguments are QWenModel's.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            ntk_alpha=ntk_alpha,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        if skip_logits and labels is not None:
            loss = self.lm_head(hidden, labels, kwargs.get("num_items_in_batch"))
            return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states)
        cpu_decoder = self.transformer.cpu_decoder
        logits = self.lm_head(hidden) if cpu_decoder is None else cpu_decoder.linear(hidden, self.lm_head)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def use_cpu_kernels(self) -> bool:
        """Let compiled kernels do the work where they can (see cpu.py); whether there are any."""
        kernels = load_kernels()
        self.transformer.cpu_decoder = None if kernels is None else CpuDecoder(kernels, self.transformer)
        return kernels is not None

    create_masks_for_generate = staticmethod(attention_masks)
