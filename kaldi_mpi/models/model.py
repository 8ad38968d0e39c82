"""An acoustic model: any graph of nnet3's components, run over sets of frames."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.chance import Mode
from kaldi_mpi.models.components import ComponentModule, FixedAffine, Initializer, make_components, split_transform
from kaldi_mpi.models.computation import Compiler, Computation
from kaldi_mpi.models.config import ComponentNode, Config, InputNode, OutputNode
from kaldi_mpi.models.graph import IVECTOR, Graph
from kaldi_mpi.models.run import run_computation


@dataclass(frozen=True)
class Component:
    """A trained component, as the optimiser sees it.

    Attributes:
        name: the component's name in the model file.
        parameters: its tensors; `max_change` limits the Frobenius norm of the change of all together.
        max_change: per minibatch; 0: no limit.
        learning_rate_factor, l2_regularize: nnet3's.
    """

    name: str
    parameters: list[nn.Parameter]
    max_change: float
    learning_rate_factor: float
    l2_regularize: float


class AcousticModel(nn.Module):
    """A network of nnet3's components: frames, and maybe an i-vector a chunk, to one or several outputs.

    The same class holds networks that were built from an xconfig and that were read from a Kaldi file.

    Attributes:
        input_name: the input node of the frames; that of an i-vector is named ``ivector``, as in nnet3.
        input_dim, output_dim: columns of features and of the main output.
        ivector_dim: columns of the i-vector; 0: the network takes none.
        outputs: names of all outputs; main_output: ``output``, or the first where there is no such.
        objective: the main output's, ``linear`` or ``quadratic``.
        left_context, right_context: input frames needed beside an output frame, as nnet3-info prints them.
        config: the nodes.
        mode: what is switched on of that which only training does; `train` and `eval` set it as nnet3-train and
            nnet3-compute do.

    Raises:
        ConfigError: the network is not consistent or not of a supported kind.
    """

    def __init__(self, config: Config, components: Mapping[str, ComponentModule]) -> None:
        super().__init__()
        self.config = config
        self.names = list(components)
        self.components = nn.ModuleList(components.values())
        self.by_name: dict[str, ComponentModule] = dict(components)
        self.mode = Mode()
        for name, component in components.items():
            component.name, component.mode = name, self.mode
        self.graph = Graph(config, self.by_name)
        self.compiler = Compiler(self.graph)
        self.outputs = [node.name for node in config.nodes if isinstance(node, OutputNode)]
        all_inputs = [node for node in config.nodes if isinstance(node, InputNode)]
        inputs = [node for node in all_inputs if node.name != IVECTOR]
        if len(inputs) != 1 or not self.outputs:
            raise ConfigError(
                f"{config.source}: a network with one input of frames (and one named '{IVECTOR}', if wanted) and an "
                f"output is supported, this has inputs {[node.name for node in all_inputs]} "
                f"and outputs {self.outputs}"
            )
        self.input_name = inputs[0].name
        self.ivector_dim = sum(node.dim for node in all_inputs if node.name == IVECTOR)
        self.main_output = "output" if "output" in self.outputs else self.outputs[0]
        self.objective = next(
            n.objective for n in self.config.nodes if isinstance(n, OutputNode) and n.name == self.main_output
        )
        self.input_dim, self.output_dim = inputs[0].dim, self.graph.dim(self.main_output)
        self.left_context, self.right_context = self.graph.contexts(self.outputs)
        self._computation = functools.lru_cache(maxsize=256)(self._compile)

    def train(self, mode: bool = True) -> AcousticModel:
        """Work as nnet3-train does; with False as nnet3-compute does."""
        if mode:
            self.mode.train()
        else:
            self.mode.test()
        return super().train(mode)

    def forward(
        self,
        feats: Tensor,
        first: int,
        num_out: int,
        *,
        ivectors: Tensor | None = None,
        min_deriv_time: int | None = None,
        max_deriv_time: int | None = None,
    ) -> Tensor:
        """Frames 0 .. num_out - 1 of the main output for a minibatch.

        Args:
            feats: (B, T, input_dim) float32, `feats[:, 0]` is time `first`.
            ivectors: (B, ivector_dim) float32, where the network takes i-vectors.
            min_deriv_time, max_deriv_time: nnet3's ``optimization.*-deriv-time``: at frames outside this range
                (ends included) no node has a gradient, they are only computed forward.

        Returns:
            (B, num_out, output_dim).

        Raises:
            ValueError: the features do not reach as far as the output needs, or i-vectors are missing or have
                another shape, or the network takes none.
        """
        found = self.evaluate(
            feats, first, {self.main_output: range(num_out)}, ivectors=ivectors, deriv=(min_deriv_time, max_deriv_time)
        )
        return found[self.main_output]

    def evaluate(
        self,
        feats: Tensor,
        first: int,
        wanted: Mapping[str, Sequence[int]],
        *,
        ivectors: Tensor | None = None,
        deriv: tuple[int | None, int | None] = (None, None),
    ) -> dict[str, Tensor]:
        """Any frames of any outputs, in one pass: (B, len(times), columns) for each output of `wanted`.

        Args:
            wanted: output -> times, ascending.
            feats, first, ivectors, deriv: as in `forward`.
        """
        self._check_shapes(feats, ivectors)
        asked = tuple((name, tuple(times)) for name, times in wanted.items())
        computation = self._computation(asked, (first, first + feats.shape[1] - 1), deriv, None)
        values = run_computation(self.by_name, computation, self._inputs(feats, ivectors))
        return {name: values[name].transpose(0, 1) for name in wanted}

    def whole_utterance(self, feats: Tensor, ivector: Tensor | None = None) -> Tensor:
        """(T, input_dim), (ivector_dim,) -> (T, output_dim), without gradient.

        As Kaldi evaluates an utterance in one chunk: the first and last frame repeated for the model's own
        contexts, recurrences begun where their input can first be computed.

        Raises:
            ValueError: no frames.
        """
        if not len(feats):
            raise ValueError("an utterance without frames")
        left = feats[:1].expand(self.left_context, -1)
        right = feats[-1:].expand(self.right_context, -1)
        padded = torch.cat([left, feats, right]).unsqueeze(0)
        with torch.no_grad():
            ivectors = None if ivector is None else ivector.unsqueeze(0)
            output: Tensor = self(padded, -self.left_context, feats.shape[0], ivectors=ivectors)
            return output[0]

    def node_frames(self, component: str, rows: int, first: int, num_out: int) -> tuple[int, int]:
        """Which of the frames 0 .. num_out - 1 a component has, given `rows` input frames from time `first` on.

        Returns:
            the first and the last; the last is below the first where there is none.

        Raises:
            KeyError: there is no node with such a component.
        """
        node = self._node_of(component).name
        axis = self.graph.axis(min(first, 0), max(first + rows, num_out))
        frames = axis.mask(range(first, first + rows))
        given = dict.fromkeys((self.input_name,), frames) | {IVECTOR: axis.mask([0])}
        times = [t for t in axis.of(self.graph.computable(axis, given)[node]).tolist() if 0 <= t < num_out]
        return (times[0], times[-1]) if times else (0, -1)

    def node_input(
        self, component: str, feats: Tensor, first: int, num_out: int, ivectors: Tensor | None = None
    ) -> Tensor:
        """What a component gets at frames 0 .. num_out - 1: (B, num_out, its input_dim), without gradient.

        Raises:
            KeyError: there is no node with such a component.
            ValueError: the features do not reach as far as needed.
        """
        node = self._node_of(component).name
        self._check_shapes(feats, ivectors)
        asked = ((node, tuple(range(num_out))),)
        computation = self._computation(asked, (first, first + feats.shape[1] - 1), (None, None), node)
        with torch.no_grad():
            return run_computation(self.by_name, computation, self._inputs(feats, ivectors), node)[node].transpose(0, 1)

    def _node_of(self, component: str) -> ComponentNode:
        for node in self.config.nodes:
            if isinstance(node, ComponentNode) and node.component == component:
                return node
        raise KeyError(component)

    def set_transform(self, component: str, matrix: NDArray[Any]) -> None:
        """Put a transform into a fixed-affine component, in place of the one that the network was built with.

        The network is then what `build_model` makes with this transform, bit for bit: the parameters of the other
        components do not depend on it.

        Args:
            component: the name of a FixedAffineComponent (see `transform_files`).
            matrix: (out, in + 1), the offset in the last column; rounded to float32.

        Raises:
            KeyError: there is no such component.
            ConfigError: the matrix has another shape than the one before.
        """
        fixed = self.by_name[component]
        if not isinstance(fixed, FixedAffine):
            raise KeyError(component)
        wanted = (fixed.output_dim, fixed.input_dim + 1)
        if matrix.shape != wanted:
            raise ConfigError(
                f"{self.config.source}: the transform of {component} has shape {matrix.shape}, "
                f"the network needs {wanted}"
            )
        linear, bias = split_transform(matrix)
        fixed.linear.copy_(linear)
        fixed.bias.copy_(bias)

    def use_natural_gradient(self) -> None:
        """Precondition the gradients of all components that nnet3 trains so: not of those that are gradients."""
        for component in self.by_name.values():
            if not component.attributes.get("IsGradient", False):
                component.use_natural_gradient()

    def saturation(self) -> float:
        """The mean of all its sigmoids' and tanhs' `saturations`, from 0 to 1; 0 where nothing is stored.

        As ``steps/nnet3/get_saturation.pl`` has it of a model's file.
        """
        found = [value for module in self.by_name.values() for value in module.saturations()]
        return sum(found) / len(found) if found else 0.0

    def updatable_components(self) -> list[Component]:
        """The trained components, in the model file's order."""
        return [
            Component(
                name,
                list(module.parameters(recurse=False)),
                module.max_change,
                module.learning_rate_factor,
                module.l2_regularize,
            )
            for name, module in self.by_name.items()
            if module.updatable
        ]

    def _inputs(self, feats: Tensor, ivectors: Tensor | None) -> dict[str, Tensor]:
        inputs = {self.input_name: feats.transpose(0, 1)}
        if ivectors is not None:
            inputs[IVECTOR] = ivectors.unsqueeze(0)
        return inputs

    def _check_shapes(self, feats: Tensor, ivectors: Tensor | None) -> None:
        if feats.dim() != 3 or feats.shape[2] != self.input_dim:
            raise ValueError(f"features of shape {tuple(feats.shape)} for a network of input-dim {self.input_dim}")
        wanted = (feats.shape[0], self.ivector_dim) if self.ivector_dim else None
        if (None if ivectors is None else tuple(ivectors.shape)) != wanted:
            have = "none" if ivectors is None else f"{tuple(ivectors.shape)}"
            raise ValueError(f"i-vectors: {have} given, {wanted or 'none'} expected")

    def _compile(
        self,
        wanted: tuple[tuple[str, tuple[int, ...]], ...],
        given: tuple[int, int],
        deriv: tuple[int | None, int | None],
        only_input: str | None,
    ) -> Computation:
        return self.compiler.compile(dict(wanted), given, deriv, only_input)


def missing_transforms(config: Config) -> list[tuple[str, str]]:
    """(component, path) of the affine-transform-files that do not exist yet."""
    return [(name, path) for name, path in transform_files(config) if not Path(path).exists()]


def transform_files(config: Config) -> list[tuple[str, str]]:
    """(component, path) of all affine-transform-files but those whose matrix the config knows itself."""
    paths = ((spec.name, spec.options["matrix"]) for spec in config.components if "matrix" in spec.options)
    return [(name, path) for name, path in paths if path not in config.transforms]


def build_model(config: Config, *, seed: int, transforms: Mapping[str, NDArray[Any]] | None = None) -> AcousticModel:
    """A freshly initialised network, as nnet3-init makes it (with random numbers of its own).

    Args:
        config: for example from `parse_xconfig`.
        seed: the same seed gives the same parameters, bit for bit.
        transforms: path of an affine-transform-file, as the config has it -> its matrix (out, in + 1).

    Raises:
        ConfigError: a transform is missing, or the network is not consistent or not supported; what is wrong with
            components is told of all of them, a line each.
    """
    init = Initializer(seed, {**config.transforms, **(transforms or {})})
    return AcousticModel(config, make_components(config, init))
