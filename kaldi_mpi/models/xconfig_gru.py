"""xconfig's GRU layers that have a component for each of their parts.

With z the update gate, y = (1 - z) h + z y'. ``gru``, ``pgru`` and ``norm-pgru`` have a reset gate, ``opgru`` and
``norm-opgru`` an output gate in its place; all but ``gru`` project the memory.
"""

from __future__ import annotations

from collections.abc import Callable

from kaldi_mpi.models.xconfig_line import Layer, Line, Lines
from kaldi_mpi.models.xconfig_recurrent import Recurrence, per_element, projections, recurrence, repair


def gate_dropout(line: Line) -> str | None:
    """Options of the gates' dropout in the ``norm`` layers; None: there is none."""
    if "norm" not in line.kind.split("-"):
        return None
    proportion, per_frame = line.dropout(), line.options.flag("dropout-per-frame", True)
    if proportion is None:
        return None
    return f"dropout-proportion={proportion} dropout-per-frame={'true' if per_frame else 'false'}"


def gated(lines: Lines, gate: str, dropout: str | None, before: str) -> None:
    """The nodes of a gate after its affine; `dropout`: name of its component, `before`: of the node that it takes."""
    if dropout is None:
        lines.node(f"{gate}_t", lines.at(f"{gate}_t_pre"), gate)
    else:
        lines.node(before, lines.at(f"{gate}_t_pre"), gate)
        lines.node(f"{gate}_t", lines.at(before), dropout)


def _update(lines: Lines, memory: Recurrence, old: str) -> None:
    """The nodes of (1 - z) h + z `old`."""
    at = lines.at
    rest = f"Sum(Scale(-1.0, {at('z_t')}), Const(1.0, {memory.cell}))"
    lines.node("y1_t", f"Append({at('h_t')}, {rest})", "y1")
    lines.node("y2_t", f"Append({memory.past(at(old))}, {at('z_t')})", "y2")
    lines.node("y_t", f"Sum({at('y1_t')}, {at('y2_t')})", "y")


def _product(lines: Lines, name: str, dim: int) -> None:
    lines.component(name, "ElementwiseProduct", f"input-dim={2 * dim} output-dim={dim}")


def _reset_gated(line: Line) -> Layer:
    """``gru-layer``, ``pgru-layer``, ``norm-pgru-layer``."""
    (descriptor, input_dim), options = line.input(), line.options
    memory = recurrence(line, with_decay=False)
    cell, projected = memory.cell, line.kind != "gru-layer"
    rec, other = projections(line, cell) if projected else (cell, 0)
    affine, repairing = options.text("ng-affine-options", "max-change=0.75"), repair(line)
    per_element(line)  # Kaldi takes it and does nothing with it
    dropout = gate_dropout(line)
    lines = Lines(line.name)
    at = lines.at
    for name, dim in (("W_z.xs_z", cell), ("W_z.xs_r", rec), ("W_h.UW", cell)):
        lines.component(name, "NaturalGradientAffine", f"input-dim={input_dim + rec} output-dim={dim} {affine}")
    if dropout is not None:
        lines.component("dropout_z", "Dropout", f"dim={cell} {dropout}")
        lines.component("dropout_r", "Dropout", f"dim={rec} {dropout}")
    lines.component("z", "Sigmoid", f"dim={cell} {repairing}")
    lines.component("r", "Sigmoid", f"dim={rec} {repairing}")
    lines.component("h", "Tanh", f"dim={cell} {repairing}")
    for name, dim in (("h1", rec), ("y1", cell), ("y2", cell)):
        _product(lines, name, dim)
    lines.component("y", "NoOp", f"dim={cell}")
    past = memory.past(at("s_t"))
    for gate in "zr":
        lines.node(f"{gate}_t_pre", f"Append({descriptor}, {past})", f"W_z.xs_{gate}")
        gated(lines, gate, None if dropout is None else f"dropout_{gate}", f"{gate}_predrop_t")
    lines.node("h1_t", f"Append({at('r_t')}, {past})", "h1")
    lines.node("h_t_pre", f"Append({descriptor}, {at('h1_t')})", "W_h.UW")
    lines.node("h_t", at("h_t_pre"), "h")
    _update(lines, memory, "y_t" if projected else "s_t")
    if projected:
        return _projected(line, lines, memory, (rec, other), affine, "y_t")
    lines.component("s_r", "BackpropTruncation", f"dim={cell} {memory.truncation}")
    lines.node("s_t", at("y_t"), "s_r")
    return Layer(line.name, {"": (at("s_t"), cell)}, lines)


def _output_gated(line: Line) -> Layer:
    """``opgru-layer``, ``norm-opgru-layer``."""
    (descriptor, input_dim), options = line.input(), line.options
    memory = recurrence(line, with_decay=False)
    cell = memory.cell
    rec, other = projections(line, cell)
    affine = options.text("ng-affine-options", "max-change=0.75")
    if line.kind == "norm-opgru-layer":
        affine += line.l2()
    scales, repairing, dropout = per_element(line), repair(line), gate_dropout(line)
    lines = Lines(line.name)
    at = lines.at
    for gate in "zo":
        settings = f"input-dim={input_dim + rec} output-dim={cell} {affine}"
        lines.component(f"W_z.xs_{gate}", "NaturalGradientAffine", settings)
    lines.component("W_h.UW", "NaturalGradientAffine", f"input-dim={input_dim} output-dim={cell} {affine}")
    lines.component("W_h.UW_elementwise", "NaturalGradientPerElementScale", f"dim={cell} {scales}")
    for name in "zoh":
        lines.component(name, "Tanh" if name == "h" else "Sigmoid", f"dim={cell} {repairing}")
    for name in ("o1", "y1", "y2"):
        _product(lines, name, cell)
    lines.component("y", "NoOp", f"dim={cell}")
    if dropout is not None:
        lines.component("dropout", "Dropout", f"dim={cell} {dropout}")
    for gate in "zo":
        lines.node(f"{gate}_t_pre", f"Append({descriptor}, {memory.past(at('s_t'))})", f"W_z.xs_{gate}")
        gated(lines, gate, None if dropout is None else "dropout", f"{gate}_predrop_t")
    lines.node("h_t_pre", descriptor, "W_h.UW")
    lines.node("h_t_pre2", memory.past(at("y_t")), "W_h.UW_elementwise")
    lines.node("h_t", f"Sum({at('h_t_pre')}, {at('h_t_pre2')})", "h")
    _update(lines, memory, "y_t")
    lines.node("y_o_t", f"Append({at('o_t')}, {at('y_t')})", "o1")
    return _projected(line, lines, memory, (rec, other), affine, "y_o_t")


def _projected(line: Line, lines: Lines, memory: Recurrence, dims: tuple[int, int], affine: str, source: str) -> Layer:
    """The projection of `source`, the part of it that comes back, and in the ``norm`` layers their normalisation."""
    at, (rec, other) = lines.at, dims
    settings = f"input-dim={memory.cell} output-dim={rec + other} {affine}"
    lines.component("W_s.ys", "NaturalGradientAffine", settings)
    lines.component("s_r", "BackpropTruncation", f"dim={rec} {memory.truncation}")
    if "norm" not in line.kind.split("-"):
        lines.node("sn_t", at(source), "W_s.ys")
        lines.columns("s_t_preclip", "sn_t", 0, rec)
        lines.node("s_t", at("s_t_preclip"), "s_r")
        return Layer(line.name, {"": (at("sn_t"), rec + other)}, lines)
    lines.component("batchnorm", "BatchNorm", f"dim={rec + other} target-rms=1.0")
    lines.component("renorm", "Normalize", f"dim={rec} target-rms=1.0")
    plain, normed = "sn_nobatchnorm_t", "s_renorm_t" if line.kind == "norm-pgru-layer" else "s_t_preclip_renorm"
    lines.node(plain, at(source), "W_s.ys")
    if line.kind == "norm-pgru-layer":
        lines.columns("s_t_preclip", plain, 0, rec)
        lines.node("sn_t", at(plain), "batchnorm")
    else:
        lines.node("sn_t", at(plain), "batchnorm")
        lines.columns("s_t_preclip", plain, 0, rec)
    lines.node(normed, at("s_t_preclip"), "renorm")
    lines.node("s_t", at(normed), "s_r")
    return Layer(line.name, {"": (at("sn_t"), rec + other)}, lines)


LAYERS: dict[str, Callable[[Line], Layer]] = {
    **dict.fromkeys(("gru-layer", "pgru-layer", "norm-pgru-layer"), _reset_gated),
    **dict.fromkeys(("opgru-layer", "norm-opgru-layer"), _output_gated),
}
