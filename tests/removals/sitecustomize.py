"""Python runs this as it starts, where the environment that a test gives it names this folder; see removals.py."""

import os

import removals

if removals.FILE in os.environ:
    removals.watch(os.environ[removals.FILE])
