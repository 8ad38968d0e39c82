"""xconfig's LSTM layers, in all of Kaldi's forms: gates apart or together, with projections, with a bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kaldi_mpi.models.xconfig_line import Layer, Line, Lines


@dataclass(frozen=True)
class Recurrence:
    """What the layers with a memory have in common.

    Attributes:
        cell: their width.
        delay: of the recurrence, in frames; never 0.
        truncation: options of BackpropTruncationComponent.
    """

    cell: int
    delay: int
    truncation: str

    def past(self, node: str) -> str:
        """A node as it was, where it was at all."""
        return f"IfDefined(Offset({node}, {self.delay}))"


def recurrence(line: Line, with_decay: bool = True) -> Recurrence:
    """Reads what they have in common; only LSTMs can let their memory decay."""
    options = line.options
    cell, delay = options.positive("cell-dim"), options.integer("delay", -1)
    if delay == 0:
        raise line.place.error("must not be 0", "delay")
    truncation = line.passed_on({"clipping-threshold": 30.0, "zeroing-threshold": 15.0, "zeroing-interval": 20})
    truncation += f" recurrence-interval={abs(delay)}"
    if with_decay:
        decay = options.number("decay-time", -1.0)
        scale = 1.0 if decay < 0 else 1.0 - abs(delay) / decay if decay > 0 else 0.0
        if scale <= 0:
            raise line.place.error("must be more than the absolute value of delay", "decay-time")
        truncation += f" scale={scale}"
    return Recurrence(cell, delay, truncation.strip())


def projections(line: Line, cell: int) -> tuple[int, int]:
    """Columns of the recurrent and of the other projection."""
    # Kaldi's defaults are cell-dim / 4, and for the second what the first is; 0 counts as not given.
    recurrent = line.options.integer("recurrent-projection-dim", -1)
    recurrent = recurrent if recurrent > 0 else cell // 4
    other = line.options.integer("non-recurrent-projection-dim", -1)
    other = other if other > 0 else recurrent
    if not recurrent:
        raise line.place.error("is missing, and cell-dim / 4 is 0", "recurrent-projection-dim")
    if recurrent + other > cell:
        raise line.place.error("the two projections together are wider than cell-dim", "recurrent-projection-dim")
    return recurrent, other


def per_element(line: Line) -> str:
    """``ng-per-element-scale-options``, with the scales' initial distribution where they say nothing of it."""
    text = line.options.text("ng-per-element-scale-options", "max-change=0.75")
    given = "param-mean" in text or "param-stddev" in text
    return text if given else f"{text} param-mean=0.0 param-stddev=1.0"


def repair(line: Line) -> str:
    """The self-repair of the nonlinearities; printed with ten digits, as Kaldi does."""
    return f"self-repair-scale={line.share('self-repair-scale-nonlinearity', 1e-05):.10f}"


def _lstm(line: Line) -> Layer:
    """``lstm-layer``, ``lstmp-layer``, ``lstmp-batchnorm-layer``: a component for each gate, with peepholes."""
    (descriptor, input_dim), options = line.input(), line.options
    memory = recurrence(line)
    cell, trunc = memory.cell, memory.truncation
    projected = line.kind != "lstm-layer"
    rec, other = projections(line, cell) if projected else (cell, 0)
    l2 = line.l2()
    affine = options.text("ng-affine-options", "max-change=0.75") + l2
    scales, repairing = per_element(line) + l2, repair(line)
    dropout, per_frame = None, False
    if projected:
        dropout, per_frame = line.dropout(), options.flag("dropout-per-frame", False)
    lines = Lines(line.name)
    at = lines.at
    for gate in "ifo":
        lines.component(
            f"W_{gate}.xr", "NaturalGradientAffine", f"input-dim={input_dim + rec} output-dim={cell} {affine}"
        )
        lines.component(f"w_{gate}.c", "NaturalGradientPerElementScale", f"dim={cell} {scales}")
    lines.component("W_c.xr", "NaturalGradientAffine", f"input-dim={input_dim + rec} output-dim={cell} {affine}")
    for name in "ifogh":
        lines.component(name, "Sigmoid" if name in "ifo" else "Tanh", f"dim={cell} {repairing}")
    if dropout is not None:
        settings = f"dim={cell} dropout-proportion={dropout} dropout-per-frame={'true' if per_frame else 'false'}"
        lines.component("dropout", "Dropout", settings)
    for name in ("c1", "c2", "m"):
        lines.component(name, "ElementwiseProduct", f"input-dim={2 * cell} output-dim={cell}")
    lines.component("c", "BackpropTruncation", f"dim={cell} {trunc}")
    lines.node("c_t", f"Sum({at('c1_t')}, {at('c2_t')})", "c")
    joint = f"Append({descriptor}, {memory.past(at('r_t'))})"
    for gate in "ifo":
        lines.node(f"{gate}1_t", joint, f"W_{gate}.xr")
        # The output gate sees the new cell, the others the old one.
        lines.node(f"{gate}2_t", at("c_t") if gate == "o" else memory.past(at("c_t")), f"w_{gate}.c")
        whole = f"Sum({at(f'{gate}1_t')}, {at(f'{gate}2_t')})"
        if dropout is None:
            lines.node(f"{gate}_t", whole, gate)
        else:
            lines.node(f"{gate}_t_predrop", whole, gate)
            lines.node(f"{gate}_t", at(f"{gate}_t_predrop"), "dropout")
    lines.node("h_t", at("c_t"), "h")
    lines.node("g1_t", joint, "W_c.xr")
    lines.node("g_t", at("g1_t"), "g")
    lines.node("c1_t", f"Append({at('f_t')}, {memory.past(at('c_t'))})", "c1")
    lines.node("c2_t", f"Append({at('i_t')}, {at('g_t')})", "c2")
    lines.node("m_t", f"Append({at('o_t')}, {at('h_t')})", "m")
    if not projected:
        lines.component("r", "BackpropTruncation", f"dim={cell} {trunc}")
        lines.node("r_t", at("m_t"), "r")
        return Layer(line.name, {"": (at("m_t"), cell)}, lines)
    lines.component("W_rp.m", "NaturalGradientAffine", f"input-dim={cell} output-dim={rec + other} {affine}")
    lines.component("r", "BackpropTruncation", f"dim={rec} {trunc}")
    lines.node("rp_t", at("m_t"), "W_rp.m")
    lines.columns("r_t_preclip", "rp_t", 0, rec)
    lines.node("r_t", at("r_t_preclip"), "r")
    last = at("rp_t")
    if line.kind == "lstmp-batchnorm-layer":
        last = lines.both("rp_t_batchnorm", "BatchNorm", last, f"dim={rec + other}")
    return Layer(line.name, {"": (last, rec + other)}, lines)


def _joint_options(line: Line) -> tuple[str, str]:
    """Options of the affine and of the nonlinear component of the layers that have one for all gates, without l2."""
    options = line.options
    affine = options.text("ng-affine-options", "max-change=1.5")
    return affine, options.text("lstm-nonlinearity-options", "max-change=0.75")


def _cell_nodes(lines: Lines, memory: Recurrence, gates: str) -> None:
    """The nodes of LstmNonlinearity and of its truncated output, in a layer without projection."""
    cell, at = memory.cell, lines.at
    lines.node("lstm_nonlin", f"Append({at(gates)}, {memory.past(at('c_trunc'))})")
    lines.columns("m", "lstm_nonlin", cell, cell)
    lines.node("cm_trunc", at("lstm_nonlin"))
    lines.columns("c_trunc", "cm_trunc", 0, cell)
    lines.columns("m_trunc", "cm_trunc", cell, cell)


def _fast_lstm(line: Line) -> Layer:
    descriptor, input_dim = line.input()
    memory = recurrence(line)
    cell, l2 = memory.cell, line.l2()
    affine, nonlinearity = (text + l2 for text in _joint_options(line))
    lines = Lines(line.name)
    lines.component("W_all", "NaturalGradientAffine", f"input-dim={input_dim + cell} output-dim={4 * cell} {affine}")
    lines.component("lstm_nonlin", "LstmNonlinearity", f"cell-dim={cell} {nonlinearity}")
    lines.component("cm_trunc", "BackpropTruncation", f"dim={2 * cell} {memory.truncation}")
    lines.node("W_all", f"Append({descriptor}, {memory.past(lines.at('m_trunc'))})")
    _cell_nodes(lines, memory, "W_all")
    last = lines.at("m")
    if line.kind == "fast-lstm-batchnorm-layer":
        last = lines.both("m_batchnorm", "BatchNorm", last, f"dim={cell}")
    return Layer(line.name, {"": (last, cell)}, lines)


def _lstmb(line: Line) -> Layer:
    """A fast LSTM whose matrix is a product of two, the first of them orthonormal, with batch-norm."""
    (descriptor, input_dim), options = line.input(), line.options
    memory = recurrence(line)
    cell, bottleneck = memory.cell, options.positive("bottleneck-dim")
    constraint, scale = options.number("orthonormal-constraint", 1.0), options.number("self-scale", 1.0)
    (affine, nonlinearity), l2 = _joint_options(line), line.l2()
    lines = Lines(line.name)
    at = lines.at
    lines.component(
        "W_all_a",
        "Linear",
        f"input-dim={input_dim + cell} orthonormal-constraint={constraint} output-dim={bottleneck} {affine}",
    )
    lines.component("W_all_b", "Linear", f"input-dim={bottleneck} output-dim={4 * cell} {affine}{l2}")
    lines.component("W_all_b_so", "ScaleAndOffset", f"dim={4 * cell} max-change=0.75")
    lines.component("lstm_nonlin", "LstmNonlinearity", f"cell-dim={cell} {nonlinearity}{l2}")
    lines.component("cm_trunc", "BackpropTruncation", f"dim={2 * cell} {memory.truncation}")
    lines.component("m_batchnorm", "BatchNorm", f"dim={cell}")
    scaled = f"Scale({scale}, {at('m_trunc')})"
    lines.node("W_all_a", f"Append({descriptor}, {memory.past(scaled)})")
    lines.node("W_all_b", at("W_all_a"))
    lines.node("W_all_b_so", at("W_all_b"))
    _cell_nodes(lines, memory, "W_all_b_so")
    lines.node("m_batchnorm", at("m"))
    return Layer(line.name, {"": (at("m_batchnorm"), cell)}, lines)


def _fast_lstmp(line: Line) -> Layer:
    descriptor, input_dim = line.input()
    memory = recurrence(line)
    cell = memory.cell
    rec, other = projections(line, cell)
    dropout, l2 = line.dropout(), line.l2()
    affine, nonlinearity = (text + l2 for text in _joint_options(line))
    lines = Lines(line.name)
    at = lines.at
    masked = "false" if dropout is None else "true"
    lines.component("W_all", "NaturalGradientAffine", f"input-dim={input_dim + rec} output-dim={4 * cell} {affine}")
    lines.component("lstm_nonlin", "LstmNonlinearity", f"cell-dim={cell} use-dropout={masked} {nonlinearity}")
    lines.component("cr_trunc", "BackpropTruncation", f"dim={cell + rec} {memory.truncation}")
    if dropout is not None:
        lines.component("dropout_mask", "DropoutMask", f"output-dim=3 dropout-proportion={dropout}")
    lines.component("W_rp", "NaturalGradientAffine", f"input-dim={cell} output-dim={rec + other} {affine}")
    lines.node("W_all", f"Append({descriptor}, {memory.past(at('r_trunc'))})")
    gates = f"{at('W_all')}, {memory.past(at('c_trunc'))}"
    if dropout is not None:
        lines.node("dropout_mask", at("dropout_mask"))  # an input that means nothing: the component takes none
        gates += f", {at('dropout_mask')}"
    lines.node("lstm_nonlin", f"Append({gates})")
    lines.columns("c", "lstm_nonlin", 0, cell)
    lines.columns("m", "lstm_nonlin", cell, cell)
    lines.node("rp", at("m"), "W_rp")
    lines.columns("r", "rp", 0, rec)
    lines.node("cr_trunc", f"Append({at('c')}, {at('r')})")
    lines.columns("c_trunc", "cr_trunc", 0, cell)
    lines.columns("r_trunc", "cr_trunc", cell, rec)
    last = at("rp")
    if line.kind == "fast-lstmp-batchnorm-layer":
        last = lines.both("rp_batchnorm", "BatchNorm", last, f"dim={rec + other}")
    return Layer(line.name, {"": (last, rec + other)}, lines)


LAYERS: dict[str, Callable[[Line], Layer]] = {
    **dict.fromkeys(("lstm-layer", "lstmp-layer", "lstmp-batchnorm-layer"), _lstm),
    **dict.fromkeys(("fast-lstm-layer", "fast-lstm-batchnorm-layer"), _fast_lstm),
    **dict.fromkeys(("fast-lstmp-layer", "fast-lstmp-batchnorm-layer"), _fast_lstmp),
    "lstmb-layer": _lstmb,
}
