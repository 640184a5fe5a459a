"""A Hugging Face cache filled by hand, as a download would have filled it."""

import os
from pathlib import Path


def add_to_cache(folder: Path, home: Path, repository: str) -> Path:
    """Make `repository` resolve to `folder` for a process that runs with HF_HOME=`home` and offline.

    Returns:
        The repository's folder in the cache.
    """
    root = Path(home) / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    (root / "snapshots").mkdir()
    os.symlink(folder, root / "snapshots" / ("a" * 40))
    return root
