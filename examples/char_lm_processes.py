"""The character model of char_lm.py in several processes: each holds a part of the text, and all have the same weights.

    batch places 0 .. B-1  =  | device 0 | device 1 || device 0 | device 1 |
                              |     process 0       ||     process 1       |

The mesh has the axes `process` and `device`, and the batch is divided over them, with the stretches of text and the
states that belong to it. `jax.jit` sees one array of B places, and so the training step is that of char_lm.py, to the
letter; what it adds is the sum of the gradients over the devices. The losses are those of a single process, but for the
order in which that sum is taken.

    python examples/char_lm_processes.py
        starts 2 processes of 2 virtual devices on this machine, and leaves none behind, however it ends itself
    python examples/char_lm_processes.py --coordinator host:7000 --processes 4 --process 2
        is one process of yours, started by hand

A process that does not come, or that dies, would leave the others waiting for minutes, and then jax.distributed aborts
with a stack trace. So the processes first meet at a socket, and leave its connections open: the operating system closes
them for whoever dies.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import IO

import char_lm
import jax
from char_lm import Options, Parser, Placement, number
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PROG = "char_lm_processes.py"
AXES = ("process", "device")
PATIENCE = 10  # seconds for a process to come; those that end together have as many to do so
GRACE = 60  # seconds to save and end in, after SIGTERM or Ctrl-C
LEFT = 3  # status of a process that ends because another one did
GOODBYE = b"."

Address = tuple[str, int]


class MissingError(Exception):
    """A process that was expected did not come."""


# --- Options ---


def address(word: str) -> Address:
    host, _, port = word.rpartition(":")
    return host or "127.0.0.1", number(port, most=2**16 - 1)


def parser() -> Parser:
    parser = char_lm.parser(PROG)
    parser.description = "Trains the model of char_lm.py in several processes. Defaults stand in brackets."
    add = parser.add_argument
    add("--processes", type=number, default=2, help="how many [%(default)s]")
    add("--devices", type=number, metavar="N", help="virtual CPU devices of each [2; by hand, the devices it has]")
    add("--over", default=",".join(AXES), metavar="AXES", help="that the batch is divided over [%(default)s]")
    add("--coordinator", type=address, metavar="HOST:PORT", help="where process 0 is; by hand only")
    add("--process", type=lambda word: number(word, least=0), help="the number of this one; by hand only")
    add("--tied", action="store_true", help="end when stdin does, as it does when the starting process dies")
    return parser


def divided_over(parser: Parser, options: Options) -> tuple[str, ...]:
    """The axes of the mesh that the batch is divided over."""
    chosen = tuple(options.over.split(","))
    for axis in chosen:
        if axis not in AXES:
            parser.error(f"--over: the mesh has the axes {' and '.join(AXES)}, and none named {axis!r}")
    if len({*chosen}) < len(chosen):
        parser.error(f"--over: an axis divides the batch once, got {options.over}")
    return chosen


def check_division(parser: Parser, options: Options, devices: int) -> None:
    sizes = {"process": options.processes, "device": devices}
    chosen = divided_over(parser, options)
    parts = math.prod(sizes[axis] for axis in chosen)
    if options.batch % parts:
        over = " x ".join(f"{axis}={sizes[axis]}" for axis in chosen)
        parser.error(f"--batch {options.batch} cannot be divided by {parts}, the devices of the mesh over {over}")


# --- The meeting ---


def meet(coordinator: Address, process: int, processes: int) -> tuple[list[socket.socket], int]:
    """Connections that last as long as their processes, and a port for jax.distributed, when all have come."""
    deadline = time.monotonic() + PATIENCE
    return (welcome if process == 0 else arrive)(coordinator, process, processes, deadline)


def line(connection: socket.socket) -> str:
    with connection.makefile("r") as lines:
        return lines.readline()


def welcome(coordinator: Address, _: int, processes: int, deadline: float) -> tuple[list[socket.socket], int]:
    try:
        door = socket.create_server(coordinator)
    except OSError as error:
        reason = str(error.strerror).split(" (", maxsplit=1)[0]
        raise MissingError(f"cannot listen at {':'.join(map(str, coordinator))}: {reason}") from error
    guests: dict[int, socket.socket] = {}
    with door, ExitStack() as unless_all_come:
        while len(guests) < processes - 1:
            try:
                door.settimeout(max(0.001, deadline - time.monotonic()))
                guest, _ = door.accept()
                unless_all_come.callback(guest.close)
                guest.settimeout(max(0.001, deadline - time.monotonic()))
                who, of = map(int, line(guest).split())
            except TimeoutError:
                absent = ", ".join(str(i) for i in range(1, processes) if i not in guests)
                raise MissingError(f"of {processes} processes, no {absent} came within {PATIENCE} s") from None
            except (OSError, ValueError):  # it came and went, or it is somebody else
                continue
            if of != processes or who in guests or not 0 < who < processes:
                raise MissingError(f"of {processes} processes, one came as process {who} of {of}")
            guests[who] = guest
        with socket.create_server((coordinator[0], 0)) as free:
            port = free.getsockname()[1]
        for guest in guests.values():
            guest.settimeout(None)
            guest.sendall(b"%d\n" % port)
        unless_all_come.pop_all()
    return list(guests.values()), port


def arrive(coordinator: Address, process: int, processes: int, deadline: float) -> tuple[list[socket.socket], int]:
    while True:
        try:
            host = socket.create_connection(coordinator, timeout=max(0.001, deadline - time.monotonic()))
            break
        except OSError as error:  # it may not be there yet
            if time.monotonic() > deadline:
                absent = f"no process 0 at {':'.join(map(str, coordinator))} within {PATIENCE} s"
                raise MissingError(f"{absent}: {error.strerror or error}") from error
            time.sleep(0.1)
    try:
        host.sendall(b"%d %d\n" % (process, processes))
        host.settimeout(2 * PATIENCE)  # process 0 may have come late itself, and waits for others in its turn
        port = int(line(host))
        host.settimeout(None)
    except (OSError, ValueError):  # an empty line: it has hung up
        host.close()
        raise MissingError(f"process 0 has not let process {process} of {processes} in; see what it says") from None
    return [host], port


def watch(other: socket.socket, tied: bool) -> None:
    """Ends this process when the other one dies, which may be in the middle of a sum that waits for it."""
    try:
        farewell = other.recv(1)
    except OSError:
        farewell = b""
    if farewell != GOODBYE:
        if not tied:  # else it is said by whoever started both
            print(f"{PROG}: error: another process ended before the work was done", file=sys.stderr, flush=True)
        os._exit(LEFT)


# --- One process ---


def placement(options: Options, chosen: tuple[str, ...]) -> Placement:
    shape = options.processes, jax.local_device_count()
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Placement(NamedSharding(mesh, PartitionSpec(chosen)), NamedSharding(mesh, PartitionSpec()))


def until_stdin_ends() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread would hold when Python ends
        pass
    os._exit(LEFT)


def work(parser: Parser, options: Options, train: str, held_out: str) -> int:
    """One process, from the meeting to the parting. It hangs on no other: it may end by `os._exit`."""
    if options.tied:
        threading.Thread(target=until_stdin_ends, daemon=True).start()
    if options.coordinator is None or options.process is None or options.process >= options.processes:
        parser.error(f"--process, from 0 to {options.processes - 1}, and --coordinator HOST:PORT belong together")
    chosen = divided_over(parser, options)
    if options.devices:
        check_division(parser, options, options.devices)
        jax.config.update("jax_num_cpu_devices", options.devices)
    try:
        others, port = meet(options.coordinator, options.process, options.processes)
    except MissingError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    for other in others:
        threading.Thread(target=watch, args=(other, options.tied), daemon=True).start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: char_lm.signals
    jax.distributed.initialize(
        f"{options.coordinator[0]}:{port}",
        options.processes,
        options.process,
        initialization_timeout=30,
        heartbeat_timeout_seconds=30,  # a machine that loses its power closes no connection
        shutdown_timeout_seconds=PATIENCE,
    )
    check_division(parser, options, jax.local_device_count())
    status = 1
    try:
        status = char_lm.job(options, train, held_out, placement(options, chosen), PROG)
    finally:
        if 0 < status < 128:
            time.sleep(1)  # A sum fails when another process dies; in that case `watch` ends this process.
    sys.stdout.flush()
    sys.stderr.flush()
    if 0 < status < 128:
        os._exit(status)  # jax would wait, at exit, for processes that will not come
    jax.distributed.shutdown()  # waits for the others
    for other in others:
        other.sendall(GOODBYE)
    return status


# --- All of them ---


def forward(output: IO[bytes]) -> None:
    """Passes on what a process prints, but for the greetings of the library that sums over processes."""
    for line in output:
        if not line.startswith(b"[Gloo]"):
            with suppress(BrokenPipeError):  # nobody reads on, as under `| head`: that is no reason to stop
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()  # nothing, if it has ended
    child.wait()
    for pipe in filter(None, (child.stdin, child.stdout)):
        pipe.close()


def launch(argv: list[str], options: Options) -> int:
    """Starts the processes and waits for them. None is left: they are killed at the end, whatever brings it.

    If this process is killed itself, they notice by the end of their stdin.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = f"--coordinator=127.0.0.1:{port}", f"--devices={options.devices}", "--tied"
    children: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        complaints = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(options.processes)]
        asked = stack.enter_context(char_lm.signals())
        for process in range(options.processes):
            child = subprocess.Popen(
                [sys.executable, "-u", __file__, *argv, *shared, f"--process={process}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if process else subprocess.PIPE,
                stderr=complaints[process] if process else None,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
            stack.callback(end, child)
            children.append(child)
        assert children[0].stdout
        reader = threading.Thread(target=forward, args=(children[0].stdout,), daemon=True)
        reader.start()
        status, culprit = wait(children, asked)
        for child in children:
            child.kill()
        reader.join()
        if culprit is not None:
            complaints[culprit].seek(0)
            sys.stderr.write(complaints[culprit].read().decode(errors="replace"))
            if status < 0:
                print(f"{PROG}: error: process {culprit} was killed by signal {-status}", file=sys.stderr)
    return 128 - status if status < 0 else status


def wait(children: Sequence[subprocess.Popen[bytes]], asked: Callable[[], int]) -> tuple[int, int | None]:
    """The status of all, and the number of the process that was the first to end badly, if one did."""
    sent, deadline = 0, math.inf
    while True:
        if asked() and not sent:
            sent, deadline = asked(), time.monotonic() + GRACE
            for child in children:
                child.send_signal(sent)
        ended = {process: status for process, child in enumerate(children) if (status := child.poll()) is not None}
        bad = {process: status for process, status in ended.items() if status not in (0, LEFT, 128 + sent, -sent)}
        late = time.monotonic() > deadline
        if len(ended) == len(children) or late:
            if bad:
                culprit = min(bad)  # what all complain of is said once, by process 0
                return bad[culprit], culprit
            return (128 + sent if sent else 1 if late else max(ended.values())), None
        if bad:
            deadline = min(deadline, time.monotonic() + 1)  # the rest may be about to say the same
        elif ended and not sent:
            deadline = min(deadline, time.monotonic() + PATIENCE)
        time.sleep(0.05)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own = parser()
    options, train, held_out = char_lm.arguments(argv, own)
    if options.process is not None or options.coordinator is not None:
        return work(own, options, train, held_out)
    options.devices = options.devices or 2
    check_division(own, options, options.devices)
    try:
        return launch(argv, options)
    except KeyboardInterrupt:  # the second Ctrl-C
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
