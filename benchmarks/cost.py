"""Cost model of a gradient on n devices: products, bytes, communication, and the predicted time.

    python -m benchmarks.cost      # the tables of docs/scale.md

Recurrence. T steps, batch size B sharded over n devices, b = B / n, input size D, hidden size H, G gates (rnn 1, gru 3,
lstm 4). A product of (b, M) and (M, N) takes 2 b M N operations. On each device

    forward, per step       u = x W_x, r = h W_h                2 b (D + H) G H
    backward, per step      δ W_hᵀ                              2 b H G H
    after the loop          W̄_x = xᵀ δ, W̄_h = hᵀ δ              2 T b (D + H) G H
    gradient of xs          δ W_xᵀ                              2 T b D G H           if required

    residuals               xs, ys and k arrays (T, b, H)       k = 0 (rnn), 4 (lstm, gru)

A GRU with D + H <= 128 stores no gates, k = 0, and recomputes them with one more forward product. Autodiff of a scan
computes the same products, those of W̄ also in the loop, and stores k = 3, 9, 12 (rnn, gru, lstm).

The P parameters are replicated, and their gradient is a sum over devices: one all-reduce of P numbers in the dtype of
the accumulator, 4 bytes each. Autodiff of a scan has one all-reduce per step, T in total.

Convolution. Time T sharded over n devices, batch size B, K taps, dilation d, stride 1, as many outputs as inputs:

    y, x̄ and w̄              each                                2 B (T / n) K C_in C_out
    halo                    rows of x                           B (K - 1) d C_in          numbers
                            rows of x̄, back                     the same
    kernel, bias            one all-reduce                      K C_in C_out + C_out      numbers

Time. A stage takes the maximum of the time of its products, at a fraction e of the peak F, and of its bytes, at the
memory bandwidth β. A step of a loop takes at least the time of its q sequential operations, ℓ each. An all-reduce over
a ring of n devices transfers 2 (n - 1) / n times its size at bandwidth W, with latency λ:

    t  =  T max(q ℓ, products / e F, bytes / β)                        the loops
          + max(products / e F, bytes / β)                             the products after the loops
          + λ(n) + 2 (n - 1) / n  4 P / W(n)                           the sum over devices

In autodiff of a scan, the second and the third term are in the loop, T times. Stages do not overlap.
"""

from collections.abc import Callable, Iterator
from math import log2
from typing import NamedTuple

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
RESIDUALS = {"rnn": 0, "gru": 4, "lstm": 4}
RESIDUALS_OF_AUTODIFF = {"rnn": 3, "gru": 9, "lstm": 12}
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
        """Batch size per device."""
        return self.B // self.n

    @property
    def width(self) -> int:
        """Size G H of all gates."""
        return GATES[self.kind] * self.H

    @property
    def parameters(self) -> int:
        """Number P of parameters; a GRU has two biases."""
        return (self.D + self.H + (2 if self.kind == "gru" else 1)) * self.width

    @property
    def recomputes_gates(self) -> bool:
        """True if the gates are recomputed instead of stored."""
        return self.kind == "gru" and self.D + self.H <= 128

    @property
    def forward_step(self) -> int:
        """Operations of both maps in one forward step."""
        return 2 * self.b * (self.D + self.H) * self.width

    @property
    def backward_step(self) -> int:
        """Operations of the only product in the backward loop."""
        return 2 * self.b * self.H * self.width

    @property
    def contractions(self) -> int:
        """Operations after the loop."""
        return self.T * self.forward_step * (2 if self.recomputes_gates else 1)

    @property
    def flops(self) -> int:
        """Operations of the forward pass and the gradient."""
        return self.T * (self.forward_step + self.backward_step) + self.contractions

    def residual_bytes(self, autodiff: bool = False) -> int:
        """Bytes of the residuals, without the parameters."""
        k = RESIDUALS_OF_AUTODIFF[self.kind] if autodiff else 0 if self.recomputes_gates else RESIDUALS[self.kind]
        ys = 0 if autodiff else self.H  # included in k for autodiff
        return NUMBER * self.T * self.b * (self.D + ys + k * self.H)

    @property
    def sum_bytes(self) -> int:
        """Bytes of one all-reduce."""
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
        """Operations of y, x̄ and w̄, including products with padding."""
        return 3 * 2 * self.B * (self.T // self.n) * self.K * self.C_in * self.C_out

    @property
    def halo_bytes(self) -> int:
        """Bytes of the halo in one direction, to all neighbours."""
        return NUMBER * self.B * (self.K - 1) * self.d * self.C_in if self.n > 1 else 0

    @property
    def sum_bytes(self) -> int:
        """Bytes of the only all-reduce."""
        return NUMBER * (self.K * self.C_in + 1) * self.C_out


class Machine(NamedTuple):
    """An accelerator and its network, in seconds and bytes. docs/scale.md lists the sources of the numbers."""

    name: str
    peak: float  # F, operations per second
    memory: float  # β, bytes per second
    operation: float  # ℓ, seconds per small operation in a sequence
    link: Callable[[int], float]  # W(n), bytes per second in a ring of n devices
    latency: Callable[[int], float]  # λ(n), seconds
    hop: float  # seconds to a neighbour, for the slowest link
    efficiency: float = 0.4  # e

    def all_reduce(self, n: int, size: int) -> float:
        """Seconds of an all-reduce of `size` bytes over n devices."""
        return 0.0 if n == 1 else self.latency(n) + 2 * (n - 1) / n * size / self.link(n)

    def stage(self, flops: float, size: float) -> float:
        """Seconds of a stage whose products and memory accesses overlap."""
        return max(flops / (self.efficiency * self.peak), size / self.memory)


# Operations of one step of an LSTM, forward and backward together, on a GPU.
OPERATIONS, OPERATIONS_BY_AUTODIFF = 12, 23


def of_nccl(n: int) -> float:
    """λ of a tree all-reduce in the model of NCCL: up and down through the GPUs of a node and log2 of the nodes."""
    nodes = max(1, n // 8)
    within = 0.6e-6 * (1.8 if nodes > 1 else 1.0)
    return 6.8e-6 + 2 * ((min(n, 8) - 1) * within + log2(nodes) * 5.0e-6)


def of_torus(n: int) -> float:
    """λ of a reduce-scatter and an all-gather, axis by axis, 1 µs per hop: 2 x 4 chips in lines, 16 x 16 in rings."""
    hops = {8: 1 + 3, 256: 8 + 8}[n]
    return 2 * hops * 1e-6


H100 = Machine(
    "H100", 494.7e12, 3.35e12, 3.4e-6, link=lambda n: 450e9 if n <= 8 else 400e9, latency=of_nccl, hop=9.3e-6
)
V5E = Machine("TPU v5e", 197e12, 819e9, 1e-6, link=lambda n: 100e9 if n <= 8 else 200e9, latency=of_torus, hop=1e-6)
MACHINES = (H100, V5E)


def seconds(machine: Machine, r: Recurrence) -> float:
    """Seconds of the forward pass and the gradient in jaxseq."""
    weights, row = NUMBER * r.parameters, NUMBER * r.b * (r.D + r.H + r.width)
    products = machine.stage(r.forward_step + r.backward_step, 2 * weights + 2 * row)
    step = max(OPERATIONS * machine.operation, products)
    return r.T * step + machine.stage(r.contractions, r.T * row) + machine.all_reduce(r.n, r.sum_bytes)


def seconds_by_autodiff(machine: Machine, r: Recurrence) -> float:
    """Seconds in autodiff of a scan: every step reads, updates and writes W̄, and sums it over devices."""
    return r.T * (_step_by_autodiff(machine, r) + machine.all_reduce(r.n, r.sum_bytes))


def seconds_with_one_sum(machine: Machine, r: Recurrence) -> float:
    """Seconds in autodiff of a scan if the compiler combines the sums over devices into one after the loop."""
    return r.T * _step_by_autodiff(machine, r) + machine.all_reduce(r.n, r.sum_bytes)


def _step_by_autodiff(machine: Machine, r: Recurrence) -> float:
    weights, row = NUMBER * r.parameters, NUMBER * r.b * (r.D + r.H + r.width)
    products = machine.stage(2 * r.forward_step + r.backward_step, 4 * weights + 3 * row)
    return max(OPERATIONS_BY_AUTODIFF * machine.operation, products)


def seconds_of_convolution(machine: Machine, c: Convolution) -> float:
    """Seconds of a convolution: read x for y and w̄, and ȳ for x̄ and w̄; write y and x̄; two halos; one all-reduce."""
    size = NUMBER * c.B * (c.T // c.n) * 3 * (c.C_in + c.C_out)
    halo = 0.0 if c.n == 1 else 2 * (machine.hop + c.halo_bytes / machine.link(c.n))
    return machine.stage(c.flops, size) + halo + machine.all_reduce(c.n, c.sum_bytes)


# --- Tables ---

LARGE = Recurrence("lstm", 512, 512, 1024, 1024)
SMALL = Recurrence("lstm", 2048, 512, 128, 128)
AUDIO = Convolution(4, 2**20, 9, 1, 256, 256)
DEVICES = (1, 8, 256)


def tables() -> Iterator[str]:
    """Yield the lines of the predictions in docs/scale.md. Weak scaling: an eighth of the batch per device."""
    for title, batches in (("strong", dict.fromkeys(DEVICES, 1.0)), ("weak", {n: n / 8 for n in DEVICES})):
        yield f"| {title} scaling: B, T, D, H | n | jaxseq | autodiff, T sums | autodiff, one sum | efficiencies |"
        yield "|---|---|---|---|---|---|"
        for machine in MACHINES:
            for one in (LARGE, SMALL):
                one_device = one._replace(B=round(batches[1] * one.B))
                for n, share in batches.items():
                    yield _recurrence(machine, one_device, one._replace(B=round(share * one.B), n=n))
        yield ""
    yield "| B, T, K, C | n | time | halo and sum | efficiency |"
    yield "|---|---|---|---|---|"
    for machine in MACHINES:
        for n in DEVICES:
            yield _convolution(machine, AUDIO._replace(n=n))


VARIANTS: tuple[Callable[[Machine, Recurrence], float], ...] = (seconds, seconds_by_autodiff, seconds_with_one_sum)


def _recurrence(machine: Machine, one_device: Recurrence, r: Recurrence) -> str:
    """Format a row. Efficiency is the time on one device with the same work per device, divided by the time on n."""
    times = [time(machine, r) for time in VARIANTS]
    ideal = [time(machine, one_device) * r.B / (r.n * one_device.B) for time in VARIANTS]
    cells = [f"{machine.name}: {r.B}, {r.T}, {r.D}, {r.H}", str(r.n), *map(_milliseconds, times)]
    return _row([*cells, ", ".join(_percent(i / t) for i, t in zip(ideal, times, strict=True))])


def _convolution(machine: Machine, c: Convolution) -> str:
    time, ideal = seconds_of_convolution(machine, c), seconds_of_convolution(machine, c._replace(n=1)) / c.n
    cells = [f"{machine.name}: {c.B}, {c.T}, {c.K}, {c.C_in}", str(c.n), *map(_milliseconds, (time, time - ideal))]
    return _row([*cells, _percent(ideal / time)])


def _milliseconds(time: float) -> str:
    """Format with two digits, the accuracy of the model."""
    return f"{float(f'{1e3 * time:.2g}'):g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(*tables(), sep="\n")
