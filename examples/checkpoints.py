"""Checkpoints that outlive a crash, a full disk and a flipped bit: a thin layer over orbax.

orbax writes in the background, into a folder under a name for the time being, and renames it once all is in it: a
checkpoint is there as a whole or not at all. Only then does it delete the oldest. What it does not notice is a number
that has changed on the disk since, for tensorstore keeps no checksum of the data of an array. So the last that is
written before the rename is a seal, which lists every file with its SHA-256. Files that are not what their seal says
are never read: `newest` passes over them, says so, and puts them aside, where no later checkpoint replaces them.
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
ASIDE = "unreadable"  # the folder of what does not match its seal
STEP = re.compile("0|[1-9][0-9]*")  # str.isdigit would accept other digits, such as superscripts, and leading zeros


class CheckpointError(Exception):
    """What went wrong with a checkpoint, in one line for its user."""


# --- The seal ---


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def broken(folder: Path) -> str | None:
    """Why the files of an item are not those that were sealed, or None. What came later is no concern of the seal."""
    try:
        sealed, found = json.loads((folder / SEAL).read_bytes()), digests(folder)
        changed = [name for name, digest in sealed.items() if found.get(name) != digest]
    except (OSError, ValueError, AttributeError):  # ValueError: no JSON, or no UTF-8
        return f"{folder.name}/{SEAL} cannot be read"
    return f"{folder.name}/{changed[0]} is not what was written" if changed else None


class _Sealed:
    """Mixed into a handler of orbax, which calls `finalize` between the last write and the rename."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)  # type: ignore[reportAttributeAccessIssue]  # of the handler that this is mixed into
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
    """The operating system's own words, which tensorstore passes on as a number inside of its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
    if code:
        return os.strerror(int(code[1] or code[2]))
    return (str(error).splitlines() or [type(error).__name__])[0]


@cache
def _say_it_once() -> None:
    """What goes wrong is raised here, in one line.

    orbax logs it too, with a traceback for each of its threads; and where one write of several fails, the others end
    later and find the event loop closed, which Python reports though nobody waits for them.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    report = sys.unraisablehook

    def report_others(fault: Any) -> None:
        if str(fault.exc_value) != "Event loop is closed":
            report(fault)

    sys.unraisablehook = report_others


class Checkpoints:
    """The last `keep` checkpoints in a folder: of each, a tree of arrays, and notes that JSON can hold.

    Several processes call every method together, and share the folder.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        _say_it_once()
        self.folder = folder.absolute()
        self._saving = 0
        # What a killed process has left half-written is of no use: cleanup_tmp_directories deletes it.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=_handlers())
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {folder}: {_reason(error)}") from error

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, the newest first, whether or not they can be read."""
        return sorted((int(path.name) for path in self.folder.iterdir() if STEP.fullmatch(path.name)), reverse=True)

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is as it was written. None if there are no checkpoints at all."""
        multihost_utils.sync_global_devices("checkpoints: all processes see the same")
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
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; in that of step {step}, {reason}")
        multihost_utils.sync_global_devices("checkpoints: all processes have looked")
        if jax.process_index() == 0:
            for step, reason in faults.items():
                self._put_aside(step, f"{reason}; going on from step {newest}")
        multihost_utils.sync_global_devices("checkpoints: the broken ones are aside")
        self._manager.reload()
        return newest

    def _put_aside(self, step: int, reason: str) -> None:
        aside = self.folder / ASIDE
        aside.mkdir(exist_ok=True)
        target = next(path for i in range(10**6) if not (path := aside / f"{step}.{i}").exists())
        (self.folder / str(step)).rename(target)
        print(f"warning: skipped the checkpoint of step {step}: {reason} ({target})", file=sys.stderr, flush=True)

    def notes(self, step: int) -> Any:
        """What was noted beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]

    def arrays(self, step: int, like: Any) -> Any:
        """The tree of arrays, each on the devices where its counterpart in `like` is."""
        return self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like)))["arrays"]

    def save(self, step: int, arrays: Any, notes: Any) -> None:
        """Copies the arrays, then writes in the background. What goes wrong there is raised by the next call."""
        self.finish()
        self._saving = step
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._unsaved(error) from error

    def finish(self) -> None:
        """Waits for the checkpoint that is being written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # tensorstore raises ValueError for a full disk, the rest of orbax OSError
            raise self._unsaved(error) from error

    def _unsaved(self, error: Exception) -> CheckpointError:
        last = next((step for step in self.steps() if step != self._saving), None)
        rest = "there is no earlier one" if last is None else f"the last one is that of step {last}"
        return CheckpointError(f"cannot save the checkpoint of step {self._saving}: {_reason(error)}; {rest}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits, and ends the threads of orbax. After an exception it does neither: that one should be heard."""
        if kind is None:
            self.finish()
            self._manager.close()
