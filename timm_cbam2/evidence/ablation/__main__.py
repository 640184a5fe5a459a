"""`python -m timm_cbam2.ablation VERB …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer

from ...errors import UserError, require, run_commands
from .cost import cost
from .grid import GRID, read_grid
from .position import position
from .results import RESULTS, Results
from .routing import routing
from .runner import Runner
from .table import markdown, picture

RUNS = Path("runs") / "ablation"
OWN = RUNS / "results.jsonl"
GridOption = Annotated[Path, typer.Option(help="YAML of recipes, variants and questions.")]
QuestionOption = Annotated[Optional[list[str]], typer.Option("--question", help="Only this one; may be repeated.")]


def run(
    data: Annotated[
        Optional[str], typer.Option(help="Images, as for finetune, of the questions that do not make their own.")
    ] = None,
    grid: GridOption = GRID,
    question: QuestionOption = None,
    variant: Annotated[Optional[list[str]], typer.Option("--variant", help="Only this one; may be repeated.")] = None,
    seed: Annotated[Optional[list[int]], typer.Option("--seed", help="Only this one; may be repeated.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = RUNS,
    results: Annotated[Optional[Path], typer.Option(help="File of results; RUNS/results.jsonl by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be trained.")] = False,
) -> int:
    """Train what the grid asks for and has no result yet; stopped anywhere, the same command goes on.

    Raises:
        UserError: a mistake in the grid or in what was asked, or a training that failed.
        KeyboardInterrupt: told to stop, after saving.
    """
    plan = read_grid(grid)
    jobs = list(plan.jobs(data, question or (), variant or (), seed or ()))
    done = Results(results or runs / "results.jsonl")
    if dry_run:
        for job in jobs:
            print(f"{'finished' if done.find(job) else 'to train'}  {job.name:<32} {job.options['epochs']} epochs")
        return 0
    return Runner(plan, runs, done, data).run(jobs)


def table(
    grid: GridOption = GRID,
    results: Annotated[
        Optional[Path],
        typer.Option(help=f"File of results; {OWN} if there is one, or else those that come with the package."),
    ] = None,
    question: QuestionOption = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Also draw them, as PNG.")] = None,
) -> None:
    """Print a table for each question: means with 95 % intervals, and paired differences from the control by seed.

    Raises:
        UserError: no such file or question, or no results.
    """
    plan = read_grid(grid)
    if results is None:
        results = OWN if OWN.exists() else RESULTS
    if not results.exists():
        raise UserError(f"--results {results}: there is no such file; `run` makes one")
    require("scipy")
    found = Results(results)
    rows = found.rows
    asked = [plan.question(name) for name in question or ()] or list(plan.questions)
    begun = [q for q in asked if any(r["variant"] in q.variants and r["seed"] in q.seeds for r in rows)]
    if not begun:
        raise UserError(f"{results} has no result for {', '.join(q.name for q in asked)} yet")
    for job in plan.jobs(questions=[q.name for q in begun]):
        found.find(job)  # which refuses a row of other options
    print(f"from {results}\n")
    print("\n\n".join(f"{q.name}: {q.asks}\n\n{markdown(plan, q, rows)}" for q in begun))
    if output is not None:
        require("matplotlib")
        try:
            picture(plan, begun, rows, output)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
        print(f"\npicture {output}")


def main() -> NoReturn:
    """Entry point of `python -m timm_cbam2.ablation`."""
    run_commands(run, table, routing, cost, position, help="Which part earns its place? Train, compare, look inside.")


if __name__ == "__main__":
    main()
