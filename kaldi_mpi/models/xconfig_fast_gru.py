"""xconfig's GRU layers whose memory is one component: GruNonlinearity, or OutputGruNonlinearity with an output gate.

That component gives (h, c), of which the layers use the second half.
"""

from __future__ import annotations

from collections.abc import Callable

from kaldi_mpi.models.xconfig_gru import gate_dropout, gated
from kaldi_mpi.models.xconfig_line import Layer, Line, Lines
from kaldi_mpi.models.xconfig_recurrent import Recurrence, per_element, projections, recurrence, repair


def _fast(line: Line) -> Layer:
    (descriptor, input_dim), options = line.input(), line.options
    memory = recurrence(line, with_decay=False)
    cell, projected, opgru = memory.cell, line.kind != "fast-gru-layer", "opgru" in line.kind
    rec, other = projections(line, cell) if projected else (cell, 0)
    affine, repairing = options.text("ng-affine-options", "max-change=0.75"), repair(line)
    nonlinearity = options.text("gru-nonlinearity-options", "max-change=0.75")
    per_element(line)  # Kaldi takes it and does nothing with it
    dropout = gate_dropout(line)
    lines = Lines(line.name)
    at = lines.at
    # The reset gate is as wide as what it resets, the output gate as the memory.
    gates = {"z": cell, "o": cell} if opgru else {"z": cell, "r": rec}
    source = "xs" if projected else "xh"
    for gate, dim in gates.items():
        settings = f"input-dim={input_dim + rec} output-dim={dim} {affine}"
        lines.component(f"W_{gate}.{source}", "NaturalGradientAffine", settings)
    lines.component("W_hpart.x", "NaturalGradientAffine", f"input-dim={input_dim} output-dim={cell} {affine}")
    for gate, dim in gates.items():
        lines.component(gate, "Sigmoid", f"dim={dim} {repairing}")
    # With an output gate both are as wide and share a dropout component.
    drops = {gate: "dropout" if opgru else f"dropout_{gate}" for gate in gates} if dropout else {}
    for drop, dim in {drops[gate]: gates[gate] for gate in drops}.items():
        lines.component(drop, "Dropout", f"dim={dim} {dropout}")
    past = memory.past(at("s_t"))
    for gate in gates:
        lines.node(f"{gate}_t_pre", f"Append({descriptor}, {past})", f"W_{gate}.{source}")
        gated(lines, gate, drops.get(gate), f"{gate}_t_predrop")
    lines.node("hpart_t", descriptor, "W_hpart.x")
    if opgru:
        lines.component("gru_nonlin", "OutputGruNonlinearity", f"cell-dim={cell} {nonlinearity}")
        parts = [at("z_t"), at("hpart_t"), memory.past(at("c_t"))]
    else:
        width = f"cell-dim={cell} recurrent-dim={rec}" if projected else f"cell-dim={cell}"
        lines.component("gru_nonlin", "GruNonlinearity", f"{width} {nonlinearity}")
        parts = [at("z_t"), at("r_t"), at("hpart_t"), *([memory.past(at("c_t"))] if projected else []), past]
    lines.node("gru_nonlin_t", f"Append({', '.join(parts)})", "gru_nonlin")
    if not projected:
        lines.columns("y_t", "gru_nonlin_t", cell, cell)
        lines.component("s_r", "BackpropTruncation", f"dim={cell} {memory.truncation}")
        lines.node("s_t", at("y_t"), "s_r")
        return Layer(line.name, {"": (at("y_t"), cell)}, lines)
    lines.columns("c_t", "gru_nonlin_t", cell, cell)
    matrix, given = "W_y.c", "c_t"
    if opgru:
        lines.component("cdoto", "ElementwiseProduct", f"input-dim={2 * cell} output-dim={cell}")
        lines.node("cdoto", f"Append({at('c_t')}, {at('o_t')})")
        matrix, given = "W_y.cdoto", "cdoto"
    lines.component(matrix, "NaturalGradientAffine", f"input-dim={cell} output-dim={rec + other} {affine}")
    _feed_back(line, lines, memory, (rec, other), (matrix, given))
    return Layer(line.name, {"": (at("y_t"), rec + other)}, lines)


def _feed_back(
    line: Line, lines: Lines, memory: Recurrence, dims: tuple[int, int], projection: tuple[str, str]
) -> None:
    """The projected output, and the part of it that comes back."""
    at, (rec, other), (matrix, given) = lines.at, dims, projection
    norm = "norm" in line.kind.split("-")
    plain = "y_t_tmp" if norm else "y_t"
    back = "s_t_preclip" if line.kind == "fast-opgru-layer" else "s_t_pre"
    lines.node(plain, at(given), matrix)
    if norm:
        lines.component("renorm", "Normalize", f"dim={rec} target-rms=1.0")
    lines.component("s_r", "BackpropTruncation", f"dim={rec} {memory.truncation}")
    lines.columns(back, plain, 0, rec)
    if not norm:
        lines.node("s_t", at(back), "s_r")
        return
    lines.node("s_t_renorm", at(back), "renorm")
    lines.node("s_t", at("s_t_renorm"), "s_r")
    lines.component("batchnorm", "BatchNorm", f"dim={rec + other} target-rms=1.0")
    lines.node("y_t", at(plain), "batchnorm")


_KINDS = ("gru", "pgru", "norm-pgru", "opgru", "norm-opgru")

LAYERS: dict[str, Callable[[Line], Layer]] = dict.fromkeys((f"fast-{kind}-layer" for kind in _KINDS), _fast)
