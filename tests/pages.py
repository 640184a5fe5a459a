"""Serving a page in a process of its own, and a picture that is small as a file and huge as an image."""

import re
import socket
import struct
import subprocess
import zlib


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(command, cwd, environment):
    """Start a page; its process and address."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=cwd, env=environment, **pipes)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if found := re.search(r"http://[\d.]+:\d+", line):
            return process, found[0]
    raise AssertionError("".join(printed))


def stop(process):
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()


def bomb(side=30_000):
    """A PNG of a few bytes that unpacks to `side` x `side` pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
