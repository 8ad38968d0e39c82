"""What all components have in common: columns, rates, natural gradient, statistics, the rows of a call.

Values are time-major: (frames, sequences, columns), float32 (or float64 in tests). Initialisation follows nnet3's.

`attributes` of a component holds what nnet3 stores beside the parameters and is only carried along, by nnet3's names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kaldi_mpi.models.chance import Mode
from kaldi_mpi.models.config import Options


class Initializer:
    """What initialisation draws from: one generator for the whole network, and the fixed transforms."""

    def __init__(self, seed: int, transforms: Mapping[str, NDArray[Any]]) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.transforms = transforms

    def normal(self, *shape: int, stddev: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * stddev


@dataclasses.dataclass(frozen=True)
class Call:
    """The rows of one call of a component.

    Attributes:
        in_times: of the rows of its input, ascending, without gaps in meaning: row i of the input is in_times[i].
        out_times: of the rows that are wanted, ascending.
        window: rows [begin, end) of the output that get derivatives (nnet3's min- and max-deriv-time); the derivative
            of the others is 0.
    """

    in_times: tuple[int, ...]
    out_times: tuple[int, ...]
    window: tuple[int, int]

    @classmethod
    def of(cls, times: Sequence[int]) -> Call:
        """A call of a component that works row by row, with derivatives everywhere."""
        return cls(tuple(times), tuple(times), (0, len(times)))


def saturations_of(derivatives: Tensor, count: Tensor, steepest: Sequence[float]) -> list[float]:
    """`ComponentModule.saturations` of sums of derivatives, (functions, columns), over `count` rows."""
    if not float(count) or not derivatives.numel():
        return []
    means = (derivatives.reshape(len(steepest), -1).double().mean(1) / count.double()).tolist()
    return [1.0 - mean / most for mean, most in zip(means, steepest, strict=True)]


class ComponentModule(nn.Module):
    """Base of all components.

    A *row-wise* component makes row t of its output of row t of its input alone; it is only called on the rows inside
    the window of derivatives while a gradient is taken (the others are computed apart, without gradient), so it need
    not look at `Call`. Any other component is called once on all rows and must give a derivative of 0 no special
    treatment: rows outside the window arrive with a derivative of 0, and it keeps them among its rows (as nnet3's
    TdnnComponent, TimeHeightConvolutionComponent and BatchNormComponent do).

    Attributes:
        kind: nnet3's type name.
        updatable: whether it has trained parameters.
        row_wise: see above.
        fills_gaps: it computes the rows between those that are asked for, too, where these are at equal steps but for
            some; their derivatives are 0, but a natural gradient has them among its rows.
        takes_nothing: its output does not depend on its input (masks, constants), which need not be computed.
        input_dim, output_dim: numbers of columns.
        name: in the model; set by the model.
        mode: shared by the components of a model; set by the model.
        attributes: see the module's description.
        natural_gradient: whether `gradient` is to be preconditioned (set by `use_natural_gradient`).
    """

    kind: ClassVar[str]
    updatable: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    fills_gaps: ClassVar[bool] = False
    takes_nothing: ClassVar[bool] = False

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.name = ""
        self.mode = Mode()
        self.attributes: dict[str, Any] = {}
        self.learning_rate_factor, self.max_change, self.l2_regularize = 1.0, 0.0, 0.0
        self.learning_rate = 0.001
        self.natural_gradient = False

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(rows, B, input_dim) -> (len(call.out_times), B, output_dim)."""
        raise NotImplementedError(f"{self.kind} only works inside a recurrent layer")

    # Times: of general components alone.

    def input_times(self, t: int) -> tuple[Sequence[int], Sequence[int]]:
        """Times of the input that the output at `t` cannot do without, and those that it takes where they are there."""
        return (t,), ()

    @property
    def modulus(self) -> int:
        """Shifting all times by this leaves `input_times` as they are (nnet3's modulus)."""
        return 1

    # Training.

    def use_natural_gradient(self) -> None:
        """From now on derivatives are kept in the backward pass, and `finish_gradient` preconditions them.

        Components that nnet3 trains by plain gradients do nothing here: autograd's ``.grad`` is theirs.
        """

    def finish_gradient(self) -> None:
        """After the backward pass of a minibatch: add the preconditioned gradient to the parameters' ``.grad``.

        Called once a minibatch, also where the component was never reached.
        """

    def freeze_natural_gradient(self, freeze: bool) -> None:
        """While frozen, preconditioners are applied but not updated (backstitch's first step)."""

    def training_state(self) -> dict[str, Any]:
        """What training keeps beside parameters and buffers: preconditioners, running sums; for a checkpoint."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Takes back what `training_state` gave."""

    @property
    def constrained(self) -> bool:
        """Whether `constrain` can ever change anything."""
        return bool(self.attributes.get("OrthonormalConstraint", 0.0))

    def constrain(self) -> bool:
        """After an update, in place on the parameters: what constraints the component has (orthonormal).

        Returns:
            whether anything was changed.
        """
        return False

    def statistics(self) -> list[Tensor]:
        """Sums and counts of activation statistics, to be changed in place: averaging models adds them."""
        return []

    def load_statistics(self, totals: Sequence[Tensor]) -> None:
        """Put `totals`, in the order and shapes of `statistics`, in their place."""
        for own, total in zip(self.statistics(), totals, strict=True):
            own.copy_(total)

    def zero_statistics(self) -> None:
        """Forget activation statistics, as nnet3-train does when it starts."""
        for total in self.statistics():
            total.zero_()

    def saturations(self) -> list[float]:
        """How flat each sigmoid and tanh in it is on average: 1 - its mean derivative / the largest that it can have.

        Of what is stored; [] where there is nothing (``steps/nnet3/get_saturation.pl``).
        """
        return []

    def update_statistics(self, factor: float | Tensor, momentum: float) -> None:
        """Of components whose statistics go through the update with the parameters, as in nnet3-train.

        Add `factor` times what has been collected, then keep `momentum` times of it.
        """

    def take_rates(self, options: Options) -> None:
        """Options of every component that is trained; none may be below 0."""

        def rate(key: str, default: float) -> float:
            value = options.number(key, default)
            if not value >= 0.0:
                raise options.place.error(f"must not be negative, is {value}", key)
            return value

        self.learning_rate = rate("learning-rate", 0.001)
        self.learning_rate_factor = rate("learning-rate-factor", 1.0)
        self.max_change = rate("max-change", 0.0)
        self.l2_regularize = rate("l2-regularize", 0.0)
