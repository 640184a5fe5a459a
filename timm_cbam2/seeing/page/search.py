"""The page's search of the zoo: rows appear as the models are built to be counted, those asked for first."""

from __future__ import annotations

from typing import Any, Iterator

from ...hub.zoo import meaning, names, pretrained_tags, row

__all__ = ["ZooSearch"]

SHOWN_EVERY = 10  # newly counted models


class ZooSearch:
    """Answers searches for words in names, tags and numbers of parameters; what was counted stays known."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {}

    def __call__(self, search: str) -> Iterator[list[list[Any]]]:
        """The rows that hold every word of `search`, more and more of them, until all models were looked at."""
        words = search.lower().split()
        known = names()
        tags = {name: tuple(pretrained_tags(name)) for name in known}
        asked = [name for name in known if _fits(words, name, meaning(tags[name]), *tags[name])]
        if any(word.replace(".", "", 1).isdigit() for word in words):  # may be a number of parameters, not known yet
            asked += known
        yield self._found(known, words)
        for name in asked:
            if name not in self.rows:
                model = row(name)
                self.rows[name] = [name, round(model.parameters / 1e6, 2), model.pretrained, ", ".join(model.tags)]
                if len(self.rows) % SHOWN_EVERY == 0:
                    yield self._found(known, words)
        yield self._found(known, words)

    def _found(self, known: list[str], words: list[str]) -> list[list[Any]]:
        return [self.rows[name] for name in known if name in self.rows and _fits(words, *self.rows[name])]


def _fits(words: list[str], *cells: Any) -> bool:
    return all(word in " ".join(map(str, cells)).lower() for word in words)
