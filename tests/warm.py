"""Processes that skip the seconds which importing torch takes: one imports, and forks a fresh one for each command.

What is forked is a process like any other: files, signals, exit codes, environment and folder are its own.
"""

import json
import os
import signal
import subprocess
import sysconfig
import tempfile
import venv
from collections import namedtuple
from pathlib import Path

Result = namedtuple("Result", "code out err")

# All that the commands import, now or when they need it.
MODULES = (
    *("accelerate", "datasets", "matplotlib.backends.backend_agg", "sklearn.datasets", "timm_cbam2.cli"),
    *("timm_cbam2.training.loop", "timm_cbam2.training.prepare", "timm_cbam2.seeing.report"),
)
COMMAND = "import sys; sys.argv[0] = 'timm-cbam2'; from timm_cbam2.cli import main; main()"  # as the console script

SERVER = """
import atexit, gc, importlib, json, os, resource, runpy, signal, sys, threading
gc.disable()
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
gc.enable()
print("ready", flush=True)
running = set()
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        running.discard(job["wait"])
        continue
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        os.chdir(job["cwd"])
        if not job["add"]:
            os.environ.clear()
        os.environ.update(job["env"])
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [place for place in path if place and place not in sys.path]
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
        for fd, file in enumerate(job["files"]):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if fd else os.open(file, os.O_RDONLY), fd)
        flag, what, *args = job["args"]
        sys.argv = [flag, *args]
        try:
            if flag == "-m":
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            else:
                exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
            sys.exit()
        except SystemExit as end:
            if not job["brief"] or not isinstance(end.code, (int, type(None))):
                raise
            code = end.code or 0
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    running.add(child)
    print(child, flush=True)
for child in running:  # of a test that failed: none is left behind
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class Started:
    """A command that runs in a process of its own, which leads a group of its own."""

    def __init__(self, server, pid, files):
        self.server, self.pid, self.files = server, pid, files

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def kill_group(self, number=signal.SIGKILL):
        os.killpg(self.pid, number)

    @property
    def alive(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def out(self):
        return Path(self.files[1]).read_text()

    def wait(self):
        """Exit code, stdout and stderr when it has ended."""
        return Result(int(self.server.ask({"wait": self.pid})), *(Path(file).read_text() for file in self.files[1:]))


class Server:
    """The process that has imported `modules`, in a fixed environment.

    Args:
        python: the interpreter.
        modules: what to import before the first fork.
        environment: of the process, and of each command that is not given one.
    """

    def __init__(self, python, modules, environment):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        command = [str(python), "-c", SERVER, *modules]
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.folder, self.count = tempfile.TemporaryDirectory(), 0
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, *args, cwd=None, env=None, add=True, largest_file=None, brief=False):
        """Start `python ARGS`, as in `-m MODULE ARG...` or `-c CODE ARG...`.

        Args:
            args: of the interpreter.
            cwd: folder to start in; an empty one by default.
            env: environment variables.
            add: whether `env` is added to the environment of this server, instead of standing alone.
            largest_file: limit on the size of files, in bytes.
            brief: all that Python does at exit, but for taking itself apart, which takes longer than many a command.
        """
        self.count += 1
        files = [os.devnull, *(f"{self.folder.name}/{name}{self.count}" for name in ("stdout", "stderr"))]
        for file in files[1:]:
            Path(file).touch()  # to be read from now on
        job = dict(args=[str(a) for a in args], cwd=str(cwd or self.folder.name), env=env or {}, add=add, files=files)
        return Started(self, int(self.ask({**job, "largest_file": largest_file, "brief": brief})), files)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.folder.cleanup()


def make_bare_python(folder):
    """The interpreter of a fresh environment in `folder` that has all this one has, except timm_cbam2."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "timm_cbam2" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "packages.pth").write_text(f"{packages}\n")
    return python
