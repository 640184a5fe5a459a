"""What is trained: recipes, variants and questions, read from a YAML file and checked before anything runs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence

from ...errors import UserError, one_line

__all__ = ["GRID", "Grid", "Job", "Question", "read_grid"]

GRID = Path(__file__).with_name("grid.yaml")
START = ("run", "model", "cbam2")  # keys of a variant's `start`
OURS = ("recipe", "start", "about")  # keys of a variant that are no option of finetune
RUNNER = ("seed", "output", "resume", "recipe", "pretrained")  # options of finetune that the runner sets


@dataclass(frozen=True)
class Question:
    """Variants that are compared with a control, seed by seed."""

    name: str
    asks: str
    control: str
    variants: tuple[str, ...]  # the control among them
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One training: a variant with a seed."""

    variant: str
    seed: int
    options: dict[str, Any]  # of `finetune`
    start: dict[str, Any] | None = None  # a finished job to start from: run, and the model and cbam2 to put it into

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """What tells whether a result is this job's: everything but the place of the data."""
        data = self.options.get("data")
        return {**self.options, **({"start": self.start} if self.start else {}), "data": data and Path(str(data)).stem}


@dataclass(frozen=True)
class Grid:
    """All questions of a file, and the options of every variant."""

    questions: tuple[Question, ...]
    options: dict[str, dict[str, Any]]
    starts: dict[str, dict[str, Any] | None]
    about: dict[str, str]

    def question(self, name: str) -> Question:
        """
        Raises:
            UserError: there is none of that name.
        """
        for question in self.questions:
            if question.name == name:
                return question
        raise UserError(f"no question is called {name}; there are {', '.join(q.name for q in self.questions)}")

    def job(self, variant: str, seed: int, data: str | None = None) -> Job:
        """The training of a variant with a seed, on `data` where its recipe names none."""
        options = dict(self.options[variant])
        if data is not None:
            options.setdefault("data", data)
        return Job(variant, seed, options, self.starts[variant])

    def jobs(
        self,
        data: str | None = None,
        questions: Sequence[str] = (),
        variants: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> Iterator[Job]:
        """Every training asked for, once each: question by question, seed by seed, so that early stops leave pairs.

        Raises:
            UserError: an unknown question, variant or seed.
        """
        asked = [self.question(name) for name in questions] or self.questions
        for name in variants:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, 1, 0.4)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.options)}"
                raise UserError(f"no variant is called {name}; {hint}")
        given = set()
        for question in asked:
            for seed in question.seeds:
                for variant in question.variants:
                    wanted = (not variants or variant in variants) and (not seeds or seed in seeds)
                    if wanted and (variant, seed) not in given:
                        given.add((variant, seed))
                        yield self.job(variant, seed, data)
        if not given:
            raise UserError("nothing of the grid fits all that was asked for (question, variant, seed)")


def read_grid(path: str | Path = GRID) -> Grid:
    """Read and check a grid.

    The file has three tables. `recipes` holds options of `finetune`, the first recipe being the default; `variants`
    holds what each variant changes in its `recipe`, with `start` for one that begins with another's trained weights;
    `questions` holds which variants are compared with which `control`, over which `seeds`.

    Raises:
        UserError: it cannot be read, or a key, option or name in it is unknown.
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--grid {path} cannot be read: {one_line(error, 200)}") from error
    for table in ("recipes", "variants", "questions"):
        if not isinstance(content, dict) or not isinstance(content.get(table), dict) or not content[table]:
            raise UserError(f"--grid {path} has no table '{table}': it needs recipes, variants and questions")
        for name, entry in content[table].items():
            _is_table(path, f"{table}: {name}", entry)
    recipes, variants = content["recipes"], content["variants"]
    options, starts, about = {}, {}, {}
    for name, changes in variants.items():
        changes = dict(changes)
        recipe = changes.get("recipe", next(iter(recipes)))
        _known(path, f"variant {name}: recipe", [recipe], recipes)
        options[name] = {**recipes[recipe], **{k: v for k, v in changes.items() if k not in OURS}}
        starts[name], about[name] = changes.get("start"), changes.get("about", "")
        _known(path, f"variant {name}", options[name], _finetune_options())
        if "model" not in options[name] and starts[name] is None:
            raise UserError(f"--grid {path}: variant {name} names no model")
        epochs = options[name].get("epochs")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise UserError(f"--grid {path}: variant {name} has epochs {epochs!r}; give a whole number of at least 1")
    for name, start in starts.items():
        if start is not None:
            _is_table(path, f"variants: {name}: start", start)
            _known(path, f"variant {name}: start", start, START)
            _known(path, f"variant {name}: start: run", [start.get("run")], variants)
            if starts[start["run"]] is not None:
                raise UserError(
                    f"--grid {path}: variant {name} starts from {start['run']}, which itself starts from one"
                )
    questions = tuple(_question(path, name, given, options) for name, given in content["questions"].items())
    return Grid(questions, options, starts, about)


def _is_table(path: Path, where: str, given: Any) -> None:
    if not isinstance(given, dict):
        raise UserError(f"--grid {path}: {where} is {given!r}; write 'option: value' lines below it")


def _question(path: Path, name: str, given: dict[str, Any], variants: dict[str, Any]) -> Question:
    keys = ("asks", "control", "variants", "seeds")
    _known(path, f"question {name}", given, keys)
    missing = [key for key in keys[1:] if key not in given]
    if missing:
        raise UserError(f"--grid {path}: question {name} lacks {', '.join(missing)}")
    names = list(dict.fromkeys([given["control"], *given["variants"]]))
    _known(path, f"question {name}: variant", names, variants)
    seeds = given["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"--grid {path}: question {name}: seeds are {seeds!r}; give a list such as [0, 1, 2]")
    return Question(name, given.get("asks", ""), given["control"], tuple(names), tuple(seeds))


def _finetune_options() -> list[str]:
    from ...training.options import option_names

    return [name for name in option_names() if name not in RUNNER]


def _known(path: Path, where: str, given: Any, allowed: Any) -> None:
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), [str(a) for a in allowed], 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(map(str, allowed))}"
            raise UserError(f"--grid {path}: {where}: {key} is unknown; {hint}")
