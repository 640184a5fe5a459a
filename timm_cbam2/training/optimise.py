"""What is trained and how fast: parts to freeze, parameter groups, optimizer, schedule, loss, all timm's."""

from __future__ import annotations

from typing import Any

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError, one_line
from ..models.cbam2 import is_cbam2
from ..models.weights_cbam2 import undecayed
from .multi_label import MultiLabelLoss

__all__ = [
    "attention_lr_scale",
    "attention_parameters",
    "freeze",
    "keep_frozen",
    "make_loss",
    "make_optimizer",
    "make_schedule",
]


# In torchvision, transformers and segmentation_models_pytorch.
HEADS = ("fc", "classifier", "head", "heads", "roi_heads", "decode_head", "segmentation_head")


# What CBAM2's learning rate is times that of all else, where all begins at random: see evidence/claims. AdamW's steps
# are as long for a gate that hardly matters yet as for any weight, and shut channels for good; SGD's are too short.
# That was measured of blocks whose decisions are normalised.
CBAM2_LR_SCALE = {"adamw": 0.3, "sgd": 3.0}


def attention_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters inside attention blocks: CBAM2's, and those in timm's attention slot (`…se.`)."""
    found = set()
    for name, module in network.named_modules():
        if is_cbam2(module) or name.rpartition(".")[2] == "se":
            found |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
    return found


def head_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters of the classifier, or of what stands for one in other libraries' networks."""
    if hasattr(network, "get_classifier"):
        head = network.get_classifier()
    else:
        head = [getattr(network, name) for name in HEADS if isinstance(getattr(network, name, None), nn.Module)]
    modules = {id(module) for module in ([head] if isinstance(head, nn.Module) else head)}
    return {
        f"{name}.{parameter}"
        for name, module in network.named_modules()
        if id(module) in modules
        for parameter, _ in module.named_parameters()
    }


def freeze(network: nn.Module, train: str) -> int:
    """Leave only a part of `network` trainable.

    Args:
        network: any model; its head is what timm calls so, or a part called fc, classifier, head or the like.
        train: "all", "attention", "head" or "attention+head".

    Returns:
        Number of trainable parameters.

    Raises:
        UserError: the model has no such part.
    """
    if train != "all":
        chosen: set[str] = set()
        for part in train.split("+"):
            names = attention_parameters(network) if part == "attention" else head_parameters(network)
            if not names:
                raise UserError(f"--train {train}: this model has no {part}; --train all trains what it has")
            chosen |= names
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def keep_frozen(network: nn.Module) -> None:
    """After `network.train()`: a BatchNorm whose parameters are frozen also leaves its statistics as they are."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def attention_lr_scale(network: nn.Module, opt: str, train: str, pretrained: bool) -> float:
    """What the learning rate of attention is times that of all else, unless a person says so."""
    normalised = any(is_cbam2(module) and module.channel.norm is not None for module in network.modules())
    return CBAM2_LR_SCALE.get(opt, 1.0) if normalised and train == "all" and not pretrained else 1.0


def _groups(network: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """timm's groups (lr by depth; no decay for norms, biases, CBAM2), with attention in groups of its own."""
    scale, decay, waits = (settings[f"attention_{name}"] for name in ("lr_scale", "weight_decay", "delay_epochs"))
    scale = 1.0 if scale is None else scale
    exempt = set(network.no_weight_decay() if hasattr(network, "no_weight_decay") else ())
    if decay == settings["weight_decay"]:  # as all others'
        exempt, decay = exempt - undecayed(network), None
    else:
        exempt |= undecayed(network)
    if settings["layer_decay"] is not None:
        groups = param_groups_layer_decay(
            network, settings["weight_decay"], exempt, layer_decay=settings["layer_decay"]
        )
    else:
        groups = param_groups_weight_decay(network, settings["weight_decay"], no_weight_decay_list=exempt)
    if scale == 1.0 and decay is None and not waits:
        return groups
    names = attention_parameters(network)
    if not names:
        option = f"--attention-lr-scale {scale:g}" if scale != 1.0 else f"--attention-delay-epochs {waits:g}"
        option = f"--attention-weight-decay {decay:g}" if scale == 1.0 and decay is not None else option
        raise UserError(f"{option}: this model has no attention; leave it out")
    attention = {id(p): "weights" if p.dim() > 1 else "rest" for name, p in network.named_parameters() if name in names}
    split = []
    for group in groups:
        for part in (None, "weights", "rest"):
            own = {**group, "params": [p for p in group["params"] if attention.get(id(p)) == part]}
            own["lr_scale"] = group.get("lr_scale", 1.0) * (scale if part else 1.0)
            if part == "weights" and decay is not None:
                own["weight_decay"] = decay
            if part and waits:
                own["waits"] = True
            if own["params"]:
                split.append(own)
    return split


def make_optimizer(network: nn.Module, settings: dict[str, Any]) -> Any:
    """timm's optimizer of that name.

    Raises:
        UserError: it cannot be used here, or not with these arguments.
    """
    opt = settings["opt"]
    extra = dict(settings["opt_kwargs"])
    if settings["momentum"] is not None:
        extra["momentum"] = settings["momentum"]
    groups = _groups(network, settings)
    try:
        optimizer = create_optimizer_v2(
            network,
            opt=opt,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            param_group_fn=lambda model: groups,
            **extra,
        )
    except (AssertionError, ImportError, NameError, ValueError, TypeError) as error:  # it needs a package, a GPU, …
        with_what = f" with {extra}" if extra else ""
        advice = "leave --opt-kwargs or --momentum out" if extra else "try --opt adamw"
        raise UserError(f"--opt {opt} cannot be used here{with_what}: {one_line(error, 200)}; {advice}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {opt} needs second derivatives, which are not computed here; try --opt adamw")
    return optimizer


class _Delayed:
    """A schedule of timm's, but that the groups that wait do not learn in the first so many updates."""

    def __init__(self, schedule: Any, optimizer: Any, updates: float) -> None:
        self.schedule, self.optimizer, self.updates = schedule, optimizer, updates
        self.step_update(0)

    def step_update(self, update: int) -> None:
        self.schedule.step_update(update)
        if update < self.updates:
            for group in self.optimizer.param_groups:  # loading a checkpoint makes them anew
                if group.get("waits"):
                    group["lr"] = 0.0


def make_schedule(optimizer: Any, settings: dict[str, Any], updates_per_epoch: int) -> Any:
    """timm's schedule of that name, a function of the number of updates; None for "none".

    Raises:
        UserError: it cannot be had with so many epochs.
    """
    sched, epochs, lr = settings["sched"], settings["epochs"], settings["lr"]
    warmup = min(settings["warmup_epochs"], epochs / 2)
    waits = settings["attention_delay_epochs"]
    if sched == "none" and (waits or any(group.get("lr_scale", 1.0) != 1.0 for group in optimizer.param_groups)):
        sched, warmup = "constant", 0  # timm's schedules apply the scales, its optimizers do not
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched,
            num_epochs=epochs,
            warmup_epochs=warmup,
            warmup_lr=lr / 100,
            min_lr=lr / 1000,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise UserError(f"--sched {settings['sched']} with --epochs {epochs}: {one_line(error, 200)}") from error
    return _Delayed(scheduler, optimizer, waits * updates_per_epoch) if waits else scheduler


def make_loss(settings: dict[str, Any], classes: int, weights: Tensor | None = None) -> tuple[nn.Module, Mixup | None]:
    """The training loss, and what mixes a batch before it (None unless asked for).

    Args:
        settings: of the run.
        classes: number of them, K.
        weights: (K,) what each class counts, None for 1 each; in binary cross-entropy, what its positives count.
    """
    smoothing = settings["label_smoothing"]
    mixup = None
    if settings["mixup"] > 0 or settings["cutmix"] > 0:
        mixup = Mixup(settings["mixup"], settings["cutmix"], label_smoothing=smoothing, num_classes=classes)
        smoothing = 0.0  # is in the mixed targets
    if settings["multi_label"]:
        return MultiLabelLoss(smoothing, settings["bce_target_threshold"], weights), mixup
    if settings["bce"]:
        return BinaryCrossEntropy(smoothing, settings["bce_target_threshold"], pos_weight=weights), mixup
    return nn.CrossEntropyLoss(weights, label_smoothing=smoothing), mixup
