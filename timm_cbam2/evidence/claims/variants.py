"""What is compared: the attention in the slot, its options, and what its recipe changes."""

from __future__ import annotations

from typing import Any

__all__ = ["VARIANTS"]


def _cbam2(about: str, recipe: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"attention": "cbam2", "about": about, "cbam2": options, "recipe": recipe or {}}


def _trial(about: str, recipe: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"attention": "trial", "about": about, "trial": options, "recipe": recipe or {}}


MAPS_LIVE: dict[str, Any] = dict(center_spatial=True, learned_maps=4, router_norm=True, squeeze_norm=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"attention": None, "about": "no attention"},
    "se": {"attention": "se", "about": "timm's squeeze-and-excitation"},
    "eca": {"attention": "eca", "about": "timm's efficient channel attention"},
    "cbam": {"attention": "cbam", "about": "timm's CBAM"},
    "cbam2": _cbam2("every option off: as registered"),
    "cbam2-center": _cbam2("both gates centred", center=True),
    "cbam2-slow": _cbam2("every option off, attention's learning rate a tenth", {"attention_lr_scale": 0.1}),
    # options, alone and together
    "center-spatial": _cbam2("spatial gate centred", center_spatial=True),
    "maps": _cbam2("and four learned maps", center_spatial=True, learned_maps=4),
    "maps-route": _cbam2("and normalised routers", center_spatial=True, learned_maps=4, router_norm=True),
    "maps-live": _cbam2("and normalised squeezes", **MAPS_LIVE),
    "maps-live-gentle": {
        **_cbam2("the same, squeezes at a tenth of their spread at first", **MAPS_LIVE),
        "squeeze_gain": 0.1,
    },
    "live-gentle": {
        **_cbam2(
            "no learned maps, squeezes at a tenth at first", center_spatial=True, router_norm=True, squeeze_norm=True
        ),
        "squeeze_gain": 0.1,
    },
    "maps-none": _cbam2(
        "and routing by position",
        center_spatial=True,
        learned_maps=4,
        router_norm=True,
        squeeze_norm=True,
        router_pool="none",
    ),
    "maps-live-slow": _cbam2("the same, attention's learning rate a tenth", {"attention_lr_scale": 0.1}, **MAPS_LIVE),
    "maps-live-t4": _cbam2("the same, temperatures from 4", **MAPS_LIVE, temperature=4.0),
    "maps-live-t10": _cbam2("the same, temperatures from 10", **MAPS_LIVE, temperature=10.0),
    "norm": _cbam2("spatial gate centred, squeezes normalised", center_spatial=True, squeeze_norm=True),
    "live": _cbam2("no learned maps, all else normalised", center_spatial=True, router_norm=True, squeeze_norm=True),
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
