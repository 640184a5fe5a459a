"""What is compared: the attention in the slot, its options, and what its recipe changes."""

from __future__ import annotations

from typing import Any

__all__ = ["VARIANTS"]


def _cbam2(about: str, recipe: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"attention": "cbam2", "about": about, "cbam2": options, "recipe": recipe or {}}


def _trial(about: str, recipe: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"attention": "trial", "about": about, "trial": options, "recipe": recipe or {}}


def _loud(about: str, recipe: dict[str, Any] | None = None, gains: Any = (1.0, 1.0), **options: Any) -> dict[str, Any]:
    """Normalised squeezes and router logits start at these strengths, where the block itself starts both at a tenth."""
    return {**_cbam2(about, recipe, **options), "gains": gains}


def _whole(variant: dict[str, Any]) -> dict[str, Any]:
    """The last norm of every branch starts at 1; timm starts it at 0."""
    return {**variant, "zero_init_last": False}


SLOW, THIRD, HALF = {"attention_lr_scale": 0.1}, {"attention_lr_scale": 0.3}, {"lr": 3e-3}
FAST, FASTEST = {"attention_lr_scale": 3.0}, {"attention_lr_scale": 10.0}
KEPT = {"attention_weight_decay": 0.0}
LATE, LATER = {"attention_delay_epochs": 2.0}, {"attention_delay_epochs": 4.0}
BOTH: dict[str, Any] = dict(router_norm=True, squeeze_norm=True)
LIVE: dict[str, Any] = dict(center_spatial=True, **BOTH)
MAPS_LIVE: dict[str, Any] = dict(learned_maps=4, **LIVE)
ROUTE: dict[str, Any] = dict(fusion="norm", route="norm")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"attention": None, "about": "no attention"},
    "plain-3": {"attention": None, "about": "no attention, half the rate", "recipe": HALF},
    "se": {"attention": "se", "about": "timm's squeeze-and-excitation"},
    "se-03": {"attention": "se", "about": "the same, SGD at 0.03", "recipe": {"lr": 0.03}},
    "eca": {"attention": "eca", "about": "timm's efficient channel attention"},
    "cbam": {"attention": "cbam", "about": "timm's CBAM"},
    "cbam2": _cbam2("every option off: as registered in 0.1"),
    "cbam2-center": _cbam2("both gates centred", center=True),
    "cbam2-slow": _cbam2("every option off, attention's learning rate a tenth", SLOW),
    "cbam2-3": _cbam2("every option off, half the rate", HALF),
    # options, alone and together
    "center-spatial": _cbam2("spatial gate centred", center_spatial=True),
    "learned": _cbam2("four learned maps", learned_maps=4),
    "maps": _cbam2("and four learned maps", center_spatial=True, learned_maps=4),
    "quiet": _cbam2("squeezes and routers normalised", **BOTH),
    "quiet-maps": _cbam2("and four learned maps", learned_maps=4, **BOTH),
    "quiet-center": _cbam2("squeezes and routers normalised, spatial gate centred: as registered", **LIVE),
    "quiet-center-slow": _cbam2("the same, attention's learning rate a tenth", SLOW, **LIVE),
    "quiet-center-third": _cbam2("the same, attention's learning rate a third", THIRD, **LIVE),
    "quiet-center-fast": _cbam2("the same, attention's learning rate three times the network's", FAST, **LIVE),
    "quiet-center-fastest": _cbam2("the same, attention's learning rate ten times the network's", FASTEST, **LIVE),
    "quiet-center-kept": _cbam2("the same, no weight decay for the attention", KEPT, **LIVE),
    "quiet-center-third-kept": _cbam2("no decay, a third of the learning rate", {**THIRD, **KEPT}, **LIVE),
    "quiet-center-fast-kept": _cbam2("and three times the learning rate", {**FAST, **KEPT}, **LIVE),
    "quiet-center-fastest-kept": _cbam2("and ten times the learning rate", {**FASTEST, **KEPT}, **LIVE),
    "quiet-center-late": _cbam2("no decay, learning after two epochs", {**LATE, **KEPT}, **LIVE),
    "quiet-center-later": _cbam2("no decay, learning after four epochs", {**LATER, **KEPT}, **LIVE),
    "quiet-center-third-late": _cbam2("and a third of the learning rate", {**LATE, **THIRD, **KEPT}, **LIVE),
    "quiet-all": _cbam2("and four learned maps", **MAPS_LIVE),
    # branches that begin whole, not at zero
    "plain-whole": _whole({"attention": None, "about": "no attention, branches begin whole"}),
    "se-whole": _whole({"attention": "se", "about": "timm's squeeze-and-excitation, branches begin whole"}),
    "eca-whole": _whole({"attention": "eca", "about": "timm's efficient channel attention, branches begin whole"}),
    "cbam-whole": _whole({"attention": "cbam", "about": "timm's CBAM, branches begin whole"}),
    "quiet-center-kept-whole": _whole(_cbam2("as registered, no decay, branches begin whole", KEPT, **LIVE)),
    "quiet-center-third-kept-whole": _whole(_cbam2("and a third of the learning rate", {**THIRD, **KEPT}, **LIVE)),
    "quiet-center-fast-kept-whole": _whole(_cbam2("and three times the rate", {**FAST, **KEPT}, **LIVE)),
    # the same from full strength, as the block once started
    "maps-route": _loud("and normalised routers", center_spatial=True, learned_maps=4, router_norm=True),
    "maps-live": _loud("and normalised squeezes", **MAPS_LIVE),
    "maps-live-3": _loud("half the rate", HALF, **MAPS_LIVE),
    "maps-live-slow": _loud("the same, attention's learning rate a tenth", SLOW, **MAPS_LIVE),
    "maps-live-t4": _loud("the same, temperatures from 4", **MAPS_LIVE, temperature=4.0),
    "maps-live-t10": _loud("the same, temperatures from 10", **MAPS_LIVE, temperature=10.0),
    "maps-live-gentle": _loud("the same, squeezes at a tenth of their spread at first", gains=(0.1, 1.0), **MAPS_LIVE),
    "maps-none": _loud("and routing by position", router_pool="none", **MAPS_LIVE),
    "norm": _loud("spatial gate centred, squeezes normalised", center_spatial=True, squeeze_norm=True),
    "live": _loud("no learned maps, all else normalised", **LIVE),
    "live-gentle": _loud("no learned maps, squeezes at a tenth at first", gains=(0.1, 1.0), **LIVE),
    "squeeze": _loud("squeezes normalised", squeeze_norm=True),
    "route": _loud("routers normalised", router_norm=True),
    "route-zero": _loud("routers normalised, even at first", gains=(1.0, 0.0), router_norm=True),
    "route-zero-soft": _loud("routers even at first, squeezes at a tenth", gains=(0.1, 0.0), **BOTH),
    "route-center": _loud("routers normalised, spatial gate centred", router_norm=True, center_spatial=True),
    "route-both": _loud("routers normalised, both gates centred", router_norm=True, center=True),
    # blocks that were tried from random weights, see tried.py
    "t-route-off": _trial("routers normalised, no channel mask", channel="off", route="norm"),
    "t-route-bound": _trial("routers normalised, gate inputs bounded by 2", bound=2.0, **ROUTE),
    "t-route-bound1": _trial("routers normalised, gate inputs bounded by 1", bound=1.0, **ROUTE),
    "t-route-bound3": _trial("routers normalised, gate inputs bounded by 3", bound=3.0, **ROUTE),
    "t-route-cool": _trial("routers normalised, channel gate's temperature from 8", cool=8.0, **ROUTE),
    "t-data": _trial("channel gate input less its mean over the data", channel="data"),
    "t-data-route": _trial("and routers normalised", channel="data", **ROUTE),
    "t-data-quiet": _trial(
        "squeezes normalised, quiet; channel gate input less its mean over the data; attention at a third, not decayed",
        {**THIRD, **KEPT},
        channel="data",
        spatial="center",
        quiet=True,
        **ROUTE,
    ),
    "t-data-center": _trial("and the spatial gate centred", channel="data", spatial="center", **ROUTE),
    # blocks that were tried for ConvNeXts, whose images must not depend on each other
    "t-layer": _trial("spatial gate centred, squeezes normalised in each image", channel="layer", spatial="center"),
    # blocks that were tried before the options were made, see tried.py
    "t-center": _trial("spatial gate centred", spatial="center"),
    "t-standard": _trial("spatial gate input standardised in each image", spatial="standard"),
    "t-share": _trial("spatial mask centred and divided by its mean", spatial="share"),
    "t-softmax": _trial("spatial mask a softmax over positions", spatial="softmax", bound=4.0),
    "t-extra": _trial("spatial gate centred, four learned maps", spatial="center", extra=4),
    "t-extra-share": _trial("four learned maps, mask divided by its mean", spatial="share", extra=4),
    "t-extra-standard": _trial("four learned maps, gate input standardised", spatial="standard", extra=4),
    "t-pixel": _trial("spatial gate centred, routing by position", spatial="center", route="pixel"),
    "t-route-norm": _trial(
        "spatial gate centred, router logits normalised", spatial="center", route="norm", fusion="norm"
    ),
    "t-channel-off": _trial("spatial gate centred, no channel mask", spatial="center", channel="off"),
    "t-channel-norm": _trial("spatial gate centred, squeezes normalised", spatial="center", channel="norm"),
    "t-channel-gate": _trial("spatial gate centred, channel gate input normalised", spatial="center", channel="gate"),
    "t-channel-softmax": _trial(
        "spatial gate centred, channels share a sum", spatial="center", channel="softmax", bound=2.0
    ),
    "t-channel-std": _trial(
        "spatial gate centred, standard deviation in the squeeze", spatial="center", std=True, channel="norm"
    ),
    "t-maps-norm": _trial("spatial gate centred, average and maximum normalised", spatial="center", maps="norm"),
    "t-deep": _trial("spatial gate centred, two-layer spatial network", spatial="center", deep=8),
    "t-spatial-off": _trial("no spatial mask, squeezes normalised", spatial="off", channel="norm"),
    "t-norm-deep": _trial("and squeezes normalised", spatial="center", channel="norm", deep=8),
    "t-norm-standard": _trial("standardised, squeezes normalised", spatial="standard", channel="norm"),
}
