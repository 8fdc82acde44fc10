"""`examples/checkpoints.py`, and `examples/char_lm.py` through crashes: the losses are those of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import script

EXAMPLES = Path(__file__).parents[2] / "examples"
for name in ("optax", "tqdm", "matplotlib", "orbax.checkpoint"):
    pytest.importorskip(
        name, reason="the examples need the extra `examples`: optax, tqdm, matplotlib, orbax-checkpoint"
    )

TEXT = "Über die Brücke, 3 mal hin und 2 mal her.\n" * 20
TINY = ["--quiet", "--batch=2", "--window=5", "--hidden=8", "--sample=9", "--dropout=0.25"]
LOSSES = "steps", "train_bits", "held_out_steps", "held_out_bits", "held_out", "gradient_difference"

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def modules():
    return script(EXAMPLES / "char_lm.py"), sys.modules["checkpoints"]


@pytest.fixture(scope="module")
def checkpoints(modules):
    return modules[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


# --- The checkpoints ---


def tree(step):
    rng = np.random.default_rng(step)
    numbers = rng.normal(size=3000).astype(np.float32)
    return {"numbers": jnp.array(numbers), "count": (jnp.int32(step),), "key": jax.random.key(step)}


def equal(a, b):
    raw = [jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if x.dtype == key else x), t) for t in (a, b)]
    return jax.tree.all(jax.tree.map(np.array_equal, *raw))


key = jax.random.key(0).dtype


@pytest.fixture(scope="module")
def good(checkpoints, tmp_path_factory):
    """The last two of three checkpoints."""
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    with checkpoints.Checkpoints(folder, keep=2) as kept:
        assert kept.newest() is None
        for step in (1, 2, 3):
            kept.save(step, tree(step), {"losses": [0.1, step / 3]})
    assert kept.steps() == [3, 2]
    return folder


def newest(checkpoints, folder):
    with checkpoints.Checkpoints(folder, keep=2) as kept:
        step = kept.newest()
        return step, kept.arrays(step, tree(0)), kept.notes(step)


def test_what_was_saved_comes_back(checkpoints, good):
    step, arrays, notes = newest(checkpoints, good)
    assert step == 3
    assert notes == {"losses": [0.1, 1.0]}
    assert equal(arrays, tree(3))
    assert not equal(arrays, tree(2))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": flipped,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ["arrays", "notes"])
def test_any_damage_is_seen_and_the_one_before_is_taken(checkpoints, good, tmp_path, capsys, item, damage):
    """Of whatever file, but for the mark that orbax leaves last."""
    files = [path for path in (good / "3" / item).rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    assert len(files) >= {"arrays": 7, "notes": 2}[item]
    for i, file in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(good, folder)
        DAMAGES[damage](folder / file.relative_to(good))
        fault = checkpoints.broken(folder / "3" / item)
        name = f"{item}/{file.relative_to(good / '3' / item).as_posix()}"
        expected = f"{name} cannot be read" if file.name == "seal.json" else f"{name} has changed since it was written"
        if file.name == "seal.json" and damage == "flipped":  # it may still be JSON
            assert fault
        else:
            assert fault == expected

    step, arrays, notes = newest(checkpoints, folder)
    assert step == 2
    assert notes["losses"] == [0.1, 2 / 3]
    assert equal(arrays, tree(2))
    said = capsys.readouterr().err
    assert said.startswith(f"warning: skipped the checkpoint of step 3: {item}/")
    assert said.endswith(f"; resuming from step 2 ({folder}/unreadable/3.0)\n")
    assert said.count("\n") == 1


def test_the_step_of_a_damaged_one_can_be_saved_again(checkpoints, good, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    for again in range(2):
        (folder / "3" / "notes" / "metadata").write_text("{}")
        with checkpoints.Checkpoints(folder, keep=2) as kept:
            assert kept.newest() == 2
            kept.save(3, tree(30 + again), {"again": again})
        assert newest(checkpoints, folder)[0] == 3
        assert equal(newest(checkpoints, folder)[1], tree(30 + again))
        assert kept.steps() == [3, 2]
    assert sorted(path.name for path in (folder / "unreadable").iterdir()) == ["3.0", "3.1"]
    assert capsys.readouterr().err.count("warning") == 2


def test_what_was_only_begun_is_no_checkpoint(checkpoints, good, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    shutil.copytree(good / "3" / "arrays", folder / "4.orbax-checkpoint-tmp" / "arrays.orbax-checkpoint-tmp")
    assert newest(checkpoints, folder)[0] == 3
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["²", "٣", "007", "9.old"])
def test_folders_of_other_names_are_ignored(checkpoints, good, tmp_path, name):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    (folder / name).mkdir()
    with checkpoints.Checkpoints(folder, keep=2) as kept:
        assert kept.steps() == [3, 2]
        assert kept.newest() == 3
    assert (folder / name).is_dir()


def test_where_none_can_be_read_it_says_so_and_touches_nothing(checkpoints, good, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    for step in "23":
        (folder / step / "arrays" / "seal.json").unlink()
    kept = checkpoints.Checkpoints(folder, keep=2)
    with pytest.raises(checkpoints.CheckpointError, match=r"no checkpoint in .* can be read; step 3: arrays/"):
        kept.newest()
    assert kept.steps() == [3, 2]


def on_a_small_disk(folder, command, kilobytes, **options):
    """Runs a command where `folder` is a disk of its own; without the rights for that, with files of limited size."""
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={kilobytes}k none {folder}"
    if not subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        prefix, message = ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh"], "No space left on device"
    else:
        prefix, message = ["sh", "-c", f'ulimit -f {kilobytes // 2}; exec "$@"', "sh"], "File too large"
    result = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False, **options)
    return result, message


FILL = """
import sys
from pathlib import Path
import numpy as np
from checkpoints import CheckpointError, Checkpoints
folder, numbers = Path(sys.argv[1]), np.random.default_rng(0).normal(size=10**6)
kept, few = Checkpoints(folder, keep=9), {"numbers": numbers[:100]}
kept.save(1, few, {})
kept.save(2, few, {})
kept.finish()
try:
    kept.save(3, {"numbers": numbers}, {})
    kept.finish()
except CheckpointError as error:
    print(error)
print(kept.steps())
kept = Checkpoints(folder, keep=9)
print(kept.newest(), np.array_equal(kept.arrays(2, few)["numbers"], few["numbers"]))
kept.save(3, few, {})
kept.finish()
print(kept.newest())
"""


def test_a_full_disk_costs_one_line_and_no_checkpoint(tmp_path):
    """And what was half-written gives its space back."""
    disk, env = tmp_path / "disk", os.environ | {"PYTHONPATH": str(EXAMPLES)}
    result, message = on_a_small_disk(disk, [sys.executable, "-c", FILL, str(disk)], 2000, env=env)
    assert result.returncode == 0, result.stderr
    line = f"cannot save the checkpoint of step 3: {message}; the latest one is of step 2"
    assert result.stdout.splitlines() == [line, "[2, 1]", "2 True", "3"]
    assert result.stderr == ""


# --- The character model ---


@pytest.fixture
def char_lm(modules, monkeypatch):
    """Without what has nothing to do with checkpoints and takes seconds to compile."""
    monkeypatch.setattr(modules[0], "gradient_difference", lambda *_, **__: 0.5e-10)
    monkeypatch.setattr(modules[0], "write", lambda *_, **__: jnp.zeros(0, jnp.int32))
    return modules[0]


def losses(out):
    curve = json.loads((out / "curve.json").read_text("utf-8"))
    return {name: curve[name] for name in LOSSES}


def killed_after(n, number):
    """Makes train_step send a signal to its own process, in its n-th call."""

    def patch(char_lm, monkeypatch):
        step, calls = char_lm.train_step, iter(range(1, 10**6))

        def train_step(*args, **options):
            if next(calls) == n:
                os.kill(os.getpid(), number)
            return step(*args, **options)

        monkeypatch.setattr(char_lm, "train_step", train_step)

    return patch


def test_stopped_and_resumed_is_as_undisturbed(char_lm, text, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    base = [f"--text={text}", *TINY, "--steps=9"]
    assert char_lm.main([*base, f"--out={whole}"]) == 0
    assert not (whole / "checkpoints").exists()

    steps = lambda: sorted(p.name for p in (parts / "checkpoints").iterdir())  # noqa: E731
    with monkeypatch.context() as patch:
        killed_after(4, signal.SIGTERM)(char_lm, patch)
        assert char_lm.main([*base, f"--out={parts}", "--checkpoint-every=2", "--keep=2"]) == 143
    assert steps() == ["2", "4"]
    assert losses_so_far(parts) == losses_so_far(whole)[:4]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        killed_after(3, signal.SIGINT)(char_lm, patch)
        assert char_lm.main([*base, f"--out={parts}", "--resume", "--keep=2"]) == 130
    said = capsys.readouterr()
    assert "resuming after step 4 of 9\n" in said.out
    assert said.err == "interrupted after 7 of 9 steps; pass --resume to continue\n"
    assert steps() == ["4", "7"]

    # The last one is damaged: two steps and a half are done again, and give what they gave.
    flipped(next(path for path in (parts / "checkpoints" / "7" / "arrays").rglob("d/*") if path.stat().st_size > 999))
    assert char_lm.main([*base, f"--out={parts}", "--resume"]) == 0
    assert "warning: skipped the checkpoint of step 7: arrays/" in capsys.readouterr().err
    assert losses(parts) == losses(whole)
    assert steps() == ["4", "9", "unreadable"]


def losses_so_far(out):
    return json.loads((out / "curve.json").read_text("utf-8"))["train_bits"]


def test_resume_asks_for_the_same_options_and_the_same_text(char_lm, text, tmp_path, capsys):
    base = [f"--out={tmp_path}", *TINY, "--steps=2"]
    assert char_lm.main([*base, f"--text={text}", "--resume"]) == 0  # none is there: it begins
    other = tmp_path / "other.txt"
    other.write_text(TEXT[1:], "utf-8")
    folder = tmp_path / "checkpoints"
    for options, fault in (
        ([f"--text={text}", "--hidden=9"], "--hidden 8, not 9; pass the same --hidden"),
        ([f"--text={other}"], "another text; pass the same --text"),
    ):
        capsys.readouterr()
        assert char_lm.main([*base, *options, "--resume"]) == 2
        expected = f"cannot resume: the checkpoints in {folder} are from a run with {fault}, or use another --out"
        assert capsys.readouterr().err == f"char_lm.py: error: {expected}\n"
    with pytest.raises(SystemExit) as stop:
        char_lm.main([*base, f"--text={text}", "--checkpoint-every=1"])
    assert stop.value.code == 2
    assert f"{folder} is not empty: pass --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "notes", [{"losses": [0.1]}, [], {"run": {}, "curve": {}}, {"run": {"text": ""}, "curve": {"steps": 1}}]
)
def test_notes_of_another_program_are_refused(char_lm, tmp_path, notes):
    kept = SimpleNamespace(newest=lambda: 1, notes=lambda step: notes, folder=tmp_path)
    with pytest.raises(char_lm.Mistake, match=r"cannot resume: .* not written by this program; use another --out"):
        char_lm.resumed(kept, {"text": "a"}, None, {"gradient_difference": {}, "steps": [], "train_bits": []})


# --- The command, killed ---

KILLS = 6


def environment(tmp_path):
    """One machine, one cache: a run that starts again compiles nothing."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def begun_saves(folder):
    """By number, for a name comes back with every run that starts again."""
    if not folder.exists():
        return set()
    return {entry.inode() for entry in os.scandir(folder) if "tmp" in entry.name}


def test_killed_at_any_moment_it_resumes_to_the_same_losses(text, tmp_path):
    """Every other kill at any time from the start to the end, the rest while a checkpoint is being written."""
    rng, env, kills = random.Random(0), environment(tmp_path), []
    command = [sys.executable, str(EXAMPLES / "char_lm.py"), f"--text={text}", *TINY, "--steps=25", "--keep=2"]

    def start(out, *options):
        return subprocess.Popen(
            [*command, f"--out={out}", *options], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(run):
        assert run.communicate()[1] == ""
        assert run.returncode == 0

    whole = tmp_path / "whole"
    finish(start(whole))
    begun = time.monotonic()
    finish(start(tmp_path / "timed", "--checkpoint-every=1"))
    life = time.monotonic() - begun
    assert losses(tmp_path / "timed") == losses(whole)

    for round_ in range(20):
        out, done = tmp_path / str(round_), False
        while not done and len(kills) < KILLS:
            left = begun_saves(out / "checkpoints")  # by the run before
            run = start(out, "--resume", "--checkpoint-every=1")
            begun, moment = time.monotonic(), rng.uniform(0, life)
            if len(kills) % 2:
                while run.poll() is None and not begun_saves(out / "checkpoints") - left:
                    time.sleep(0.001)
                moment = time.monotonic() - begun + rng.uniform(0, 0.15)
            while run.poll() is None and time.monotonic() - begun < moment:
                time.sleep(0.002)
            done = run.poll() == 0
            if not done:
                run.kill()
            assert run.communicate()[1] == ""
            done = run.returncode == 0  # it may have ended just before the signal
            if not done:
                assert run.returncode == -signal.SIGKILL
                kept = [p.name for p in (out / "checkpoints").iterdir()] if (out / "checkpoints").exists() else []
                kills.append((round(moment, 2), sorted(kept)))
        finish(start(out, "--resume", "--checkpoint-every=1"))
        assert losses(out) == losses(whole), kills
        assert (out / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()
        if len(kills) == KILLS:
            break
    assert len(kills) == KILLS
    assert any("tmp" in name for _, kept in kills for name in kept), "no kill struck a save"


def test_the_command_on_a_full_disk(text, tmp_path):
    command = [sys.executable, str(EXAMPLES / "char_lm.py"), f"--text={text}", *TINY, "--hidden=256", "--steps=9"]
    disk = tmp_path / "disk"
    options = [f"--out={disk}", "--checkpoint-every=1", "--keep=9"]
    result, message = on_a_small_disk(disk, [*command, *options], 9000, env=environment(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("char_lm.py: error: cannot save the checkpoint of step ")
    assert f": {message}; the latest one is of step " in result.stderr
    assert result.stderr.count("\n") == 1
