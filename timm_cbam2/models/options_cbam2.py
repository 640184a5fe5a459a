"""Which values each CBAM2 option may take, and the one-line errors for the others."""

import difflib
import sys
from numbers import Integral, Real
from typing import Any, Dict, Mapping, Optional

__all__ = ["TEMPERATURE_EPS", "check_options", "complete_options"]

# Far above any use; a model file must not be able to ask for all memory.
MAX_COUNT = 2**16
MAX_FOOTPRINT = 1023  # of a branch, dilation counted
TEMPERATURE_EPS = 1e-6  # a learnable temperature never falls below it
FUSIONS = ("router", "static", "sum")
ROUTER_POOLS = ("avg", "moments", "none")
GATES = ("sigmoid", "hard_sigmoid", "unit_sigmoid")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) <= MAX_COUNT


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]  # mypy's Real has no order


def _are_counts(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(_is_count(v) for v in value)


def _are_kernels(value: Any) -> bool:
    return _are_counts(value) and all(v <= MAX_FOOTPRINT for v in value)


def _is_dilated(value: Any) -> bool:
    return _are_counts(value) and len(value) == 2 and value[1] * (value[0] - 1) < MAX_FOOTPRINT


def _one_of(*names: str):
    return lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}"


_COUNT = (_is_count, f"a whole number from 1 to {MAX_COUNT}")
_FLAG = (lambda v: isinstance(v, bool), "True or False")
_RULES = {
    "channels": _COUNT,
    "rd_ratio": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "rd_channels": (lambda v: v is None or _is_count(v), f"None or a whole number from 1 to {MAX_COUNT}"),
    "rd_divisor": _COUNT,
    "fusion": _one_of(*FUSIONS),
    "router_channels": _COUNT,
    "kernel_sizes": (_are_kernels, f"a list of one or more whole numbers from 1 to {MAX_FOOTPRINT}"),
    "dilated": (
        lambda v: v is None or _is_dilated(v),
        f"None or a pair (kernel size, dilation) that spans at most {MAX_FOOTPRINT}",
    ),
    "coords": _FLAG,
    "router_pool": _one_of(*ROUTER_POOLS),
    "temperature": (lambda v: _is_number(v) and v > TEMPERATURE_EPS, f"a finite number above {TEMPERATURE_EPS:g}"),
    "learnable_temperature": _FLAG,
    "gate": _one_of(*GATES),
    "mlp_bias": _FLAG,
    "center": _FLAG,
    "center_spatial": _FLAG,
    "squeeze_norm": _FLAG,
    "router_norm": _FLAG,
    "learned_maps": (
        lambda v: v == 0 and not isinstance(v, bool) or _is_count(v),
        f"a whole number from 0 to {MAX_COUNT}",
    ),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Check the values of those CBAM2 options that `options` names; other names are passed over.

    Raises:
        ValueError: Naming the option, its value and what is allowed.
    """
    for name, value in options.items():
        is_allowed, allowed = _RULES.get(name, (None, ""))
        if is_allowed is not None and not is_allowed(value):
            raise ValueError(f"CBAM2 option {name}={value!r} is not allowed; give {allowed}.")
    if options.get("router_pool") == "moments" and options.get("coords") is False:
        raise ValueError(
            "CBAM2 option router_pool='moments' is not allowed with coords=False; "
            "give router_pool='avg', or coords=True."
        )


def complete_options(options: Optional[Mapping[str, Any]], defaults: Mapping[str, Any]) -> Dict[str, Any]:
    """Check `options` and fill in `defaults` for those that are absent; lists become tuples.

    Raises:
        ValueError: For a name that is not in `defaults`, or a value that is not allowed.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"cbam2={options!r} is not allowed; give a dict of options, such as dict(gate='sigmoid').")
    completed = dict(defaults)
    for name, value in (options or {}).items():
        if name not in defaults:
            close = difflib.get_close_matches(str(name), defaults, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"Unknown CBAM2 option {name}={value!r}.{hint} Allowed are {', '.join(defaults)}.")
        completed[name] = tuple(value) if isinstance(value, list) else value
    check_options(completed)
    return completed
