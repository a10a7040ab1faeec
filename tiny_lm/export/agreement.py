"""Tolerances of an export: errors are measured against our model in float64, relative to the error of float32.

Two correct programs differ in float32, since they add in different orders. By how much depends on the model (the size
of its logits, its depth, its context) and on the processor, so no fixed tolerance fits all. Here the error of an export
relative to our model in float64 is compared with the error of our own float32 on the same text:

* the error of the log-probabilities, as a share of the logits' scale, by its root mean square and at its largest;
* the Kullback-Leibler divergence, which weights each error with the token's probability;
* the likeliest token at each position.

Each may be :data:`FACTOR` times that of our own float32 (the divergence, which grows with the square of the error, the
square of that). Differences below this noise cannot be detected in any program's output: epsilon, rotary base and shape
are verified by reading them back from the written files (:func:`check_settings`).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import SEQUENCES, Check, Engine, choose_sequences
from tiny_lm.model import Transformer

FACTOR = 16.0
"""Allowed error of a correct program, as a multiple of our own float32's error.

The error of a sum of n terms grows as sqrt(n) if rounding is random (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 4.2). A kernel that adds sequentially then has sqrt(256) = 16 times the error of one with
256 partial sums, which is the most that matrix kernels of today's processors use.
"""


class TableGELU(nn.Module):
    """GELU (tanh form) as llama.cpp computes it on a CPU: looked up by a float16, as a float16.

    Source: ``ggml_vec_gelu_f32`` in ggml/src/ggml-cpu/vec.h.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return GELU of ``x``, any shape; outside of (-10, 10) it is 0 or ``x``."""
        table = F.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


@dataclass(frozen=True)
class Agreement:
    """How much log-probabilities differ from the reference.

    Attributes:
        rms: root mean square of the differences, as a share of the logits' scale.
        largest: largest difference, as a share of it.
        divergence: mean Kullback-Leibler divergence from the reference, in nats per token.
        other_top: positions with another likeliest token, although the reference's leads by more than ``tie``.
        positions: number of positions.
    """

    rms: float
    largest: float
    divergence: float
    other_top: int
    positions: int


class Reference:
    """Our model in float64 on validation text, and the error of our own float32 there.

    Attributes:
        sequences: token ids of the validation sequences.
        scale: standard deviation of the logits over the vocabulary, root mean square over all positions.
        noise: agreement of our float32 with float64.
    """

    def __init__(self, source: ExportSource, *, table_gelu: bool = False) -> None:
        """Evaluate the model.

        Args:
            source: what is exported.
            table_gelu: compute GELU as llama.cpp does.
        """
        model = _with_table_gelu(source.model) if table_gelu else source.model
        self.sequences = choose_sequences(source, SEQUENCES)
        double = copy.deepcopy(model).double()
        self._exact = [_log_probabilities(double, sequence) for sequence in self.sequences]
        variances = torch.cat([exact.var(dim=-1, unbiased=False) for exact in self._exact])
        self.scale = max(math.sqrt(float(variances.mean())), torch.finfo(torch.float32).tiny)
        self.noise = self._compare([_log_probabilities(model, sequence) for sequence in self.sequences], tie=math.inf)

    @property
    def difference_limit(self) -> float:
        """The largest difference of a log-probability, in nats, that rounding can explain."""
        return self._limit(self.noise.largest) * self.scale

    def _limit(self, noise: float) -> float:
        """Return the allowed error relative to the logits' scale."""
        smallest = torch.finfo(torch.float32).eps * max(1.0, 1 / self.scale)  # one rounding of a log-probability
        return FACTOR * max(noise, smallest)

    @cached_property
    def _limits(self) -> tuple[float, float, float]:
        rms, largest = self._limit(self.noise.rms), self._limit(self.noise.largest)
        # Half the mean square of the errors, weighted with probabilities that may be high where errors are largest.
        return rms, largest, max(FACTOR**2 * self.noise.divergence, (self._limit(self.noise.rms) * self.scale) ** 2)

    def agreement(self, engine: Engine) -> Agreement:
        """Run ``engine`` on the sequences and compare."""
        found = [engine.log_probabilities(sequence) for sequence in self.sequences]
        return self._compare(found, tie=2 * self.difference_limit)

    def _compare(self, found: Sequence[Tensor], *, tie: float) -> Agreement:
        squares, largest, divergence, other_top, positions, count = 0.0, 0.0, 0.0, 0, 0, 0
        for exact, theirs in zip(self._exact, found, strict=True):
            theirs = F.log_softmax(theirs.double(), dim=-1)  # a sum of float32 probabilities is not quite 1
            difference = (theirs - exact).nan_to_num(nan=math.inf)
            squares += float(difference.square().sum())
            largest = max(largest, float(difference.abs().max()))
            divergence += float((exact.exp() * -difference).sum())
            behind = exact.max(dim=-1).values - exact.gather(1, theirs.argmax(dim=-1, keepdim=True))[:, 0]
            other_top += int((behind > tie).sum())
            positions, count = positions + len(exact), count + exact.numel()
        rms = math.sqrt(squares / count) if math.isfinite(squares) else math.inf
        divergence = max(divergence / positions, 0.0) if math.isfinite(divergence) else math.inf
        return Agreement(rms / self.scale, largest / self.scale, divergence, other_top, positions)

    def check(self, engine: Engine) -> list[Check]:
        """Return the checks of ``engine``'s log-probabilities."""
        return self.checks_of(self.agreement(engine))

    def checks_of(self, found: Agreement) -> list[Check]:
        """Return the checks of an agreement."""
        rms_limit, largest_limit, divergence_limit = self._limits
        where = f"{len(self.sequences)} sequences of {len(self.sequences[0])} tokens"
        return [
            Check(
                f"log-probabilities: {where}",
                found.largest * self.scale,
                f"error {found.rms:.1e}, largest {found.largest:.1e} of the logits' scale (float32 noise "
                f"{self.noise.rms:.1e}, {self.noise.largest:.1e})",
                f"{rms_limit:.1e}, {largest_limit:.1e}",
                found.rms <= rms_limit and found.largest <= largest_limit,
            ),
            Check(
                "KL divergence",
                found.divergence,
                f"{found.divergence:.1e} nats per token (float32 noise {self.noise.divergence:.1e})",
                f"{divergence_limit:.1e}",
                found.divergence <= divergence_limit,
            ),
            Check(
                "likeliest token",
                found.other_top,
                f"{found.positions - found.other_top} of {found.positions} equal or tied",
                "all equal",
                found.other_top == 0,
            ),
        ]


def _with_table_gelu(model: Transformer) -> Transformer:
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(getattr(module, "activation", None), nn.GELU):
            module.activation = TableGELU()
    return changed


@torch.no_grad()
def _log_probabilities(model: Transformer, sequence: Sequence[int]) -> Tensor:
    """Return [T, V] in the precision of the model."""
    return F.log_softmax(model(torch.tensor([list(sequence)]))[0], dim=-1)


def check_settings(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    """Compare the settings in a written file with those of the model.

    Args:
        expected: the model's settings by name: shape, epsilon, rotary base.
        found: the same, read back from the file. Floats may have been stored in float32.
    """
    wrong = [
        f"{name} is {found.get(name)}, not {value}"
        for name, value in expected.items()
        if not _equal(value, found.get(name))
    ]
    result = "; ".join(wrong) or f"{len(expected)} equal"
    return Check("settings read back", len(wrong), result, "all equal", not wrong)


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return torch.tensor(expected, dtype=torch.float32).item() == torch.tensor(found, dtype=torch.float32).item()
    return bool(expected == found)
