"""An acoustic model: any feed-forward graph of components, with LSTM layers, run over ranges of frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.components import (
    Affine,
    BackpropTruncation,
    Call,
    ComponentModule,
    FixedAffine,
    Initializer,
    Linear,
    LstmNonlinearity,
    make_component,
    split_transform,
)
from kaldi_mpi.models.config import ComponentNode, Config, DimRangeNode, InputNode, OutputNode
from kaldi_mpi.models.descriptor import Descriptor
from kaldi_mpi.models.graph import IVECTOR, Graph, LstmGroup, Range, contexts, defined, intersection
from kaldi_mpi.models.lstm import LstmSettings, lstm


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


@dataclass
class _Value:
    """Frames of a node: `data` is (T, B, D), its first frame is at time `first`."""

    first: int
    data: Tensor

    def frames(self, first: int, last: int) -> Tensor:
        if first == self.first and last - first + 1 == self.data.shape[0]:
            return self.data
        return self.data[first - self.first : last - self.first + 1]


class AcousticModel(nn.Module):
    """A network of nnet3's components: frames, and maybe an i-vector a chunk, to one output named ``output``.

    The same class holds networks that were built from an xconfig and that were read from a Kaldi file.

    Attributes:
        input_name: the input node of the frames; that of an i-vector is named ``ivector``, as in nnet3.
        input_dim, output_dim: columns of features and of the output.
        ivector_dim: columns of the i-vector; 0: the network takes none.
        left_context, right_context: input frames needed beside an output frame, as nnet3-info prints them.
        config: the nodes.

    Raises:
        ConfigError: the network is not consistent or not of a supported kind.
    """

    def __init__(self, config: Config, components: Mapping[str, ComponentModule]) -> None:
        super().__init__()
        self.config = config
        self.names = list(components)
        self.components = nn.ModuleList(components.values())
        self.by_name: dict[str, ComponentModule] = dict(components)
        self.graph = Graph(config, self.by_name)
        outputs = [node for node in config.nodes if isinstance(node, OutputNode)]
        all_inputs = [node for node in config.nodes if isinstance(node, InputNode)]
        inputs = [node for node in all_inputs if node.name != IVECTOR]
        if len(inputs) != 1 or len(outputs) != 1 or outputs[0].name != "output":
            raise ConfigError(
                f"{config.source}: a network with one input of frames (and one named '{IVECTOR}', if wanted) and one "
                f"output named 'output' is supported, this has inputs {[node.name for node in all_inputs]} "
                f"and outputs {[node.name for node in outputs]}"
            )
        self.input_name = inputs[0].name
        self.ivector_dim = sum(node.dim for node in all_inputs if node.name == IVECTOR)
        self.input_dim, self.output_dim = inputs[0].dim, self.graph.dim("output")
        self.left_context, self.right_context = contexts(self.graph.computable)
        self._settings = {
            group.w_all: self._lstm_settings(group) for group in self.graph.units if isinstance(group, LstmGroup)
        }

    def _lstm_settings(self, group: LstmGroup) -> LstmSettings:
        truncation = self.by_name[group.truncation]
        assert isinstance(truncation, BackpropTruncation)
        return LstmSettings(
            delay=group.delay,
            scale=truncation.scale,
            clipping_threshold=truncation.clipping_threshold,
            zeroing_threshold=truncation.zeroing_threshold,
            zeroing_interval=truncation.zeroing_interval,
            recurrence_interval=truncation.recurrence_interval,
        )

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
        """Output frames 0 .. num_out - 1 of a minibatch.

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
        output = self._run("output", feats, first, num_out, ivectors, min_deriv_time, max_deriv_time)
        return output.transpose(0, 1)

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
        able = self.graph.computable((first, first + rows - 1))[self._node_of(component).name]
        return intersection(able, (0, num_out - 1))

    def node_input(
        self, component: str, feats: Tensor, first: int, num_out: int, ivectors: Tensor | None = None
    ) -> Tensor:
        """What a component gets at frames 0 .. num_out - 1: (B, num_out, its input_dim), without gradient.

        Raises:
            KeyError: there is no node with such a component.
            ValueError: the features do not reach as far as needed.
        """
        node = self._node_of(component).name
        with torch.no_grad():
            return self._run(node, feats, first, num_out, ivectors, None, None, True).transpose(0, 1)

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

    def _run(
        self,
        node: str,
        feats: Tensor,
        first: int,
        num_out: int,
        ivectors: Tensor | None,
        min_deriv_time: int | None,
        max_deriv_time: int | None,
        only_input: bool = False,
    ) -> Tensor:
        if feats.dim() != 3 or feats.shape[2] != self.input_dim:
            raise ValueError(f"features of shape {tuple(feats.shape)} for a network of input-dim {self.input_dim}")
        wanted = (feats.shape[0], self.ivector_dim) if self.ivector_dim else None
        if (None if ivectors is None else tuple(ivectors.shape)) != wanted:
            have = "none" if ivectors is None else f"{tuple(ivectors.shape)}"
            raise ValueError(f"i-vectors: {have} given, {wanted or 'none'} expected")
        given = (first, first + feats.shape[1] - 1)
        computable = self.graph.computable(given)
        frames = (0, num_out - 1)
        able = computable[node]
        if num_out > 0 and (able[0] > 0 or able[1] < num_out - 1):
            raise ValueError(
                f"input frames {given[0]} to {given[1]} allow frames {able[0]} to {able[1]} of {node}; "
                f"0 to {num_out - 1} are asked for"
            )
        needed = self.graph.needed(node, frames, computable)
        run = _Run(self, needed, (min_deriv_time, max_deriv_time), feats.shape[0], feats)
        run.values[self.input_name] = _Value(first, feats.transpose(0, 1))
        if ivectors is not None:
            run.values[IVECTOR] = _Value(0, ivectors.unsqueeze(0))
        for unit in self.graph.units:
            if isinstance(unit, LstmGroup):
                if unit.value in needed:
                    run.lstm(unit, self._settings[unit.w_all])
            elif unit.name == node and only_input:
                assert isinstance(unit, ComponentNode)
                return run.evaluate(unit.input, *frames)
            elif unit.name in needed and not isinstance(unit, InputNode):
                run.node(unit)
        return run.values[node].data


class _Run:
    """One pass over the graph."""

    def __init__(
        self,
        model: AcousticModel,
        needed: Mapping[str, Range],
        deriv: tuple[int | None, int | None],
        batch: int,
        like: Tensor,
    ) -> None:
        self.model, self.needed, self.deriv, self.batch, self.like = model, needed, deriv, batch, like
        self.values: dict[str, _Value] = {}

    def node(self, unit: ComponentNode | DimRangeNode | OutputNode) -> None:
        first, last = self.needed[unit.name]
        if isinstance(unit, DimRangeNode):
            data = self.columns(unit.name, first, last)
        else:
            data = self.evaluate(unit.input, first, last)
            if isinstance(unit, ComponentNode):
                data = self.component(self.model.by_name[unit.component], data, first)
        self.values[unit.name] = _Value(first, data)

    def columns(self, name: str, first: int, last: int) -> Tensor:
        """Frames of a node, or of the node whose columns it is."""
        if name in self.values:
            return self.values[name].frames(first, last)
        base, offset, dim = self.model.graph.resolve(name)
        group = self.model.graph.group_of.get(base)
        if group is not None and group.projection is None:
            offset -= self.model.by_name[group.nonlinearity].output_dim // 2  # only m is kept, not c
        data = self.values[base].frames(first, last)
        return data if dim == data.shape[2] else data[:, :, offset : offset + dim]

    def component(self, module: ComponentModule, x: Tensor, first: int) -> Tensor:
        """Apply a component; frames outside the range of derivatives without gradient."""
        frames = x.shape[0]
        if not torch.is_grad_enabled() or not (x.requires_grad or module.updatable):
            y: Tensor = module(x, Call.of(range(frames)))
            return y
        low, high = self.deriv
        begin = 0 if low is None else min(max(low - first, 0), frames)
        end = frames if high is None else max(min(high - first + 1, frames), begin)
        if begin == 0 and end == frames:
            y = module(x, Call.of(range(frames)))
            return y
        with torch.no_grad():
            before, after = module(x[:begin], Call.of(range(begin))), module(x[end:], Call.of(range(frames - end)))
        return torch.cat([before, module(x[begin:end], Call.of(range(end - begin))), after])

    def lstm(self, group: LstmGroup, settings: LstmSettings) -> None:
        first, last = self.needed[group.value]
        names = self.model.by_name
        w_all, nonlinearity = names[group.w_all], names[group.nonlinearity]
        assert isinstance(w_all, Affine | Linear) and isinstance(nonlinearity, LstmNonlinearity)
        projection = names[group.projection] if group.projection else None
        assert projection is None or isinstance(projection, Affine | Linear)
        bias = w_all.bias if isinstance(w_all, Affine) else w_all.linear.new_zeros(w_all.output_dim)
        data = lstm(
            self.evaluate(group.inputs, first, last),
            w_all.linear,
            bias,
            nonlinearity.peepholes,
            settings,
            first=first,
            min_deriv_time=self.deriv[0],
            max_deriv_time=self.deriv[1],
            w_rp=None if projection is None else projection.linear,
            b_rp=projection.bias if isinstance(projection, Affine) else None,
        )
        self.values[group.value] = _Value(first, data)

    def evaluate(self, descriptor: Descriptor, first: int, last: int) -> Tensor:
        """(last - first + 1, B, D): a descriptor's value."""
        op = descriptor.op
        if not op:
            return self.columns(descriptor.name, first, last)
        if op == "Append":
            return torch.cat([self.evaluate(part, first, last) for part in descriptor.children], dim=2)
        if op == "Offset":
            offset = descriptor.integer(1)
            return self.evaluate(descriptor.children[0], first + offset, last + offset)
        if op == "Scale":
            return self.evaluate(descriptor.children[0], first, last) * float(str(descriptor.arguments[0]))
        if op == "Const":
            shape = (last - first + 1, self.batch, descriptor.integer(1))
            return self.like.new_full(shape, float(str(descriptor.arguments[0])))
        if op == "ReplaceIndex":
            time = descriptor.integer(2)
            return self.evaluate(descriptor.children[0], time, time).expand(last - first + 1, -1, -1)
        if op == "IfDefined":
            return self.if_defined(descriptor.children[0], first, last)
        terms = [self.evaluate(part, first, last) for part in descriptor.children]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def if_defined(self, descriptor: Descriptor, first: int, last: int) -> Tensor:
        have = {name: (value.first, value.first + value.data.shape[0] - 1) for name, value in self.values.items()}
        for name in descriptor.names():
            have.setdefault(name, (1, 0))
        begin, end = intersection((first, last), defined(descriptor, have))
        dim = descriptor.dim(self.model.graph.dim)
        if begin > end:
            return self.like.new_zeros(last - first + 1, self.batch, dim)
        value = self.evaluate(descriptor, begin, end)
        return nn.functional.pad(value, (0, 0, 0, 0, begin - first, last - end))


def missing_transforms(config: Config) -> list[tuple[str, str]]:
    """(component, path) of the affine-transform-files that do not exist yet."""
    return [(name, path) for name, path in transform_files(config) if not Path(path).exists()]


def transform_files(config: Config) -> list[tuple[str, str]]:
    """(component, path) of all affine-transform-files."""
    return [(spec.name, spec.options["matrix"]) for spec in config.components if "matrix" in spec.options]


def build_model(config: Config, *, seed: int, transforms: Mapping[str, NDArray[Any]] | None = None) -> AcousticModel:
    """A freshly initialised network, as nnet3-init makes it (with random numbers of its own).

    Args:
        config: for example from `parse_xconfig`.
        seed: the same seed gives the same parameters, bit for bit.
        transforms: path of an affine-transform-file, as the config has it -> its matrix (out, in + 1).

    Raises:
        ConfigError: a transform is missing, or the network is not consistent or not supported.
    """
    init = Initializer(seed, transforms or {})
    return AcousticModel(config, {spec.name: make_component(spec, init) for spec in config.components})
