"""One line of an xconfig while it is expanded, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kaldi_mpi.models.config import Options, Place
from kaldi_mpi.models.descriptor import DescriptorError, parse_descriptor


@dataclass
class Layer:
    """What later layers and the config get from a line.

    Attributes:
        outputs: name of an output ('' is the main one) -> (node name, dimension).
        lines: config lines.
        lda_input: of a fixed-affine-layer, the descriptor whose statistics Kaldi takes for its transform: the output
            of the network in init.config. None: there is no such network.
        output_delay: of an output, the label delay.
        lda_delay: of a fixed-affine-layer, by how much later its frames are than the labels of its statistics.
    """

    name: str
    outputs: Mapping[str, tuple[str, int]]
    lines: list[str]
    lda_input: str | None = None
    output_delay: int = 0
    lda_delay: int = 0


class Line:
    """One xconfig line while it is expanded."""

    def __init__(self, kind: str, name: str, options: Options, layers: Mapping[str, Layer], place: Place) -> None:
        self.kind, self.name, self.options, self.layers, self.place = kind, name, options, layers, place

    def input(self) -> tuple[str, int]:
        """The descriptor in node names, and its dimension."""
        text = self.options.text("input", "[-1]")
        try:
            tree = parse_descriptor(text, list(self.layers))
            return str(tree.replace(lambda name: self._find(name)[0])), tree.dim(lambda name: self._find(name)[1])
        except DescriptorError as error:
            raise self.place.error(str(error), "input") from error

    def _find(self, name: str) -> tuple[str, int]:
        layer, _, output = name.partition(".")
        if name in self.layers:
            layer, output = name, ""
        if layer not in self.layers:
            raise DescriptorError(f"there is no earlier layer named {layer}")
        outputs = self.layers[layer].outputs
        if output not in outputs:
            raise DescriptorError(f"layer {layer} has no output {name!r} that others can use")
        return outputs[output]

    def passed_on(self, keys: Mapping[str, str]) -> str:
        """Options that go to the component's line as they are; those whose value is '' are left out."""
        found = ((key, self.options.text(key, default)) for key, default in keys.items())
        return "".join(f" {key}={value}" for key, value in found if value != "")

    def affine(self, node: str, input_: tuple[str, int], dim: int, options: str) -> list[str]:
        component = (
            f"component name={node} type=NaturalGradientAffineComponent "
            f"input-dim={input_[1]} output-dim={dim} {options.strip()}"
        )
        return [component.strip(), f"component-node name={node} component={node} input={input_[0]}"]

    def component(self, node: str, type_: str, input_: str, options: str) -> list[str]:
        """The two lines of a component and of its node, which has its name."""
        made = f"component name={node} type={type_}Component {options.strip()}"
        return [made.strip(), f"component-node name={node} component={node} input={input_}"]
