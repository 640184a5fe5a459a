"""Learn from another model's answers beside the labels: `--distill-from`, naturally the twin without attention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.images import Images
from ..data.loading import data_config
from ..errors import UserError
from ..hub.zoo import check_classifier, class_names, load

__all__ = ["Distillation", "make_distillation"]


class Distillation(nn.Module):
    """The loss of a run, mixed with the divergence from what a teacher says of the same batch.

    "Distilling the Knowledge in a Neural Network" (Hinton et al., 2015, https://arxiv.org/abs/1503.02531):
    (1 - alpha) · loss + alpha · T² · KL(teacher / T ‖ student / T). With several labels an image each class is a
    distribution of its own. The teacher is in eval mode, gets no gradient, and sees the augmented, mixed images that
    the student sees, normalised in its own way.

    Args:
        teacher: gives logits (B, teacher's classes).
        order: for each class of the run, its index in the teacher's output.
        alpha: share of the divergence, 0 to 1.
        temperature: T, by which both logits are divided.
        statistics: mean and standard deviation (2, C) of the run's images, and the teacher's.
        multi_label: whether an image has several labels.
        autocast: the context for the teacher's mixed precision.
    """

    def __init__(
        self,
        teacher: nn.Module,
        order: list[int],
        alpha: float,
        temperature: float,
        statistics: tuple[Tensor, Tensor],
        multi_label: bool = False,
        autocast: Callable[[], Any] = nullcontext,
    ):
        super().__init__()
        self.autocast = autocast
        self.teacher = teacher.eval().requires_grad_(False)
        self.alpha, self.temperature, self.multi_label = alpha, temperature, multi_label
        self.register_buffer("order", torch.tensor(order))
        (mean, std), (other_mean, other_std) = (pair[:, None, :, None, None] for pair in statistics)
        self.register_buffer("scale", std / other_std)  # (1, C, 1, 1)
        self.register_buffer("shift", (mean - other_mean) / other_std)

    def forward(self, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The mixed loss of a batch: images (B, C, H, W), the student's logits (B, K) and its loss."""
        with torch.no_grad(), self.autocast():
            said = self.teacher(images * self.scale + self.shift)[:, self.order].float() / self.temperature
        logits = logits.float() / self.temperature
        if self.multi_label:
            # The divergence is the cross-entropy less the teacher's own entropy, which has no gradient.
            target = said.sigmoid()
            divergence = F.binary_cross_entropy_with_logits(logits, target)
            divergence = divergence - F.binary_cross_entropy_with_logits(said, target)
        else:
            divergence = F.kl_div(logits.log_softmax(1), said.log_softmax(1), reduction="batchmean", log_target=True)
        return (1 - self.alpha) * loss + self.alpha * self.temperature**2 * divergence


def make_distillation(
    settings: Mapping[str, Any], images: Images, config: Mapping[str, Any], accelerator: Any
) -> Distillation | None:
    """The teacher of a run with these settings; None without `--distill-from`.

    Args:
        settings: of the run.
        images: whose classes the teacher must know, by name.
        config: preprocessing of the images to train on.
        accelerator: of the run.

    Raises:
        UserError: no such model, other classes, or other images.
    """
    name = settings["distill_from"]
    if name is None:
        return None
    teacher = load(name)
    check_classifier(teacher, name)
    if teacher.multi_label != images.multi_label:
        raise UserError(
            f"--distill-from {name} tells {'several labels' if teacher.multi_label else 'one label'} of an image, the "
            f"images have {'several' if images.multi_label else 'one'}: give a model fine-tuned on such images"
        )
    own = data_config(teacher)
    channels = config["input_size"][0]
    if own["input_size"][0] != channels:
        raise UserError(
            f"--distill-from {name} takes images of {own['input_size'][0]} channels, this run has {channels}: give "
            "another teacher"
        )
    statistics = tuple(torch.tensor([c["mean"], c["std"]], dtype=torch.float32) for c in (config, own))
    alpha, temperature = settings["distill_alpha"], settings["distill_temperature"]
    order = _order(teacher, images, name)
    several = images.multi_label
    made = Distillation(teacher, order, alpha, temperature, statistics, several, accelerator.autocast)
    return made.to(accelerator.device)


def _order(teacher: nn.Module, images: Images, name: str) -> list[int]:
    """For each class of the images, its index in the teacher's output."""
    known = class_names(teacher)
    advice = "give a model fine-tuned on the same classes, such as the twin without attention"
    if known is None:
        if teacher.num_classes != len(images.classes):
            raise UserError(
                f"--distill-from {name} tells {teacher.num_classes} classes apart without naming them, and there are "
                f"{len(images.classes)}: {advice}"
            )
        return list(range(teacher.num_classes))
    missing = [c for c in images.classes if c not in known]
    if missing:
        some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(f"--distill-from {name} does not know {some} ({len(missing)} classes of the images): {advice}")
    return [known.index(c) for c in images.classes]
