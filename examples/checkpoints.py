"""Checkpoints that survive crashes, full disks and flipped bits: a thin layer over orbax.

orbax writes in the background into a temporary folder and renames it once it is complete, so a checkpoint either exists
completely or not at all. Only then does it delete the oldest one. orbax does not detect data that change on disk later,
because tensorstore stores no checksum of array data. Therefore the last file written before the rename is a seal, which
lists every file with its SHA-256. Files that do not match their seal are never loaded: `newest` skips such a checkpoint
with a warning and moves it to another folder, where later checkpoints do not overwrite it.
"""

import hashlib
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

SEAL = "seal.json"
ITEMS = ("arrays", "notes")
ASIDE = "unreadable"  # folder for checkpoints that do not match their seal
STEP = re.compile("0|[1-9][0-9]*")  # str.isdigit also accepts superscripts and leading zeros


class CheckpointError(Exception):
    """Error while saving or loading a checkpoint, with a message of one line."""


# --- The seal ---


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def broken(folder: Path) -> str | None:
    """Return why the files of an item do not match the seal, or None if they do. Files added later are ignored."""
    try:
        sealed, found = json.loads((folder / SEAL).read_bytes()), digests(folder)
        changed = [name for name, digest in sealed.items() if found.get(name) != digest]
    except (OSError, ValueError, AttributeError):  # ValueError: not JSON, or not UTF-8
        return f"{folder.name}/{SEAL} cannot be read"
    return f"{folder.name}/{changed[0]} has changed since it was written" if changed else None


class _Sealed:
    """Mixin for a handler of orbax, which calls `finalize` between the last write and the rename."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)  # type: ignore[reportAttributeAccessIssue]  # defined by the handler
        folder = Path(directory)
        (folder / SEAL).write_text(json.dumps(digests(folder)), "utf-8")


class _Arrays(_Sealed, ocp.StandardCheckpointHandler):
    pass


class _Notes(_Sealed, ocp.JsonCheckpointHandler):
    pass


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays, notes = _Arrays(), _Notes()
    registry.add("arrays", ocp.args.StandardSave, arrays)
    registry.add("arrays", ocp.args.StandardRestore, arrays)
    registry.add("notes", ocp.args.JsonSave, notes)
    registry.add("notes", ocp.args.JsonRestore, notes)
    return registry


# --- The checkpoints of a run ---


def _reason(error: Exception) -> str:
    """Return the error message of the operating system; tensorstore includes only its number in its own message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
    if code:
        return os.strerror(int(code[1] or code[2]))
    return (str(error).splitlines() or [type(error).__name__])[0]


@cache
def _silence_orbax() -> None:
    """Silence the log of orbax and one warning of Python; `Checkpoints` raises each error, with a message of one line.

    orbax also logs a traceback for each of its threads. If one of several writes fails, the others end later and find
    the event loop closed, which Python reports although nothing awaits them.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    report = sys.unraisablehook

    def report_others(fault: Any) -> None:
        if str(fault.exc_value) != "Event loop is closed":
            report(fault)

    sys.unraisablehook = report_others


class Checkpoints:
    """The last `keep` checkpoints in a folder. Each consists of a tree of arrays and of notes that are stored as JSON.

    With several processes, all of them must call every method, and share the folder.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        _silence_orbax()
        self.folder = folder.absolute()
        self._saving = 0
        # cleanup_tmp_directories deletes the incomplete checkpoints of a killed process.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=_handlers())
        except OSError as error:
            raise CheckpointError(f"cannot store checkpoints in {folder}: {_reason(error)}") from error

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, the newest first, whether or not they can be loaded."""
        return sorted((int(path.name) for path in self.folder.iterdir() if STEP.fullmatch(path.name)), reverse=True)

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint that matches its seal, or None if there are no checkpoints.

        Raises a CheckpointError if there are checkpoints, and none of them matches.
        """
        multihost_utils.sync_global_devices("checkpoints: before reading")
        faults: dict[int, str] = {}
        newest = None
        for step in self.steps():
            reasons = [reason for item in ITEMS if (reason := broken(self.folder / str(step) / item))]
            if not reasons:
                newest = step
                break
            faults[step] = reasons[0]
        if faults and newest is None:
            step, reason = next(iter(faults.items()))
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; step {step}: {reason}")
        multihost_utils.sync_global_devices("checkpoints: after reading")
        if jax.process_index() == 0:
            for step, reason in faults.items():
                self._set_aside(step, f"{reason}; resuming from step {newest}")
        multihost_utils.sync_global_devices("checkpoints: damaged ones moved")
        self._manager.reload()
        return newest

    def _set_aside(self, step: int, reason: str) -> None:
        aside = self.folder / ASIDE
        aside.mkdir(exist_ok=True)
        target = next(path for i in range(10**6) if not (path := aside / f"{step}.{i}").exists())
        (self.folder / str(step)).rename(target)
        print(f"warning: skipped the checkpoint of step {step}: {reason} ({target})", file=sys.stderr, flush=True)

    def notes(self, step: int) -> Any:
        """Return the notes of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]

    def arrays(self, step: int, like: Any) -> Any:
        """Return the tree of arrays, each with the sharding of the corresponding array of `like`."""
        return self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like)))["arrays"]

    def save(self, step: int, arrays: Any, notes: Any) -> None:
        """Copy the arrays and write them in the background. The next call raises errors of that write."""
        self.finish()
        self._saving = step
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._unsaved(error) from error

    def finish(self) -> None:
        """Wait until the checkpoint in progress is written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # tensorstore raises ValueError for a full disk, the rest of orbax OSError
            raise self._unsaved(error) from error

    def _unsaved(self, error: Exception) -> CheckpointError:
        last = next((step for step in self.steps() if step != self._saving), None)
        rest = "there is no earlier one" if last is None else f"the latest one is of step {last}"
        return CheckpointError(f"cannot save the checkpoint of step {self._saving}: {_reason(error)}; {rest}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait, and end the threads of orbax. Do neither after an exception, so that it is not replaced by another."""
        if kind is None:
            self.finish()
            self._manager.close()
