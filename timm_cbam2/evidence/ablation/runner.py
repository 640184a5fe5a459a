"""Trains what a grid asks for, one `timm_cbam2.finetune` process at a time, and goes on wherever it was stopped."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator

from ...errors import STOPPED, UserError
from .grid import Grid, Job
from .results import Results
from .start import accuracy, prepare

__all__ = ["Runner", "finetune_command"]


def finetune_command(job: Job, folder: Path, model: str | None = None) -> list[str]:
    """The command line of a job, which resumes it where it was stopped."""
    # One recipe for all, attention too.
    as_all = {"attention_lr_scale": 1.0, "attention_weight_decay": job.options.get("weight_decay")}
    options = {**as_all, **job.options, **({"model": model} if model else {})}
    words = [sys.executable, "-m", "timm_cbam2.finetune"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None or value is False:  # every switch of finetune is off by default
            continue
        if value is True:
            words.append(f"--{flag}")
        elif isinstance(value, dict):
            for key, part in value.items():
                words += [f"--{flag}", f"{key}={part!r}"]
        else:
            words += [f"--{flag}", str(value)]
    pretrained = "--pretrained" if model else "--no-pretrained"
    return [*words, "--seed", str(job.seed), pretrained, "--output", str(folder), "--resume", "auto"]


class Runner:
    """Works through jobs; each has a folder in `runs`, and a line in `results` when it is finished.

    Args:
        grid: where the jobs come from.
        runs: folder of the run folders; results can be made again from it.
        results: to which finished jobs are added.
        data: of the jobs whose recipe names none.
    """

    def __init__(self, grid: Grid, runs: Path, results: Results, data: str | None = None):
        self.grid, self.runs, self.results, self.data = grid, runs, results, data
        self.child: subprocess.Popen | None = None
        self.stopped = False

    def run(self, jobs: list[Job]) -> int:
        """Finish every job that has no result yet; returns how many were finished.

        Raises:
            UserError: a training failed.
            KeyboardInterrupt: told to stop; the training in hand has saved where it was.
        """
        waiting = [job for job in jobs if self.results.find(job) is None]
        print(f"{len(jobs)} trainings asked for, {len(jobs) - len(waiting)} finished before, {len(waiting)} to go")
        with _alone(self.runs) as lock, self._gentle():
            self.results = Results(self.results.path)  # whoever held the folder may have added to it
            for number, job in enumerate(waiting, 1):
                if self.results.find(job) is not None:
                    continue
                print(f"\n[{number}/{len(waiting)}] {job.name}", flush=True)
                self._finish(job, lock)
                row = self.results.rows[-1]
                print(
                    f"{job.name}: {100 * row['accuracy']:.2f} % after {row['epochs']} epochs, "
                    f"line {len(self.results.rows)} of {self.results.path}",
                    flush=True,
                )
        return len(waiting)

    def folder(self, job: Job) -> Path:
        """Where the run of a job is."""
        return self.runs / job.name

    def _finish(self, job: Job, lock: IO[str] | None) -> None:
        folder = self.folder(job)
        job = self._with_data(job)
        notes = self._notes(job)
        model, begin = None, None
        if job.start is not None:
            source = self.grid.job(job.start["run"], job.seed, self.data)
            self._notes(source)
            if not _is_complete(self.folder(source), source.options["epochs"]):
                print(f"{job.name} starts from {source.name}, whose run is not in {self.runs}: that comes first")
                self._train(source, self.folder(source), None, lock, self._notes(source))
            begin = prepare(self.folder(source) / "last", self.runs / f"{job.name}.start", job)
            model = str(self.runs / f"{job.name}.start")
        if not _is_complete(folder, job.options["epochs"]):
            self._train(job, folder, model, lock, notes)
        row = harvest(job, folder) | notes.summary()
        if begin is not None:
            row["start_accuracy"] = begin
        self.results.append(row)

    def _notes(self, job: Job) -> _Notes:
        """
        Raises:
            UserError: the folder of that name was trained with other options, which must not count as this job's.
        """
        notes = _Notes(self.runs / f"{job.name}.json", job.settings())
        if self.folder(job).exists() and notes.differs:
            raise UserError(
                f"{self.folder(job)} was trained with other options than the grid's: give other --runs, or remove it"
            )
        return notes

    def _with_data(self, job: Job) -> Job:
        data = job.options.get("data")
        if data == "position":
            from .position import write

            path = self.runs / "position.parquet"
            if not path.exists():
                write(path)
            return Job(job.variant, job.seed, {**job.options, "data": str(path)}, job.start)
        if data is None:
            raise UserError(f"{job.variant} needs images: give them with --data, such as a parquet file")
        return job

    def _train(self, job: Job, folder: Path, model: str | None, lock: IO[str] | None, notes: _Notes) -> None:
        # The lock goes along: should this process be killed, it stays held until the training, too, has ended.
        # Threads that spin while they wait for each other waste what other work could use.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": _python_path()}
        command = finetune_command(job, folder, model)
        with notes.attempt():
            self.child = subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()] if lock else [])
            try:
                code = self.child.wait()
            finally:
                self.child = None
        if self.stopped or code == STOPPED:
            raise KeyboardInterrupt(f"stopped in {job.name}: the same command goes on from there")
        if code != 0:
            raise UserError(f"{job.name} ended with exit code {code} (its reason is above); results so far are kept")

    @contextmanager
    def _gentle(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the training save and end, and then end the runner."""

        def handle(number: int, frame: Any) -> None:
            self.stopped = True
            if self.child is None:
                raise KeyboardInterrupt("stopped between two trainings: the same command goes on from there")
            if number == signal.SIGTERM:  # Ctrl-C reaches every process of a terminal by itself
                self.child.send_signal(number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Notes:
    """What is kept beside a run folder: its options, the states of the code that trained it, each attempt's cost."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        settings = json.loads(json.dumps(settings))
        fresh = {"settings": settings, "commits": [], "cpu": []}
        self.content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else fresh
        self.differs = self.content.get("settings") != settings

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One process that trains; its cost stays unknown if this process is killed meanwhile."""
        commit = code_version()
        if commit not in self.content["commits"]:
            self.content["commits"].append(commit)
        self.content["cpu"].append(None)
        self._write()
        before = _children_seconds()
        try:
            yield
        finally:
            self.content["cpu"][-1] = _children_seconds() - before
            self._write()

    def summary(self) -> dict[str, Any]:
        """For the result line; CPU seconds are those of the whole processes, None unless all are known."""
        cpu = self.content["cpu"]
        known = bool(cpu) and None not in cpu
        return {"commits": self.content["commits"], "cpu_seconds": round(sum(cpu), 1) if known else None}

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def _children_seconds() -> float:
    """CPU seconds of every process that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def harvest(job: Job, folder: Path) -> dict[str, Any]:
    """The result line of a finished run, from what finetune left in its folder.

    `accuracy` is that of the last model as anybody gets it who loads it, in full precision; the figures by epoch are
    finetune's own, in the precision of the training.
    """
    rows = _metrics(folder)
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    row = {
        "variant": job.variant,
        "seed": job.seed,
        "epochs": len(rows),
        "accuracy": accuracy(folder / "last", job.options),
        "val_accuracy": [r["val_accuracy"] for r in rows],
        "val_loss": [round(r["val_loss"], 5) for r in rows],
        "train_loss": [round(r["train_loss"], 5) for r in rows],
        "seconds": round(sum(r["seconds"] for r in rows), 1),
        "parameters": settings["parameters"],
        "images": settings["images"],
        "options": job.settings(),
        "versions": {**settings["versions"], "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}",
    }
    if rows[-1].get("health"):
        row["health"] = rows[-1]["health"]
    return row


def code_version() -> str:
    """The commit of the code, with "+" when Python files differ from it; the package's version outside a checkout."""
    import timm_cbam2

    here = Path(timm_cbam2.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD") if git("ls-files", "__init__.py") else ""
        changed = git("status", "--porcelain", "--", "*.py") if commit else ""
    except OSError:  # no git here
        commit = changed = ""
    return commit + ("+" if changed else "") if commit else f"timm_cbam2 {timm_cbam2.__version__}"


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _is_complete(folder: Path, epochs: int) -> bool:
    path = folder / "metrics.jsonl"
    if not path.exists() or not path.read_bytes().endswith(b"\n"):
        return False
    return len(_metrics(folder)) == epochs and (folder / "last" / "model.safetensors").is_file()


def _python_path() -> str:
    """Children use the package that this process uses, wherever they start."""
    import timm_cbam2

    place = str(Path(timm_cbam2.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))


@contextmanager
def _alone(runs: Path) -> Iterator[IO[str] | None]:
    """Hold `runs`, waiting for whoever holds it: another runner, or the training that a killed one left behind."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs {runs} cannot be written ({error.strerror}): give another folder") from error
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield None
        return
    with (runs / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the training that goes on in {runs}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
