"""Qwen-7B with a head of `num_labels` outputs in place of the language model's: reward models, classifiers, taggers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_qwen import QWenConfig
from .modeling_qwen import QWenModel, QWenPreTrainedModel


class QWenForSequenceClassification(QWenPreTrainedModel):
    """Scores a text by the hidden state of its last token."""

    _new_tensors = ("score.weight",)  # not in a language model's checkpoint: they are to be trained
    _keys_to_ignore_on_load_unexpected = [*QWenPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = QWenModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels) of `input_ids` (B, T), and the loss for `labels` (B,), or (B, num_labels) floats.

        Padding is what `attention_mask` (B, T) says, on either side; without a mask, every token counts.
        """
        outputs = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden = outputs.last_hidden_state  # (B, T, C)
        last = torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
        if attention_mask is not None:
            places = torch.arange(hidden.shape[1], device=hidden.device)
            last = (places * attention_mask[:, -hidden.shape[1] :].to(hidden.device)).argmax(-1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip


class QWenForTokenClassification(GenericForTokenClassification, QWenPreTrainedModel):
    """Labels each token; transformers' own head."""

    _new_tensors = ("score.weight", "score.bias")
    _keys_to_ignore_on_load_unexpected = QWenForSequenceClassification._keys_to_ignore_on_load_unexpected
    base_model_prefix = "transformer"
