"""Files that appear whole or not at all, and spans of time for a person: what every room needs and none owns."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["duration", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        with suppress(OSError):  # it has moved, or could not be made
            temporary.unlink()


def duration(seconds: float) -> str:
    """`seconds` for a person: 8 s, 2 min 05 s, 3 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
