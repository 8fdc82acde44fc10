"""`make processes`: the losses of one process, disjoint parts of the text, and an end for all whenever one ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import script

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "char_lm_processes.py"
for name in ("optax", "tqdm", "matplotlib", "orbax.checkpoint"):
    pytest.importorskip(
        name, reason="the examples need the extra `examples`: optax, tqdm, matplotlib, orbax-checkpoint"
    )

TEXT = "Über die Brücke, 3 mal hin und 2 mal her.\n" * 20
TINY = ["--quiet", "--batch=4", "--window=5", "--hidden=8", "--sample=9", "--dropout=0.25"]

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def processes():
    return script(SCRIPT)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# --- Mistakes ---

MISTAKES = {
    "batch": (["--batch=6"], r"--batch 6 is not divisible by 4, the number of devices over process=2 x device=2"),
    "more of them": (["--processes=3"], r"--batch 4 is not divisible by 6, .* process=3 x device=2"),
    "over one axis": (["--batch=3", "--over=device", "--devices=4"], r"--batch 3 is not .* by 4, .* over device=4"),
    "started separately": (
        ["--batch=5", "--process=0", "--coordinator=:7000", "--devices=2"],
        r"--batch 5 is not divisible by 4",
    ),
    "axis": (["--over=data"], r"--over: expected mesh axes among process and device, got 'data'"),
    "axis twice": (["--over=device,device"], r"--over: expected each mesh axis at most once, got device,device"),
    "no coordinator": (["--process=1"], r"pass both --process, from 0 to 1, and --coordinator HOST:PORT"),
    "no number": (["--coordinator=:7000"], r"pass both --process, from 0 to 1, and --coordinator HOST:PORT"),
    "number": (["--coordinator=:7000", "--process=2"], r"pass both --process, from 0 to 1, and --coordinator"),
    "no port": (["--coordinator=host", "--process=1"], r"--coordinator: expected int from 1 to 65535, got 'host'"),
    "of char_lm": (["--hidden=0"], r"--hidden: expected int from 1 to \d+, got '0'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line_before_anything_starts(processes, name, text, tmp_path, capsys, monkeypatch):
    for start in "launch", "meet":
        monkeypatch.setattr(processes, start, lambda *_: pytest.fail("it went on"))
    mistake, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        processes.main([f"--text={text}", f"--out={tmp_path}", *TINY, *mistake])
    assert stop.value.code == 2
    assert re.fullmatch(rf"char_lm_processes\.py: error: .*{expected}.*\n", capsys.readouterr().err)


# --- The meeting ---


def both(processes, *guests):
    """What process 0 of 2 and its guests find at the meeting: connections and a port, or what is wrong."""
    place, found = ("127.0.0.1", free_port()), {}

    def come(name, *who):
        try:
            found[name] = processes.meet(place, *who)
        except processes.MissingError as error:
            found[name] = str(error)

    arrivals = [("host", 0, 2), *((f"guest {i}", *guest) for i, guest in enumerate(guests))]
    threads = [threading.Thread(target=come, args=arrival) for arrival in reversed(arrivals)]
    for thread in threads:
        thread.start()
        time.sleep(0.15)  # the guests come first, and have to wait
    for thread in threads:
        thread.join()
    return found


def test_who_has_met_learns_of_the_other_ones_death(processes, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(processes.os, "_exit", ends.append)
    for farewell in processes.GOODBYE, b"":
        found = both(processes, (1, 2))
        ((host,), port), ((guest,), same_port) = found["host"], found["guest 0"]
        assert port == same_port
        watching = threading.Thread(target=processes.watch, args=(host, False))
        watching.start()
        guest.sendall(farewell)
        guest.close()
        watching.join(5)
        assert not watching.is_alive()
        host.close()
        assert ends == [[], [processes.LEFT]][not farewell]
    message = "char_lm_processes.py: error: another process ended before training was complete"
    assert capsys.readouterr().err == f"{message}\n"


def test_one_that_does_not_come_is_named_and_not_waited_for(processes, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    place = "127.0.0.1", free_port()
    begun = time.monotonic()
    with pytest.raises(processes.MissingError, match=r"^expected 4 processes; 1, 2, 3 did not connect within 0.5 s$"):
        processes.meet(place, 0, 4)
    expected = rf"^no process 0 at 127.0.0.1:{place[1]} within 0.5 s: Connection refused$"
    with pytest.raises(processes.MissingError, match=expected):
        processes.meet(place, 1, 2)
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(("who", "of"), [(1, 3), (2, 2), (0, 2)])
def test_one_too_many_is_turned_away(processes, who, of):
    if who == 0:  # two who hold themselves for process 0
        with socket.create_server(("127.0.0.1", 0)) as first:
            place = first.getsockname()
            expected = rf"^cannot listen at 127.0.0.1:{place[1]}: Address already in use$"
            with pytest.raises(processes.MissingError, match=expected):
                processes.meet(place, 0, 2)
        return
    found = both(processes, (who, of))
    assert found["host"] == f"expected 2 processes; one connected as process {who} of {of}"
    assert found["guest 0"] == f"process 0 rejected process {who} of {of}; see its error message"


# --- The parts of the text ---


@pytest.mark.eight_devices
def test_each_device_holds_its_own_streams(processes):
    """On the devices of this process; that each process holds its own is seen below."""
    devices = jax.device_count()
    options = processes.parser().parse_args(["--processes=1"])
    parts = np.arange(2 * devices * 6).reshape(2 * devices, 6)
    apart = processes.placement(options, ("process", "device")).lay(parts)
    held = [np.asarray(shard.data) for shard in apart.addressable_shards]
    np.testing.assert_array_equal(held, parts.reshape(devices, 2, 6))
    alike = processes.placement(options, ("process",)).lay(parts)
    assert [shard.data.tolist() for shard in alike.addressable_shards] == [parts.tolist()] * devices


# --- Two processes ---

RECORD = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import char_lm, char_lm_processes, jax
step = char_lm.train_step
def train_step(training, text, **options):
    held = [np.asarray(shard.data).tolist() for shard in text.addressable_shards]
    with open(f"{sys.argv[2]}/held-{jax.process_index()}.json", "w") as file:
        json.dump(held, file)
    return step(training, text, **options)
char_lm.train_step = train_step
sys.exit(char_lm_processes.main(sys.argv[3:]))
"""


def losses(out):
    curve = json.loads((out / "curve.json").read_text("utf-8"))
    return {name: curve[name] for name in ("steps", "train_bits", "held_out_steps", "held_out_bits", "held_out")}


def environment(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return alone | cache | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def living(out):
    """The processes that work for this folder."""
    found = subprocess.run(
        ["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {int(line.split()[0]): line for line in found if f"--out={out}" in line}


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.05)


@pytest.fixture
def start(text, tmp_path):
    """Starts the command. None outlives a test that fails."""
    runs, env = [], environment(tmp_path)

    def start(out, *options, stdout=subprocess.PIPE):
        command = [sys.executable, str(SCRIPT), f"--text={text}", f"--out={out}", *TINY, *options]
        runs.append(subprocess.Popen(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.wait()
        for pipe in filter(None, (run.stdout, run.stderr)):
            pipe.close()


def test_two_processes_by_hand_have_the_losses_of_one(processes, text, tmp_path):
    one, two, env = tmp_path / "one", tmp_path / "two", environment(tmp_path)
    assert processes.char_lm.main([f"--text={text}", f"--out={one}", *TINY, "--steps=10"]) == 0

    hand = [f"--coordinator=127.0.0.1:{free_port()}", "--devices=2", f"--text={text}", f"--out={two}", *TINY]
    command = [sys.executable, "-c", RECORD, str(EXAMPLES), str(tmp_path), *hand, "--steps=10"]
    runs = [subprocess.Popen([*command, f"--process={i}"], env=env, stderr=subprocess.PIPE, text=True) for i in (0, 1)]
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert said == ["", ""]
    expected, got = losses(one), losses(two)
    assert len(got["train_bits"]) == 10
    for name in "train_bits", "held_out_bits", "held_out":
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5)

    held = [json.loads((tmp_path / f"held-{i}.json").read_text()) for i in (0, 1)]
    train, held_out = TEXT[:-42], TEXT[-42:]
    assert len(held_out) == len(TEXT) // 20
    index = {character: i for i, character in enumerate([processes.char_lm.UNKNOWN, *sorted({*train})])}
    streams = np.reshape([index[c] for c in train[: len(train) // 4 * 4]], (4, -1))
    np.testing.assert_array_equal(np.concatenate([*held[0], *held[1]]), streams)  # each once, in order


def test_two_processes_stop_together_and_go_on(start, tmp_path):
    """The command that starts both is sent the signal. What is resumed is, bit for bit, as undisturbed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, "--steps=100").communicate()[1] == ""
    for step, number in (20, signal.SIGTERM), (60, signal.SIGINT):
        run = start(parts, "--steps=100", "--resume", "--checkpoint-every=20")
        until(lambda: (parts / "checkpoints" / str(step)).exists() or run.poll() is not None)  # noqa: B023
        assert len(living(parts)) == 3
        run.send_signal(number)
        said = run.communicate()
        assert run.returncode == 128 + number, said
        assert re.fullmatch(r"interrupted after \d+ of 100 steps; pass --resume to continue\n", said[1])
        assert not living(parts)
    again = start(parts, "--steps=100", "--resume")
    said = again.communicate()
    assert again.returncode == 0, said
    assert "Gloo" not in said[0]
    assert "resuming after step " in said[0]
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("victim", ["the command", "process 0", "process 1"])
def test_none_is_left_when_one_is_killed(start, tmp_path, victim):
    out = tmp_path / "out"
    run = start(out, "--steps=1000000", "--checkpoint-every=10", stdout=subprocess.DEVNULL)
    until(lambda: (out / "checkpoints" / "10").exists() or run.poll() is not None)
    assert len(living(out)) == 3
    struck = time.monotonic()
    if victim == "the command":
        run.kill()
        assert run.wait() == -signal.SIGKILL
    else:
        (pid,) = (pid for pid, line in living(out).items() if f"--process={victim[-1]}" in line)
        os.kill(pid, signal.SIGKILL)
        # The other process may report its lost connection first.
        assert run.communicate()[1].splitlines()[-1] == f"char_lm_processes.py: error: {victim} was killed by signal 9"
        assert run.returncode == 137
    until(lambda: not living(out), 10)
    assert time.monotonic() - struck < 10


def test_by_hand_too_none_waits_for_one_that_died(start, tmp_path):
    out, hand = tmp_path / "out", (f"--coordinator=127.0.0.1:{free_port()}", "--devices=2", "--checkpoint-every=10")
    runs = [start(out, "--steps=1000000", *hand, f"--process={i}") for i in (0, 1)]
    until(lambda: (out / "checkpoints" / "10").exists() or any(run.poll() is not None for run in runs))
    runs[1].kill()
    begun = time.monotonic()
    message = "char_lm_processes.py: error: another process ended before training was complete"
    assert runs[0].communicate()[1].splitlines()[-1] == message
    assert runs[0].returncode == 3
    assert time.monotonic() - begun < 5


def test_the_commands_mistakes_are_reported_within_seconds(start, tmp_path):
    for options, status, expected in (
        (["--batch=6"], 2, "--batch 6 is not divisible by 4, the number of devices over process=2 x device=2"),
        (
            ["--process=0", f"--coordinator=127.0.0.1:{free_port()}"],
            1,
            "expected 2 processes; 1 did not connect within 10 s",
        ),
    ):
        begun = time.monotonic()
        run = start(tmp_path / "out", *options)
        assert run.communicate()[1] == f"char_lm_processes.py: error: {expected}\n"
        assert run.returncode == status
        assert time.monotonic() - begun < 25  # 10 of them for one that may come late, and Python's own start
