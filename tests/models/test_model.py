"""The executor of node graphs: frames, contexts, initialisation, gradients outside the derivative range."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models import (
    AcousticModel,
    Config,
    build_model,
    missing_transforms,
    parse_xconfig_text,
    transform_files,
)
from kaldi_mpi.models.config import Place, parse_config

LSTM = """
input dim=6 name=input
fixed-affine-layer name=lda delay=5 input=Append(-2,-1,0,1,2) affine-transform-file=conf/lda.mat
fast-lstm-layer name=lstm1 cell-dim=8 delay=-1 decay-time=20
fast-lstmp-layer name=lstm2 cell-dim=8 recurrent-projection-dim=3 non-recurrent-projection-dim=2 delay=-3
output-layer name=output dim=7 output-delay=5 max-change=1.2 param-stddev=0.3
"""
FEEDFORWARD = """
input dim=4 name=input
relu-renorm-layer name=a dim=6 input=Append(-1,0,2)
tanh-layer name=b dim=5 input=Append(-3,a@0,Scale(0.5, a@3))
sigmoid-layer name=s dim=5 input=Sum(b, IfDefined(b@-1))
output-layer name=output dim=3 include-log-softmax=false param-stddev=0.5 bias-stddev=0.5
"""


def model_of(text: str, seed: int = 1) -> AcousticModel:
    config = parse_xconfig_text(text)
    rng = np.random.default_rng(0)
    transforms = {path: rng.normal(size=(30, 31)) * 0.2 for _, path in transform_files(config)}
    return build_model(config, seed=seed, transforms=transforms)


def feats(batch: int, frames: int, dim: int) -> torch.Tensor:
    return torch.randn(batch, frames, dim, generator=torch.Generator().manual_seed(frames))


def test_contexts() -> None:
    lstm, forward = model_of(LSTM), model_of(FEEDFORWARD)
    assert (lstm.left_context, lstm.right_context) == (0, 7)
    assert (forward.left_context, forward.right_context) == (4, 5)
    assert (lstm.input_dim, lstm.output_dim) == (6, 7)


def test_log_softmax_is_normalised() -> None:
    y = model_of(LSTM)(feats(2, 20, 6), -5, 4)
    assert y.shape == (2, 4, 7)
    assert torch.allclose(y.exp().sum(-1), torch.ones(2, 4), atol=1e-5)


def test_chunks_equal_the_whole_where_they_have_the_same_past() -> None:
    model = model_of(LSTM)
    x = feats(1, 40, 6)
    whole = model.whole_utterance(x[0])
    assert whole.shape == (40, 7)
    chunk = model(x[:, :30], 0, 20)[0]
    assert torch.allclose(chunk, whole[:20], atol=1e-6)


def test_feed_forward_does_not_depend_on_the_chunk() -> None:
    model = model_of(FEEDFORWARD)
    x = feats(3, 60, 4)
    whole = model(x, -20, 30)
    # One more frame of past than the context: the sum's IfDefined term is then defined in both.
    part = model(x[:, 20 + 10 - 5 : 20 + 15 + 5], -5, 5)
    assert torch.allclose(part, whole[:, 10:15], atol=1e-6)


def test_if_defined_is_zero_where_it_is_not() -> None:
    text = "input dim=2 name=input\noutput name=output input=Append(input, IfDefined(input@-2), IfDefined(input@9))"
    x = feats(1, 4, 2)
    y = model_of(text)(x, 0, 4)
    assert torch.equal(y[0, :, :2], x[0])
    assert torch.equal(y[0, :, 2:4], torch.cat([torch.zeros(2, 2), x[0, :2]]))
    assert torch.equal(y[0, :, 4:], torch.zeros(4, 2))


def test_scale_const_and_offsets() -> None:
    text = "input dim=2 name=input\noutput name=output output-delay=1 input=Append(Scale(2.0, input), Const(0.5, 3))"
    x = feats(2, 4, 2)
    y = model_of(text)(x, 0, 3)
    assert torch.equal(y[:, :, :2], 2 * x[:, 1:4])
    assert torch.equal(y[:, :, 2:], torch.full((2, 3, 3), 0.5))


def test_whole_utterance_repeats_edges() -> None:
    model = model_of(FEEDFORWARD)
    x = feats(1, 9, 4)[0]
    padded = torch.cat([x[:1].expand(4, -1), x, x[-1:].expand(5, -1)])
    assert torch.equal(model.whole_utterance(x), model(padded[None], -4, 9)[0])
    assert model.whole_utterance(x[:1]).shape == (1, 3)
    with pytest.raises(ValueError, match="an utterance without frames"):
        model.whole_utterance(x[:0])


def test_copies_are_independent() -> None:
    model = model_of(LSTM)
    clone = copy.deepcopy(model)
    for parameter in clone.parameters():
        parameter.data.zero_()
    assert not any(p.any() for c in clone.updatable_components() for p in c.parameters)
    assert any(p.any() for c in model.updatable_components() for p in c.parameters)
    assert torch.equal(clone(feats(1, 20, 6), -5, 4), torch.full((1, 4, 7), 1 / 7).log())


def test_too_few_frames_is_an_error() -> None:
    model = model_of(FEEDFORWARD)
    with pytest.raises(ValueError, match=r"input frames 0 to 9 allow frames 4 to 4 of output; 0 to 4 are asked for"):
        model(feats(1, 10, 4), 0, 5)
    with pytest.raises(ValueError, match=r"features of shape \(1, 10, 5\) for a network of input-dim 4"):
        model(feats(1, 10, 5), 0, 5)


def test_an_empty_minibatch() -> None:
    model = model_of(LSTM)
    y = model(feats(0, 30, 6), -5, 4)
    assert y.shape == (0, 4, 7)
    y.sum().backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_node_input_is_the_spliced_input() -> None:
    x = feats(2, 12, 6)
    spliced = model_of(LSTM).node_input("lda", x, -4, 3)
    want = torch.cat([x[:, 4 + k : 7 + k] for k in range(-2, 3)], dim=2)
    assert torch.equal(spliced, want)
    with pytest.raises(KeyError):
        model_of(LSTM).node_input("ldb", x, -4, 3)


def test_updatable_components() -> None:
    found = [(c.name, c.max_change, len(c.parameters)) for c in model_of(LSTM).updatable_components()]
    assert found == [
        ("lstm1.W_all", 1.5, 2),
        ("lstm1.lstm_nonlin", 0.75, 1),
        ("lstm2.W_all", 1.5, 2),
        ("lstm2.lstm_nonlin", 0.75, 1),
        ("lstm2.W_rp", 1.5, 2),
        ("output.affine", 1.2, 2),
    ]
    options = "max-change=0.5 l2-regularize=0.01 learning-rate-factor=2.0"
    text = f"input dim=4 name=input\nrelu-layer name=a dim=900 {options}\noutput name=output"
    (component,) = model_of(text).updatable_components()
    assert (component.max_change, component.l2_regularize, component.learning_rate_factor) == (0.5, 0.01, 2.0)


def test_initialisation() -> None:
    text = "input dim=400 name=input\nfast-lstm-layer name=l cell-dim=100\noutput-layer name=output dim=50"
    model = model_of(text, seed=5)
    w, b = model.updatable_components()[0].parameters
    (peepholes,) = model.updatable_components()[1].parameters
    assert w.std().item() == pytest.approx(500**-0.5, rel=0.02) and abs(w.mean().item()) < 1e-3
    assert b.std().item() == pytest.approx(1.0, rel=0.1)
    assert peepholes.std().item() == pytest.approx(1.0, rel=0.15)
    assert not any(parameter.any() for parameter in model.updatable_components()[2].parameters)


def test_the_seed_decides() -> None:
    first, again, other = (list(model_of(LSTM, seed).parameters()) for seed in (1, 1, 2))
    torch.manual_seed(99)  # the global generator has no part in it
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_derivative_range_of_a_feed_forward_network() -> None:
    """With frames outside the range detached by hand, node by node."""
    text = "input dim=3 name=input\ntanh-layer name=a dim=4\n"
    model = model_of(text + "output-layer name=output dim=2 input=Append(-2,0,2) param-stddev=1")
    x = feats(2, 12, 3)
    model(x, -3, 6, min_deriv_time=-1, max_deriv_time=4).square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    (aw, ab), (ow, ob) = (c.parameters for c in model.updatable_components())

    def kept(value: torch.Tensor, first: int) -> torch.Tensor:
        rows = [row if -1 <= first + t <= 4 else row.detach() for t, row in enumerate(value.unbind(1))]
        return torch.stack(rows, 1)

    a = kept(torch.tanh(kept(x @ aw.T + ab, -3)), -3)
    spliced = torch.cat([a[:, 3 + k : 9 + k] for k in (-2, 0, 2)], 2)
    kept(torch.log_softmax(kept(spliced @ ow.T + ob, 0), 2), 0).square().sum().backward()
    for got, expected in zip(found, gradients(model), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    model.zero_grad()
    model(x, -3, 6).square().sum().backward()
    assert not torch.allclose(found[0], gradients(model)[0], atol=1e-5)


def frames_of(model: AcousticModel, given: tuple[int, int], wanted: Sequence[int]) -> dict[str, tuple[int, int]]:
    """First and last frame of each node that is computed for the output's frames `wanted`."""
    computation = model.compiler.compile({"output": wanted}, given)
    return {name: (times[0], times[-1]) for name, times in computation.times.items()}


def test_only_needed_nodes_and_frames() -> None:
    needed = frames_of(model_of(LSTM), (-20, 30), range(10))
    assert needed["lda"] == (-18, 14)
    assert needed["output.log-softmax"] == (5, 14)
    assert needed["lstm2.rp"] == needed["lstm1.lstm_nonlin"] == (-18, 14)
    backward = model_of(
        "input dim=4 name=input\nfast-lstm-layer name=l cell-dim=4 delay=2\noutput-layer name=output dim=2"
    )
    assert frames_of(backward, (-5, 20), range(10))["l.lstm_nonlin"] == (0, 20)


def test_frames_that_lie_apart() -> None:
    """A single output frame needs every third of a TDNN's frames, and no more are computed."""
    text = (
        "input dim=4 name=input\ntanh-layer name=a dim=5 input=Append(-3,0,3)\n"
        "tanh-layer name=b dim=5 input=Append(-3,0,3)\noutput-layer name=output dim=2"
    )
    model = model_of(text)
    assert (model.left_context, model.right_context) == (6, 6)
    times = model.compiler.compile({"output": [0]}, (-6, 6)).times
    assert times["b.tanh"] == (0,) and times["a.tanh"] == (-3, 0, 3)
    x = torch.randn(2, 16, 4)
    whole = model(x, -6, 4)
    for t in range(4):
        assert torch.allclose(model(x[:, t : t + 13], -6, 1)[:, 0], whole[:, t], atol=1e-6)
    every = model.evaluate(x, -6, {"output": [0, 3]})["output"]
    assert torch.allclose(every, whole[:, ::3], atol=1e-6)


def test_descriptors_over_time() -> None:
    """Round, Switch, Failover, Scale and Const against what they say, frame by frame."""
    lines = (
        "input-node name=input dim=2",
        "component name=a type=NoOpComponent dim=2",
        "component-node name=a component=a input=Sum(Scale(2.0, Round(input, 3)), Const(0.5, 2))",
        "component name=b type=NoOpComponent dim=2",
        "component-node name=b component=b input=Switch(a, Offset(input, 1))",
        "output-node name=output input=Append(Failover(Offset(b, 4), input), b)",
    )
    model = build_model(config_of(*lines), seed=0)
    x = torch.randn(2, 9, 2)

    def b(t: int) -> torch.Tensor:
        return 2 * x[:, t // 3 * 3] + 0.5 if t % 2 == 0 else x[:, t + 1]

    got = model(x, 0, 8)
    for t in range(8):
        there = (t + 4) // 3 * 3 <= 8 if t % 2 == 0 else t + 5 <= 8
        first = b(t + 4) if there else x[:, t]
        assert torch.equal(got[:, t], torch.cat([first, b(t)], dim=1)), t


def test_missing_transforms(tmp_path: Path) -> None:
    text = LSTM.replace("conf/lda.mat", f"{tmp_path}/lda.mat")
    config = parse_xconfig_text(text)
    assert missing_transforms(config) == [("lda", f"{tmp_path}/lda.mat")]
    with pytest.raises(ConfigError, match=r"network\.xconfig:3: matrix: transform .*lda\.mat has not been made yet"):
        build_model(config, seed=1)
    (tmp_path / "lda.mat").touch()
    assert missing_transforms(config) == []
    with pytest.raises(ConfigError, match="input of dimension 30 for a component of 20"):
        build_model(config, seed=1, transforms={f"{tmp_path}/lda.mat": np.zeros((30, 21))})


def test_a_transform_put_in_later_gives_the_model_built_with_it() -> None:
    config = parse_xconfig_text(LSTM)
    ((component, path),) = transform_files(config)
    stand_in = np.eye(30, 31, dtype=np.float32)
    matrix = np.random.default_rng(3).normal(size=(30, 31))
    model = build_model(config, seed=4, transforms={path: stand_in})
    wanted = build_model(config, seed=4, transforms={path: matrix})
    before = wanted.state_dict().keys(), [values.data_ptr() for values in model.state_dict().values()]
    model.set_transform(component, matrix)
    assert before == (model.state_dict().keys(), [values.data_ptr() for values in model.state_dict().values()])
    for name, values in model.state_dict().items():
        assert values.numpy().tobytes() == wanted.state_dict()[name].numpy().tobytes(), name
    assert not any(torch.equal(buffer, torch.from_numpy(stand_in[:, :-1])) for buffer in model.buffers())
    x = feats(2, 40, 6)
    assert model(x, -20, 5).detach().numpy().tobytes() == wanted(x, -20, 5).detach().numpy().tobytes()


def test_transforms_that_do_not_fit() -> None:
    model = model_of(LSTM)
    with pytest.raises(ConfigError, match=r"network\.xconfig: the transform of lda has shape \(30, 21\), .*\(30, 31\)"):
        model.set_transform("lda", np.zeros((30, 21)))
    for name in ("output.affine", "no-such"):
        with pytest.raises(KeyError, match=name):
            model.set_transform(name, np.zeros((30, 31)))


def config_of(*lines: str) -> Config:
    return parse_config(((line, Place("net.config", n)) for n, line in enumerate(lines, 1)), "net.config")


def test_bidirectional_and_interleaved_recurrences_see_what_they_should() -> None:
    """Which input frames an output depends on, by gradient."""
    for delay, frames in itertools.product((-1, 1, -3, 2), (14,)):
        text = f"input dim=2 name=input\nfast-lstm-layer name=l cell-dim=3 delay={delay}\n"
        text += "output-layer name=output dim=2 param-stddev=1"
        x = feats(1, frames, 2).requires_grad_()
        model_of(text)(x, 0, frames)[0, 6].sum().backward()  # log-softmax: not a constant sum
        model_of(text)(x, 0, frames)[0, 6, 0].backward()
        assert x.grad is not None
        touched = {t for t in range(frames) if x.grad[0, t].any()}
        assert touched == {t for t in range(frames) if (6 - t) % delay == 0 and (t - 6) * delay >= 0}


def test_a_network_must_have_one_output() -> None:
    with pytest.raises(
        ConfigError, match=r"net\.config: a network with one input of frames .* and an output is supported"
    ):
        build_model(config_of("input-node name=input dim=3", "input-node name=ivector dim=3"), seed=0)


def test_self_made_loops() -> None:
    lines = (
        "input-node name=input dim=3",
        "component name=a type=TanhComponent dim=3",
        "component-node name=a component=a input=Sum(input, IfDefined(Offset(a, {})))",
        "output-node name=output input=a",
    )
    x = torch.randn(2, 7, 3, requires_grad=True)
    for delay in (-1, -2, 3):
        model = build_model(config_of(*(line.format(delay) for line in lines)), seed=0)
        values: dict[int, torch.Tensor] = {}
        for t in range(7) if delay < 0 else range(6, -1, -1):
            values[t] = torch.tanh(x[:, t] + values[t + delay] if t + delay in values else x[:, t])
        expected = torch.stack([values[t] for t in range(7)], dim=1)
        assert torch.allclose(model(x, 0, 7), expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"node output: cannot be computed"):
        build_model(config_of(*(line.replace("IfDefined(Offset(a, {}))", "Offset(a, -1)") for line in lines)), seed=0)


@pytest.mark.parametrize(
    "layer",
    [
        "fast-lstm-layer name=l cell-dim=6 delay=-1 decay-time=20",
        "fast-lstm-layer name=l cell-dim=6 delay=3 zeroing-threshold=0.01 clipping-threshold=0.02 zeroing-interval=2",
        "fast-lstmp-layer name=l cell-dim=8 recurrent-projection-dim=2 non-recurrent-projection-dim=3 delay=-2",
    ],
)
def test_step_by_step_is_the_fused_layer(layer: str) -> None:
    """Values and gradients of the general recurrence, and of the one operation for LSTM layers."""
    text = f"input dim=3 name=input\n{layer}\noutput-layer name=output dim=4 param-stddev=0.3"
    fused, general = model_of(text).double(), model_of(text).double()
    general.compiler.groups = dict.fromkeys(general.compiler.groups)
    assert any(fused.compiler.groups.values())
    x = torch.randn(3, 12, 3, dtype=torch.float64)
    found = []
    for model in (fused, general):
        model.train()
        output = model(x, -2, 8, min_deriv_time=-1, max_deriv_time=8)
        output.square().sum().backward()
        found.append([output, *gradients(model)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_the_cell_can_be_used_outside() -> None:
    """Then the layer is computed step by step, and gives the same cell as the nonlinearity of the fused one sees."""
    config = parse_xconfig_text(
        "input dim=3 name=input\nfast-lstm-layer name=l cell-dim=3\noutput-layer name=output dim=2"
    )
    lines = [line.replace("input=l.m", "input=l.c_trunc") for line in config.node_lines()]
    specs = [
        f"component name={s.name} type={s.type} " + " ".join(f"{k}={v}" for k, v in s.options.items())
        for s in config.components
    ]
    model, plain = build_model(config_of(*specs, *lines), seed=0), build_model(config, seed=0)
    assert not any(model.compiler.groups.values()) and any(plain.compiler.groups.values())
    x = torch.randn(2, 5, 3)
    cell, m = model.node_input("output.affine", x, 0, 5), plain.node_input("output.affine", x, 0, 5)
    # m = o tanh(c) with 0 < o < 1.
    assert (m.sign() == cell.sign()).all() and (m.abs() <= torch.tanh(cell).abs() + 1e-6).all()
