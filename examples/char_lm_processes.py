"""The character model of char_lm.py, data parallel over several processes.

    batch rows 0 .. B-1    =  | device 0 | device 1 || device 0 | device 1 |
                              |     process 0       ||     process 1       |

The mesh has the axes `process` and `device`. The batch, its streams of text and its states are sharded over them; the
parameters are replicated. `jax.jit` sees one array with B rows, so the training step is the one of char_lm.py, and XLA
adds the sum of the gradients over devices. The losses equal those of a single process up to the order of that sum.

    python examples/char_lm_processes.py
        start 2 processes with 2 virtual devices each on this machine; all of them end with this command
    python examples/char_lm_processes.py --coordinator host:7000 --processes 4 --process 2
        run one process of a job whose processes are started manually

If a process is missing or dies, jax.distributed lets the others wait for minutes and then aborts with a stack trace.
Therefore all processes first connect to a socket of process 0 and keep the connection open. The operating system closes
the connection of a process that dies, which the others detect at once.
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
PATIENCE = 10  # seconds until all processes have connected, and until all have ended after the first one
GRACE = 60  # seconds to save and exit after SIGTERM or Ctrl-C
LEFT = 3  # exit status of a process that ends because another one has ended
GOODBYE = b"."

Address = tuple[str, int]


class MissingError(Exception):
    """Raised if an expected process does not connect."""


# --- Options ---


def address(word: str) -> Address:
    host, _, port = word.rpartition(":")
    return host or "127.0.0.1", number(port, most=2**16 - 1)


def parser() -> Parser:
    parser = char_lm.parser(PROG)
    parser.description = "Train the model of char_lm.py in several processes. Defaults are in brackets."
    add = parser.add_argument
    add("--processes", type=number, default=2, help="number of processes [%(default)s]")
    add("--devices", type=number, metavar="N", help="virtual CPU devices per process [2; with --process, its devices]")
    add("--over", default=",".join(AXES), metavar="AXES", help="mesh axes that shard the batch [%(default)s]")
    add("--coordinator", type=address, metavar="HOST:PORT", help="address of process 0, for processes started manually")
    add("--process", type=lambda word: number(word, least=0), help="index of this process, if started manually")
    add("--tied", action="store_true", help="exit at the end of stdin, which signals that the parent process has ended")
    return parser


def divided_over(parser: Parser, options: Options) -> tuple[str, ...]:
    """Return the mesh axes that shard the batch."""
    chosen = tuple(options.over.split(","))
    for axis in chosen:
        if axis not in AXES:
            parser.error(f"--over: expected mesh axes among {' and '.join(AXES)}, got {axis!r}")
    if len({*chosen}) < len(chosen):
        parser.error(f"--over: expected each mesh axis at most once, got {options.over}")
    return chosen


def check_division(parser: Parser, options: Options, devices: int) -> None:
    sizes = {"process": options.processes, "device": devices}
    chosen = divided_over(parser, options)
    parts = math.prod(sizes[axis] for axis in chosen)
    if options.batch % parts:
        over = " x ".join(f"{axis}={sizes[axis]}" for axis in chosen)
        parser.error(f"--batch {options.batch} is not divisible by {parts}, the number of devices over {over}")


# --- Connecting the processes ---


def meet(coordinator: Address, process: int, processes: int) -> tuple[list[socket.socket], int]:
    """Connect all processes. Return connections that close when a process ends, and a port for jax.distributed."""
    deadline = time.monotonic() + PATIENCE
    return (accept_all if process == 0 else connect)(coordinator, process, processes, deadline)


def line(connection: socket.socket) -> str:
    with connection.makefile("r") as lines:
        return lines.readline()


def accept_all(coordinator: Address, _: int, processes: int, deadline: float) -> tuple[list[socket.socket], int]:
    try:
        server = socket.create_server(coordinator)
    except OSError as error:
        reason = str(error.strerror).split(" (", maxsplit=1)[0]
        raise MissingError(f"cannot listen at {':'.join(map(str, coordinator))}: {reason}") from error
    guests: dict[int, socket.socket] = {}
    with server, ExitStack() as on_failure:
        while len(guests) < processes - 1:
            try:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                guest, _ = server.accept()
                on_failure.callback(guest.close)
                guest.settimeout(max(0.001, deadline - time.monotonic()))
                who, of = map(int, line(guest).split())
            except TimeoutError:
                absent = ", ".join(str(i) for i in range(1, processes) if i not in guests)
                raise MissingError(
                    f"expected {processes} processes; {absent} did not connect within {PATIENCE} s"
                ) from None
            except (OSError, ValueError):  # closed at once, or not one of the processes
                continue
            if of != processes or who in guests or not 0 < who < processes:
                raise MissingError(f"expected {processes} processes; one connected as process {who} of {of}")
            guests[who] = guest
        with socket.create_server((coordinator[0], 0)) as free:
            port = free.getsockname()[1]
        for guest in guests.values():
            guest.settimeout(None)
            guest.sendall(b"%d\n" % port)
        on_failure.pop_all()
    return list(guests.values()), port


def connect(coordinator: Address, process: int, processes: int, deadline: float) -> tuple[list[socket.socket], int]:
    while True:
        try:
            host = socket.create_connection(coordinator, timeout=max(0.001, deadline - time.monotonic()))
            break
        except OSError as error:  # process 0 may not listen yet
            if time.monotonic() > deadline:
                absent = f"no process 0 at {':'.join(map(str, coordinator))} within {PATIENCE} s"
                raise MissingError(f"{absent}: {error.strerror or error}") from error
            time.sleep(0.1)
    try:
        host.sendall(b"%d %d\n" % (process, processes))
        host.settimeout(2 * PATIENCE)  # process 0 may have started late, and waits for the other processes
        port = int(line(host))
        host.settimeout(None)
    except (OSError, ValueError):  # an empty line: process 0 has closed the connection
        host.close()
        raise MissingError(f"process 0 rejected process {process} of {processes}; see its error message") from None
    return [host], port


def watch(other: socket.socket, tied: bool) -> None:
    """Exit when the other process dies. This process may be blocked in a collective that waits for it."""
    try:
        farewell = other.recv(1)
    except OSError:
        farewell = b""
    if farewell != GOODBYE:
        if not tied:  # otherwise the parent process reports it
            print(f"{PROG}: error: another process ended before training was complete", file=sys.stderr, flush=True)
        os._exit(LEFT)


# --- One process ---


def placement(options: Options, chosen: tuple[str, ...]) -> Placement:
    shape = options.processes, jax.local_device_count()
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Placement(NamedSharding(mesh, PartitionSpec(chosen)), NamedSharding(mesh, PartitionSpec()))


def until_stdin_ends() -> None:
    while os.read(0, 1):  # not sys.stdin: the thread would hold its lock when Python exits
        pass
    os._exit(LEFT)


def work(parser: Parser, options: Options, train: str, held_out: str) -> int:
    """Run one process. It never waits forever for another one, and may end by `os._exit`."""
    if options.tied:
        threading.Thread(target=until_stdin_ends, daemon=True).start()
    if options.coordinator is None or options.process is None or options.process >= options.processes:
        parser.error(f"pass both --process, from 0 to {options.processes - 1}, and --coordinator HOST:PORT, or neither")
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
    jax.config.update("jax_enable_preemption_service", False)  # char_lm.signals handles SIGTERM
    jax.distributed.initialize(
        f"{options.coordinator[0]}:{port}",
        options.processes,
        options.process,
        initialization_timeout=30,
        heartbeat_timeout_seconds=30,  # a machine that loses power does not close its connections
        shutdown_timeout_seconds=PATIENCE,
    )
    check_division(parser, options, jax.local_device_count())
    status = 1
    try:
        status = char_lm.job(options, train, held_out, placement(options, chosen), PROG)
    finally:
        if 0 < status < 128:
            time.sleep(1)  # a collective fails when another process dies; then `watch` ends this process
    sys.stdout.flush()
    sys.stderr.flush()
    if 0 < status < 128:
        os._exit(status)  # at a normal exit, JAX would wait for the other processes
    jax.distributed.shutdown()  # waits for the others
    for other in others:
        other.sendall(GOODBYE)
    return status


# --- The parent process ---


def forward(output: IO[bytes]) -> None:
    """Forward the output of a process, except for the log lines of Gloo."""
    for line in output:
        if not line.startswith(b"[Gloo]"):
            with suppress(BrokenPipeError):  # a closed pipe, as with `| head`, does not stop training
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()  # no effect if it has ended
    child.wait()
    for pipe in filter(None, (child.stdin, child.stdout)):
        pipe.close()


def launch(argv: list[str], options: Options) -> int:
    """Start the processes and wait for them. Kill the remaining ones at the end, after an exception too.

    If this process is killed, its children exit at the end of their stdin.
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
                start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
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
    """Return the exit status of the job, and the index of the process that failed, or None."""
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
                culprit = min(bad)  # an error of all processes is reported once, by process 0
                return bad[culprit], culprit
            return (128 + sent if sent else 1 if late else max(ended.values())), None
        if bad:
            deadline = min(deadline, time.monotonic() + 1)  # the others may be about to report the same error
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
