"""CBAM2 networks as transformers models: timm's own network inside, timm's own keys in every saved file."""

from dataclasses import dataclass
from typing import Any, Optional, Tuple

import torch
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ModelOutput
from transformers.utils import can_return_tuple

from .configuration_cbam2 import Cbam2Config
from .pretrained_cbam2 import Attentions, Cbam2PreTrainedModel

__all__ = ["Cbam2Backbone", "Cbam2ForImageClassification", "Cbam2Model", "Cbam2PreTrainedModel"]


@dataclass
class Cbam2ModelOutput(ModelOutput):
    """Features of a batch.

    Args:
        last_hidden_state: (B, C, H, W), timm's `forward_features`.
        pooler_output: (B, C'), timm's output with `num_classes=0`.
        hidden_states: One map for each stage, timm's `forward_intermediates`.
        attentions: One `CbamAttention` for each block, in the order of the network.
    """

    last_hidden_state: Optional[torch.FloatTensor] = None
    pooler_output: Optional[torch.FloatTensor] = None
    hidden_states: Optional[Tuple[torch.FloatTensor, ...]] = None
    attentions: Optional[Attentions] = None


@dataclass
class Cbam2ClassifierOutput(ModelOutput):
    """Logits of a batch.

    Args:
        loss: (), when labels were given.
        logits: (B, num_labels).
        hidden_states: One map for each stage, timm's `forward_intermediates`.
        attentions: One `CbamAttention` for each block, in the order of the network.
    """

    loss: Optional[torch.FloatTensor] = None
    logits: Optional[torch.FloatTensor] = None
    hidden_states: Optional[Tuple[torch.FloatTensor, ...]] = None
    attentions: Optional[Attentions] = None


class Cbam2Model(Cbam2PreTrainedModel):
    """A CBAM2 network without its classifier."""

    def __init__(self, config: Cbam2Config) -> None:
        """
        Args:
            config: Of any CBAM2 model.
        """
        super().__init__(config)
        self._build(num_classes=0)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        **kwargs: Any,
    ) -> Cbam2ModelOutput:
        """
        Args:
            pixel_values: Images (B, in_chans, H, W).
            output_attentions: Return one `CbamAttention` for each block.
            output_hidden_states: Return the map of each stage.
            **kwargs: `return_dict=False` for a tuple.
        """
        last, maps, attentions = self._features(pixel_values, *self._wanted(output_attentions, output_hidden_states))
        return Cbam2ModelOutput(last, self.timm_model.forward_head(last), maps, attentions)


class Cbam2ForImageClassification(Cbam2PreTrainedModel):
    """A CBAM2 network with its classifier."""

    def __init__(self, config: Cbam2Config) -> None:
        """
        Args:
            config: With `num_labels` of at least 1.

        Raises:
            ValueError: When `config` has no classes.
        """
        super().__init__(config)
        self.num_labels = config.num_labels
        if not self.num_labels:
            raise ValueError("This model has no classifier: give num_labels=… for a new one, or use AutoModel.")
        self._build(num_classes=self.num_labels)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        **kwargs: Any,
    ) -> Cbam2ClassifierOutput:
        """
        Args:
            pixel_values: Images (B, in_chans, H, W).
            labels: (B,) of classes, (B, num_labels) of 0 and 1 for several labels, or numbers for a regression; see
                `config.problem_type`.
            output_attentions: Return one `CbamAttention` for each block.
            output_hidden_states: Return the map of each stage.
            **kwargs: `return_dict=False` for a tuple.
        """
        last, maps, attentions = self._features(pixel_values, *self._wanted(output_attentions, output_hidden_states))
        logits = self.timm_model.forward_head(last)  # (B, num_labels)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return Cbam2ClassifierOutput(loss, logits, maps, attentions)


class Cbam2Backbone(BackboneMixin, Cbam2PreTrainedModel):
    """Feature maps by stage, equal to those of timm's `features_only=True` with the same indices."""

    def __init__(self, config: Cbam2Config) -> None:
        """
        Args:
            config: Its `out_features` or `out_indices` choose the stages, the last one if neither is given.
        """
        super().__init__(config)
        self._build(num_classes=0)
        self.num_features = [info["num_chs"] for info in self.timm_model.feature_info]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """
        Args:
            pixel_values: Images (B, in_chans, H, W).
            output_attentions: Return one `CbamAttention` for each block that ran.
            output_hidden_states: Return the maps of all stages too.
            **kwargs: `return_dict=False` for a tuple.
        """
        with_attentions, with_hidden_states = self._wanted(output_attentions, output_hidden_states)
        if with_hidden_states or with_attentions:
            _, maps, attentions = self._features(pixel_values, with_attentions, True)
            chosen = tuple((maps or ())[index] for index in self.out_indices)
            return BackboneOutput(chosen, maps if with_hidden_states else None, attentions)
        indices = [index % len(self.stage_names) for index in self.out_indices]
        chosen = self.timm_model.forward_intermediates(
            pixel_values.to(self.dtype), indices, intermediates_only=True, stop_early=True
        )
        return BackboneOutput(tuple(chosen))
