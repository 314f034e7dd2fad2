"""Loaded by every Python whose PYTHONPATH has this folder: logs the files that a stage opens."""

import os
import sys


def _watch(folder: str, stage: str) -> None:
    root = os.getcwd() + os.sep  # noqa: PTH109 (pathlib is not loaded yet, and need not be)
    log = os.open(f"{folder}/{stage}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def hook(event, arguments):
        if event != "open" or not isinstance(arguments[0], (str, bytes)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100
        if path.startswith(root):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) if arguments[2] else False
            os.write(log, f"{'w' if writes else 'r'} {path.removeprefix(root)}\n".encode())

    sys.addaudithook(hook)


if "AUDIT_LOG" in os.environ and "DVC_STAGE" in os.environ:
    _watch(os.environ["AUDIT_LOG"], os.environ["DVC_STAGE"])
