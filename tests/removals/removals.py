"""A warning that something which we call will be removed fails the test that met it, and whatever test started it.

In pytest's own process such warnings are errors, by pytest's filters. In processes that tests start, `sitecustomize`
beside this file has them written down, and what stands there fails the test: raised, an `except` might swallow them.
What one library calls of another, and what comes up while one is imported, is not ours, and is left out there.

`pytest -W …` switches all this off: on old versions, it is often settled long since.
"""

import logging
import os
import re
import sys
import warnings
from pathlib import Path

CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
FILE = "TIMM_CBAM2_REMOVALS"  # environment variable: where processes write
PACKAGE = str(Path(__file__).resolve().parents[2] / "timm_cbam2") + os.sep
INSTALLED = re.compile(r"site-packages.(\w+)")
LOGGED = re.compile(r"deprecated|will be removed|no longer supported in", re.IGNORECASE)

# How the message begins (a regular expression), and why we meet it all the same.
EXCEPTIONS = (
    (
        r"`torch\.jit\.\w+` is deprecated",
        "people still run TorchScript, and `export --torchscript` writes it if asked to",
    ),
    (r"This process .* is multi-threaded, use of fork", "since Python 3.12, of every DataLoader with workers"),
    (r"AnnAssign.__init__ missing 1 required", "since Python 3.13, of Triton's own compiler for what it compiles"),
)


def pytest_filters():
    """Lines for pytest's `filterwarnings`; later ones win."""
    lines = [f"error::{category.__name__}" for category in CATEGORIES]
    return [*lines, *(f"ignore:{start}" for start, _ in EXCEPTIONS)]


def watch(into):
    """From now on, write such warnings of this process, and of those forked from it, to the file `into`."""
    for category in reversed(CATEGORIES):
        warnings.simplefilter("default", category)
    show, make = warnings.showwarning, logging.getLogRecordFactory()

    def shown(message, category, filename, lineno, file=None, line=None):
        removal = issubclass(category, CATEGORIES)
        if removal and _is_ours(filename) and not _is_excepted(str(message)):
            _write(into, f"{filename}:{lineno}: {category.__name__}: {message}")
        if not removal or category is FutureWarning:  # a user is shown no others
            show(message, category, filename, lineno, file, line)

    def record(*args, **kwargs):
        made = make(*args, **kwargs)
        if made.levelno >= logging.WARNING:
            text = made.getMessage()
            if LOGGED.search(text) and _is_ours(made.pathname) and not _is_excepted(text):
                _write(into, f"{made.pathname}:{made.lineno}: {made.name}: {text}")
        return made

    warnings.showwarning = shown
    logging.setLogRecordFactory(record)


def _is_excepted(text):
    return any(re.match(start, text) for start, _ in EXCEPTIONS)


def _is_ours(filename):
    """Whether it is about our code, or comes from a library that our code, or a test's, called itself.

    What one library calls of another is theirs to change, and what comes up while one is imported is theirs, too.
    """
    if filename.startswith(PACKAGE):
        return True
    frame, library = sys._getframe(2), None
    while frame is not None:
        place = frame.f_code.co_filename
        if place.startswith("<frozen importlib"):
            return False
        found = INSTALLED.search(place)
        if found is None:
            if place.startswith(PACKAGE) or frame.f_globals.get("__name__") == "__main__":
                return True
        elif library not in (None, found[1]):
            return False
        else:
            library = found[1]
        frame = frame.f_back
    return False


def _write(into, line):
    with open(into, "a", encoding="utf-8") as file:
        file.write(" ".join(line.split()) + "\n")
