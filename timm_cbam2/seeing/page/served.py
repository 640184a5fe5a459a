"""The models that the page may load: those it was started with, the zoo's, and the Hub's; no code of theirs runs."""

from __future__ import annotations

import re
import tempfile
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Sequence

from huggingface_hub import HfApi
from PIL import Image
from timm.models import get_arch_name

from ...data.formats import open_image
from ...data.reading import UNREADABLE
from ...errors import UserError
from ...hub.push import explained, pull
from ...hub.zoo import load, names, row, suggest
from ..explain import Explainer
from ..views import Explanation

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Models", "check_image"]

MAX_BYTES = 20_000_000  # of an uploaded file
MAX_PIXELS = 40_000_000  # of an image: a small file can unpack to far more than there is memory
MAX_PARAMETERS = 200_000_000  # of a model that a visitor asks for
KEPT = 4  # models in memory
_HUB_NAME = r"hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?"


class Models:
    """Explains images with models by name; the last few stay loaded.

    Args:
        given: names that whoever started the page chose, of any kind that `zoo.load` takes. Visitors may add registered
            names and hf-hub: ids, never a path.
    """

    def __init__(self, given: Sequence[str]):
        self.given = list(dict.fromkeys(given))
        self._loaded: OrderedDict[str, Explainer] = OrderedDict()
        self._lock = threading.Lock()

    def explain(self, name: str, image: str) -> Explanation:
        """What the model called `name` says about the image file at `image`.

        Raises:
            UserError: no such model or none that a visitor may load, or not an image that can be read.
        """
        with self._lock:  # one at a time: a model that two visitors ask for is loaded once
            explainer = self._loaded.pop(name, None) or self._load(name)
            self._loaded[name] = explainer
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
        return explainer(image)

    def _load(self, name: str) -> Explainer:
        if name in self.given:
            return Explainer(name)
        if re.fullmatch(_HUB_NAME, name):
            return _from_hub(name)
        architecture = get_arch_name(name) if re.fullmatch(r"[\w.]+", name) else ""
        if architecture not in names():
            near = suggest(name) if re.fullmatch(r"[\w.:-]+", name) else []
            hint = f"did you mean {', '.join(near)}?" if near else "the zoo tab lists them"
            raise UserError(f"no model is called {name[:80]!r}: {hint}; one on the Hub is written hf-hub:user/name")
        parameters = row(architecture).parameters
        if parameters > MAX_PARAMETERS:
            raise UserError(
                f"{name} has {parameters / 1e6:.0f} M parameters, this page loads {MAX_PARAMETERS / 1e6:.0f} M"
            )
        return Explainer(name)


def _from_hub(name: str) -> Explainer:
    """A repository's model, fetched as data only: `pull` takes no pickles and runs nothing, and its size is bounded."""
    repo_id, _, revision = name.removeprefix("hf-hub:").partition("@")
    with explained(repo_id, "nothing was loaded"):
        info = HfApi(library_name="timm_cbam2").model_info(repo_id, revision=revision or None, files_metadata=True)
    size = next((s.size or 0 for s in info.siblings or [] if s.rfilename == "model.safetensors"), 0)
    if size > 4 * MAX_PARAMETERS:
        raise UserError(f"{repo_id} has {size:,} bytes of weights, more than this page loads")
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "model"
        pull(repo_id, folder, revision or None)
        return Explainer(name, model=_with_attention(load(str(folder)), name))


def _with_attention(model, name: str):
    from ...models.cbam2 import is_cbam2

    if not any(is_cbam2(module) for module in model.modules()):
        raise UserError(f"{name} has no CBAM2 block to look at")
    return model


def check_image(path: str) -> None:
    """Look at a file's header only.

    Raises:
        UserError: it is no image, or unpacks to too many pixels.
    """
    if Path(path).stat().st_size > MAX_BYTES:
        raise UserError(f"this file has more than {MAX_BYTES / 1e6:.0f} MB: give a smaller picture")
    allowed = f"{MAX_PIXELS / 1e6:.0f} million are allowed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with open_image(path) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"these are too many pixels, {allowed}") from error
    except UNREADABLE as error:
        raise UserError("this is not a picture that can be read: give a JPEG, PNG, WebP, GIF, BMP or TIFF") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels are too many, {allowed}")
