"""The model card: what a model is, how it was trained, what was measured, and code for both libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from ..models.configuration_cbam2 import architectures
from .run_folder import best_row, read_metrics, read_settings, score

__all__ = ["LICENSES", "card", "is_generated", "license_of", "write_card"]

MARK = "<!-- Written by timm_cbam2, and again on each save or push. Remove this line to keep your own text. -->"
# Those the Hub knows by this name; any other becomes "other" with its name.
LICENSES = ("apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "mit")
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_SHOWN = (
    "epochs batch_size lr weight_decay opt sched warmup_epochs label_smoothing augment seed processes mixed_precision"
).split()
_SHOWN_IF_UNUSUAL = dict(
    train="all", model_kwargs={}, attention_lr_scale=1.0, attention_weight_decay=None,
    attention_delay_epochs=0.0, layer_decay=None, ema=None,
    mixup=0.0, cutmix=0.0, random_erasing=0.0, auto_augment=None, accumulate=1, bce=False,
)  # fmt: skip


def write_card(folder: str | Path, repo_id: str | None = None, place: Path | None = None) -> Path:
    """Write `README.md` of a model folder, unless there is one that a person has made their own.

    Args:
        folder: With config.json. That of a run, or its `best` or `last`, tells of the run too.
        repo_id: Name on the Hub for the code in the card.
        place: Where the folder will lie.

    Returns:
        The file.

    Raises:
        ValueError: config.json is missing or describes no model of ours.
    """
    path = Path(folder) / "README.md"
    if is_generated(path):
        path.write_text(card(folder, repo_id, place), encoding="utf-8")
    return path


def is_generated(path: Path) -> bool:
    """Whether the card at `path` is absent or written by `write_card`."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def card(
    folder: str | Path,
    repo_id: str | None = None,
    place: Path | None = None,
    figures: dict[str, Any] | None = None,
) -> str:
    """The text that `write_card` writes; `figures` are measurements that replace those of the run's own epoch."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no config.json of a model: {error}") from error
    repo_id = repo_id or f"user/{re.sub(r'[^A-Za-z0-9._-]+', '-', folder.resolve().name).strip('-.') or 'model'}"
    run, best = _run(place or folder)
    best = best and best | (figures or {})
    base = _base_model(run)
    parts = [
        "---\n" + _metadata(config, run, best, base, repo_id).to_yaml() + "\n---",
        MARK,
        f"# {repo_id.rpartition('/')[2]}",
        _about(architecture, config, run, base),
        _usage(architecture, config, repo_id),
        _training(config, run, best),
        _limits(architecture, config, run, best, base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Settings of the run, and the measurements of the epoch that this folder holds."""
    folder = folder.resolve()
    for place in (folder, folder.parent) if folder.name in ("best", "last") else (folder,):
        run = read_settings(place)
        if run is not None:
            rows = read_metrics(place)
            if not rows:
                return run, None
            is_last = folder.name == "last"
            return run, rows[-1] | {"was_chosen": False} if is_last else best_row(rows)
    return None, None


def _base_model(run: dict[str, Any] | None) -> str | None:
    """Hub id of the weights that training started from."""
    if not run or not run.get("pretrained"):
        return None
    name = str(run.get("start_from") or run.get("model", ""))
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    return cfg.hf_hub_id if cfg is not None else None


def _data(run: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Name of the data set, never a path of the machine it was trained on; and its Hub id when it has one."""
    if not run or not run.get("data"):
        return None, None
    data = str(run["data"])
    if re.fullmatch(_HUB_ID, data) and not Path(data).exists():
        return data, data
    return Path(data).stem or "images", None


def license_of(config: dict[str, Any], run: dict[str, Any] | None = None) -> str:
    """That of the weights one started from; a network trained from nothing is under the project's own."""
    if run is not None and not run.get("pretrained"):
        return "apache-2.0"
    return str(config.get("pretrained_cfg", {}).get("license") or "apache-2.0")


def _metadata(
    config: dict[str, Any], run: dict[str, Any] | None, best: dict[str, Any] | None, base: str | None, repo_id: str
) -> ModelCardData:
    name, hub_id = _data(run)
    license_name = license_of(config, run)
    results = None
    if best is not None:
        value = round(100 * score(best), 2)
        several = "val_map" in best
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=hub_id or re.sub(r"[^\w.-]+", "-", name or "images"),
                dataset_name=name or "images",
                dataset_split="validation",
                metric_type="mean_average_precision" if several else "accuracy",
                metric_name="mean average precision (%)" if several else "top-1 accuracy (%)",
                metric_value=value,
            )
        ]
    is_known = license_name in LICENSES
    return ModelCardData(
        license=license_name if is_known else "other",
        license_name=None if is_known else license_name,
        library_name="timm",
        pipeline_tag="image-classification" if config.get("num_classes") else "image-feature-extraction",
        tags=["timm", "transformers", "cbam2", "attention", "image-classification"],
        datasets=[hub_id] if hub_id else None,
        base_model=base,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results,
        ignore_metadata_errors=False,
    )


def _about(architecture: str, config: dict[str, Any], run: dict[str, Any] | None, base: str | None) -> str:
    size = config.get("pretrained_cfg", {}).get("input_size") or [3, 224, 224]
    text = f"`{architecture}`"
    if architecture in architectures():
        stages = config.get("model_args", {}).get("cbam2_stages")
        where = "in every residual branch" if stages is None else f"in stages {', '.join(str(s + 1) for s in stages)}"
        text += f": a network with CBAM2 attention (channel attention, then spatial attention) {where}"
    name, _ = _data(run)
    classes = config.get("num_classes")
    text += f". It tells {classes:,} classes apart" if classes else ". It has no classifier and gives features"
    text += f", and was trained on {name}" if name else ""
    text += f", starting from [{base}](https://huggingface.co/{base})" if base else ""
    return f"{text}. Input: {size[0]} channels, {size[1]} x {size[2]} pixels."


def _usage(architecture: str, config: dict[str, Any], repo_id: str) -> str:
    has_head = bool(config.get("num_classes"))
    what = f"logits (1, {config['num_classes']})" if has_head else "features (1, C)"
    timm_code = f"""```python
import timm
import timm_cbam2  # registers the architecture
import torch
from PIL import Image

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg, model=model))
image = Image.new("RGB", (64, 64))  # your picture: Image.open(...).convert("RGB")
with torch.no_grad():
    output = model(transform(image)[None])  # {what}
```"""
    if architecture not in architectures():
        return f"## Use\n\n{timm_code}"
    auto, result = ("AutoModelForImageClassification", "logits") if has_head else ("AutoModel", "pooler_output")
    transformers_code = f'''```python
import timm_cbam2  # or, without the package, trust_remote_code=True below if this repository carries the code
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("{repo_id}")
model = {auto}.from_pretrained("{repo_id}")
image = Image.new("RGB", (64, 64))  # your picture: Image.open(...).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image), output_attentions=True)
output = outputs.{result}  # the same numbers as through timm
masks = [block.spatial_mask for block in outputs.attentions]  # where each block looked
```'''
    return f"## Use\n\nWith timm:\n\n{timm_code}\n\nWith transformers:\n\n{transformers_code}"


def _training(config: dict[str, Any], run: dict[str, Any] | None, best: dict[str, Any] | None) -> str:
    options = config.get("model_args", {}).get("cbam2", {})
    listed = ", ".join(f"{key}={value!r}" for key, value in options.items())
    block = f"\n\nAttention: `{listed}`." if listed else ""
    if run is None:
        return f"## Training\n\nNot recorded beside these weights.{block}"
    rows = [f"| {key} | {run[key]} |" for key in _SHOWN if run.get(key) is not None]
    rows += [f"| {key} | {run[key]} |" for key, usual in _SHOWN_IF_UNUSUAL.items() if run.get(key, usual) != usual]
    rows += [f"| {split} images | {count} |" for split, count in (run.get("images") or {}).items()]
    rows += [f"| {name} | {version} |" for name, version in (run.get("versions") or {}).items()]
    start = "trained weights" if run.get("pretrained") else "random weights"
    table = "\n".join(["| setting | value |", "| --- | --- |", f"| start | {start} |", *rows])
    numbers = "Nothing was measured."
    if best is not None:
        top5 = f", top-5 {100 * best['val_top5']:.2f} %" if best.get("val_top5") is not None else ""
        what = "Mean average precision" if "val_map" in best else "Top-1 accuracy"
        numbers = (
            f"{what} {100 * score(best):.2f} %{top5} on {best.get('val_images', 'the')} validation "
            f"images, after epoch {best['epoch']}."
        )
    return f"## Training\n\n{table}{block}\n\n## Numbers\n\n{numbers}"


def _limits(
    architecture: str,
    config: dict[str, Any],
    run: dict[str, Any] | None,
    best: dict[str, Any] | None,
    base: str | None,
) -> str:
    lines = ["It knows only the classes it was trained on, and gives one of them for any picture at all."]
    if best is not None:
        chose = ", on the images that also chose the epoch" if best.get("was_chosen", True) else ""
        lines.append(f"The figure comes from one run{chose}: expect slightly less on new images.")
    license_name = license_of(config, run)
    if base or license_name not in ("apache-2.0", "bsd-3-clause", "mit"):
        source = f" of {base}" if base else ""
        lines.append(f"The licence `{license_name}`{source} holds for these weights too.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
