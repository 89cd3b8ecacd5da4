"""Analytic cost of an operation: what a perfect implementation computes and moves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as two.
        bytes: Bytes read and written in main memory if every input is read and every output written once.
        state: Elements of the state that causal decoding keeps, over all batches and heads.
    """

    flops: float
    bytes: float
    state: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.state + other.state)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.flops * factor, self.bytes * factor, self.state * factor)

    __rmul__ = __mul__

    def time_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Roofline time: the larger of compute time and memory time, in seconds."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)
