"""What a gradient costs on n devices, on paper: products, bytes, what passes between devices, and a time made of these.

    python -m benchmarks.cost      # the tables of docs/scale.md

Recurrence. T steps, a batch of B divided over n devices, b = B / n, features D to H, G gates (rnn 1, gru 3, lstm 4).
A product of (b, M) and (M, N) takes 2 b M N operations. On each device

    forward, a step         u = x W_x, r = h W_h                2 b (D + H) G H
    backward, a step        δ W_hᵀ                              2 b H G H
    after the loop          W̄_x = xᵀ δ, W̄_h = hᵀ δ              2 T b (D + H) G H
    the gradient of xs      δ W_xᵀ                              2 T b D G H           where it is asked for

    kept                    xs, ys and k arrays (T, b, H)       k = 0 (rnn), 4 (lstm, gru)

A GRU of D + H <= 128 keeps no gates, k = 0, and makes them again: one forward product more. Autodiff of a scan takes
the same products, those of W̄ in the loop too, and keeps k = 3, 9, 12 (rnn, gru, lstm).

The parameters, P numbers, are on every device, and their gradient is a sum over devices: one all-reduce of P numbers in
the accumulator's dtype, 4 bytes each. Autodiff of a scan has it in every step: T all-reduces.

Convolution. Time T divided over n devices, batch B on each, K taps at distance d, stride 1, as many outputs as inputs:

    y, x̄ and w̄              each                                2 B (T / n) K C_in C_out
    halo                    rows of x, there                    B (K - 1) d C_in          numbers
                            rows of x̄, back                     as many
    kernel, bias            one all-reduce                      K C_in C_out + C_out      numbers

Time. Each stage takes the longer of its products, at a fraction e of the peak F, and its bytes, at the memory's β; a
step of a loop takes no less than its q operations, one after the other, ℓ each. A ring of n devices passes on
2 (n - 1) / n times what it sums, at W, and its first byte takes λ:

    t  =  T max(q ℓ, products / e F, bytes / β)                        the loops
          + max(products, bytes) of what is contracted after them
          + λ(n) + 2 (n - 1) / n  4 P / W(n)                           the sum over devices

and in autodiff of a scan the second and the third are in the loop, T times. Nothing overlaps.
"""

from collections.abc import Callable, Iterator
from math import log2
from typing import NamedTuple

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
KEPT = {"rnn": 0, "gru": 4, "lstm": 4}
KEPT_BY_AUTODIFF = {"rnn": 3, "gru": 9, "lstm": 12}
NUMBER = 4  # bytes of a float32, and of an accumulator


class Recurrence(NamedTuple):
    """One recurrence and its gradient with respect to its parameters, on each of n devices."""

    kind: str
    B: int
    T: int
    D: int
    H: int
    n: int = 1

    @property
    def b(self) -> int:
        """The batch of one device."""
        return self.B // self.n

    @property
    def width(self) -> int:
        """G H."""
        return GATES[self.kind] * self.H

    @property
    def parameters(self) -> int:
        """P; a GRU has two biases."""
        return (self.D + self.H + (2 if self.kind == "gru" else 1)) * self.width

    @property
    def remakes(self) -> bool:
        """Whether gates are made again rather than kept."""
        return self.kind == "gru" and self.D + self.H <= 128

    @property
    def forward_step(self) -> int:
        """Both maps of one step."""
        return 2 * self.b * (self.D + self.H) * self.width

    @property
    def backward_step(self) -> int:
        """The one product that has to be in the loop."""
        return 2 * self.b * self.H * self.width

    @property
    def contractions(self) -> int:
        """After the loop, or in place of it."""
        return self.T * self.forward_step * (2 if self.remakes else 1)

    @property
    def flops(self) -> int:
        """Products of forward and gradient."""
        return self.T * (self.forward_step + self.backward_step) + self.contractions

    def kept_bytes(self, autodiff: bool = False) -> int:
        """What forward leaves for backward, parameters apart."""
        k = KEPT_BY_AUTODIFF[self.kind] if autodiff else 0 if self.remakes else KEPT[self.kind]
        ys = 0 if autodiff else self.H  # autodiff counts it among its k
        return NUMBER * self.T * self.b * (self.D + ys + k * self.H)

    @property
    def sum_bytes(self) -> int:
        """Of one all-reduce."""
        return NUMBER * self.parameters


class Convolution(NamedTuple):
    """One convolution and its gradient with respect to input, kernel and bias, on each of n devices."""

    B: int
    T: int
    K: int
    d: int
    C_in: int
    C_out: int
    n: int = 1

    @property
    def flops(self) -> int:
        """Of y, x̄ and w̄. What falls on padding counts as well: zeros are multiplied too."""
        return 3 * 2 * self.B * (self.T // self.n) * self.K * self.C_in * self.C_out

    @property
    def halo_bytes(self) -> int:
        """One way, to all neighbours together."""
        return NUMBER * self.B * (self.K - 1) * self.d * self.C_in if self.n > 1 else 0

    @property
    def sum_bytes(self) -> int:
        """Of the one all-reduce."""
        return NUMBER * (self.K * self.C_in + 1) * self.C_out


class Machine(NamedTuple):
    """An accelerator and its network. Seconds and bytes; where figures come from is said in docs/scale.md."""

    name: str
    peak: float  # F, operations a second
    memory: float  # β, bytes a second
    operation: float  # ℓ, seconds of one small operation in a chain of them
    link: Callable[[int], float]  # W(n), bytes a second at which a ring of n devices passes on
    latency: Callable[[int], float]  # λ(n), seconds
    hop: float  # to a neighbour, seconds; the slowest there is
    efficiency: float = 0.4  # e

    def all_reduce(self, n: int, size: int) -> float:
        """Seconds until n devices have the sum of `size` bytes."""
        return 0.0 if n == 1 else self.latency(n) + 2 * (n - 1) / n * size / self.link(n)

    def stage(self, flops: float, size: float) -> float:
        """Seconds for products and bytes that go side by side."""
        return max(flops / (self.efficiency * self.peak), size / self.memory)


# Operations of one step of an LSTM, forward and backward together, on a GPU.
OPERATIONS, OPERATIONS_BY_AUTODIFF = 12, 23


def of_nccl(n: int) -> float:
    """λ of the tree of NCCL's own model: up and down through the GPUs of a node and log2 of the nodes."""
    nodes = max(1, n // 8)
    within = 0.6e-6 * (1.8 if nodes > 1 else 1.0)
    return 6.8e-6 + 2 * ((min(n, 8) - 1) * within + log2(nodes) * 5.0e-6)


def of_torus(n: int) -> float:
    """λ of a reduce-scatter and an all-gather, axis by axis, 1 µs a hop: 2 x 4 chips in lines, 16 x 16 in rings."""
    hops = {8: 1 + 3, 256: 8 + 8}[n]
    return 2 * hops * 1e-6


H100 = Machine(
    "H100", 494.7e12, 3.35e12, 3.4e-6, link=lambda n: 450e9 if n <= 8 else 400e9, latency=of_nccl, hop=9.3e-6
)
V5E = Machine("TPU v5e", 197e12, 819e9, 1e-6, link=lambda n: 100e9 if n <= 8 else 200e9, latency=of_torus, hop=1e-6)
MACHINES = (H100, V5E)


def seconds(machine: Machine, r: Recurrence) -> float:
    """Forward and gradient by hand."""
    weights, row = NUMBER * r.parameters, NUMBER * r.b * (r.D + r.H + r.width)
    products = machine.stage(r.forward_step + r.backward_step, 2 * weights + 2 * row)
    step = max(OPERATIONS * machine.operation, products)
    return r.T * step + machine.stage(r.contractions, r.T * row) + machine.all_reduce(r.n, r.sum_bytes)


def seconds_by_autodiff(machine: Machine, r: Recurrence) -> float:
    """Of a scan: W̄ is read, added to and written in every step, and summed over devices there."""
    return r.T * (_step_by_autodiff(machine, r) + machine.all_reduce(r.n, r.sum_bytes))


def seconds_with_sums_behind(machine: Machine, r: Recurrence) -> float:
    """The same where a compiler moves the sums over devices behind the loop, and makes them one."""
    return r.T * _step_by_autodiff(machine, r) + machine.all_reduce(r.n, r.sum_bytes)


def _step_by_autodiff(machine: Machine, r: Recurrence) -> float:
    weights, row = NUMBER * r.parameters, NUMBER * r.b * (r.D + r.H + r.width)
    products = machine.stage(2 * r.forward_step + r.backward_step, 4 * weights + 3 * row)
    return max(OPERATIONS_BY_AUTODIFF * machine.operation, products)


def seconds_of_convolution(machine: Machine, c: Convolution) -> float:
    """x read for y and for w̄, ȳ for x̄ and for w̄, y and x̄ written; a halo there and back; the kernel's sum."""
    size = NUMBER * c.B * (c.T // c.n) * 3 * (c.C_in + c.C_out)
    halo = 0.0 if c.n == 1 else 2 * (machine.hop + c.halo_bytes / machine.link(c.n))
    return machine.stage(c.flops, size) + halo + machine.all_reduce(c.n, c.sum_bytes)


# --- The tables ---

LARGE = Recurrence("lstm", 512, 512, 1024, 1024)
SMALL = Recurrence("lstm", 2048, 512, 128, 128)
AUDIO = Convolution(4, 2**20, 9, 1, 256, 256)
DEVICES = (1, 8, 256)


def tables() -> Iterator[str]:
    """What docs/scale.md predicts, line by line as it stands there. Weak: an eighth of the batch for each device."""
    for title, batches in (("strong", dict.fromkeys(DEVICES, 1.0)), ("weak", {n: n / 8 for n in DEVICES})):
        yield f"| {title} scaling: B, T, D, H | n | by hand | autodiff, T sums | autodiff, one sum | efficiencies |"
        yield "|---|---|---|---|---|---|"
        for machine in MACHINES:
            for one in (LARGE, SMALL):
                alone = one._replace(B=round(batches[1] * one.B))
                for n, share in batches.items():
                    yield _recurrence(machine, alone, one._replace(B=round(share * one.B), n=n))
        yield ""
    yield "| B, T, K, C | n | time | of it halo and sum | efficiency |"
    yield "|---|---|---|---|---|"
    for machine in MACHINES:
        for n in DEVICES:
            yield _convolution(machine, AUDIO._replace(n=n))


WAYS: tuple[Callable[[Machine, Recurrence], float], ...] = (seconds, seconds_by_autodiff, seconds_with_sums_behind)


def _recurrence(machine: Machine, alone: Recurrence, r: Recurrence) -> str:
    """Efficiency: the time of one device for as much work each, over that of n."""
    times = [time(machine, r) for time in WAYS]
    ideal = [time(machine, alone) * r.B / (r.n * alone.B) for time in WAYS]
    cells = [f"{machine.name}: {r.B}, {r.T}, {r.D}, {r.H}", str(r.n), *map(_milliseconds, times)]
    return _row([*cells, ", ".join(_percent(i / t) for i, t in zip(ideal, times, strict=True))])


def _convolution(machine: Machine, c: Convolution) -> str:
    time, ideal = seconds_of_convolution(machine, c), seconds_of_convolution(machine, c._replace(n=1)) / c.n
    cells = [f"{machine.name}: {c.B}, {c.T}, {c.K}, {c.C_in}", str(c.n), *map(_milliseconds, (time, time - ideal))]
    return _row([*cells, _percent(ideal / time)])


def _milliseconds(time: float) -> str:
    """Three digits would promise more than the model knows."""
    return f"{float(f'{1e3 * time:.2g}'):g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(*tables(), sep="\n")
