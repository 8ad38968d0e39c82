"""Between nnet3 files and PyTorch: the same nodes, the same components, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.tokens import FloatArray
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.models.components import (
    Affine,
    BackpropTruncation,
    ComponentModule,
    FixedAffine,
    Linear,
    LogSoftmax,
    LstmNonlinearity,
    NaturalGradientAffine,
    NoOp,
    Normalize,
    RectifiedLinear,
    Sigmoid,
    Tanh,
)
from kaldi_mpi.models.config import Place, parse_config
from kaldi_mpi.models.model import AcousticModel
from kaldi_mpi.nnet3.am import AmNnet
from kaldi_mpi.nnet3.components import Nnet3Component, empty_statistics
from kaldi_mpi.nnet3.network import Nnet

Values = dict[str, Any]

_RATES = {
    "LearningRateFactor": "learning_rate_factor",
    "MaxChange": "max_change",
    "L2Regularize": "l2_regularize",
    "LearningRate": "learning_rate",
}
_TRUNCATION = {
    "Scale": "scale",
    "ClippingThreshold": "clipping_threshold",
    "ZeroingThreshold": "zeroing_threshold",
    "ZeroingInterval": "zeroing_interval",
    "RecurrenceInterval": "recurrence_interval",
}


def _tensor(values: Values, token: str, dims: int) -> Tensor:
    array: FloatArray = values.pop(token)
    if array.ndim != dims or not array.size:
        raise ValueError(f"<{token}> has shape {array.shape}")
    return torch.from_numpy(array.copy())


def _with_bias(values: Values) -> tuple[Tensor, Tensor]:
    linear, bias = _tensor(values, "LinearParams", 2), _tensor(values, "BiasParams", 1)
    if len(linear) != len(bias):
        raise ValueError(f"<BiasParams> has {len(bias)} elements for {len(linear)} rows of <LinearParams>")
    return linear, bias


def _lstm_nonlinearity(values: Values) -> LstmNonlinearity:
    if values.get("UseDropout"):
        raise ValueError("gate dropout is not supported yet")
    peepholes = _tensor(values, "Params", 2)
    if len(peepholes) != 3:
        raise ValueError(f"<Params> has {len(peepholes)} rows instead of 3")
    return LstmNonlinearity(peepholes)


def _truncation(values: Values) -> BackpropTruncation:
    settings = {name: values.pop(token) for token, name in _TRUNCATION.items()}
    return BackpropTruncation(values.pop("Dim"), **settings)


def _normalize(values: Values) -> Normalize:
    dim = values.pop("InputDim")
    if values.get("AddLogStddev") or values.get("BlockDim") not in (None, dim):
        raise ValueError("<AddLogStddev> and <BlockDim> are not supported yet")
    return Normalize(dim, values.pop("TargetRms"))


def _pointwise(cls: type[Any]) -> Callable[[Values], ComponentModule]:
    def make(values: Values) -> ComponentModule:
        module: ComponentModule = cls(values.pop("Dim"))
        return module

    return make


_TO_TORCH: dict[str, Callable[[Values], ComponentModule]] = {
    Affine.kind: lambda values: Affine(*_with_bias(values)),
    NaturalGradientAffine.kind: lambda values: NaturalGradientAffine(*_with_bias(values)),
    FixedAffine.kind: lambda values: FixedAffine(*_with_bias(values)),
    Linear.kind: lambda values: Linear(_tensor(values, "Params", 2)),
    LstmNonlinearity.kind: _lstm_nonlinearity,
    BackpropTruncation.kind: _truncation,
    Normalize.kind: _normalize,
    **{cls.kind: _pointwise(cls) for cls in (RectifiedLinear, Sigmoid, Tanh, LogSoftmax, NoOp)},
}


def to_torch(nnet: Nnet) -> AcousticModel:
    """The PyTorch network of an nnet3 file; all its components are kept, also those that no node uses.

    Raises:
        DataError: a component that is inconsistent or not supported yet, a network that is not consistent;
            names the file and the component or node.
    """
    modules: dict[str, ComponentModule] = {}
    for name, component in nnet.components.items():
        if component.type not in _TO_TORCH:
            raise DataError(f"component type {component.type} is not supported yet", file=nnet.source, key=name)
        values = dict(component.values)
        rates = {attribute: values.pop(token) for token, attribute in _RATES.items() if token in values}
        try:
            module = _TO_TORCH[component.type](values)
        except (ValueError, RuntimeError) as error:
            raise DataError(str(error), file=nnet.source, key=name) from error
        for attribute, value in rates.items():
            setattr(module, attribute, value)
        module.attributes = values
        modules[name] = module
    try:
        lines = ((line, Place(nnet.source)) for line in nnet.config_lines)
        return AcousticModel(parse_config(lines, nnet.source), modules)
    except ConfigError as error:
        raise DataError(str(error).removeprefix(f"{nnet.source}: "), file=nnet.source) from error


def _array(tensor: Tensor) -> FloatArray:
    return tensor.detach().to("cpu", torch.float32).numpy().copy()


def _lstm_values(module: LstmNonlinearity) -> Values:
    average = np.zeros((5, module.cell_dim), dtype=np.float32)
    statistics = {"ValueAvg": average, "DerivAvg": average, "SelfRepairProb": np.zeros(5, dtype=np.float32)}
    return {**statistics, **module.attributes, "Params": _array(module.peepholes)}


def _values(module: ComponentModule) -> Values:
    if isinstance(module, LstmNonlinearity):
        return _lstm_values(module)
    if isinstance(module, Affine | FixedAffine):
        return {"LinearParams": _array(module.linear), "BiasParams": _array(module.bias)}
    if isinstance(module, Linear):
        return {"Params": _array(module.linear)}
    if isinstance(module, Normalize):
        return {"InputDim": module.input_dim, "TargetRms": module.target_rms, "AddLogStddev": False}
    if isinstance(module, BackpropTruncation):
        settings = {token: getattr(module, name) for token, name in _TRUNCATION.items()}
        return {"Dim": module.input_dim, **settings}
    return {"Dim": module.input_dim}


_NONLINEAR_COUNTS = {"OderivCount": 0.0, "NumDimsSelfRepaired": 0.0, "NumDimsProcessed": 0.0}


def from_torch(model: AcousticModel) -> Nnet:
    """The nnet3 network of a PyTorch one, with the same nodes."""
    nnet = Nnet(model.config.node_lines(), source=model.config.source)
    for name, module in model.by_name.items():
        values = {**module.attributes, **_values(module)}
        if module.updatable:
            values.update({token: getattr(module, attribute) for token, attribute in _RATES.items()})
        if isinstance(module, RectifiedLinear | Sigmoid | Tanh | LogSoftmax):
            values = {"OderivRms": np.zeros(0, dtype=np.float32), **_NONLINEAR_COUNTS, **values}
        component = Nnet3Component(module.kind, values)
        empty_statistics(component)
        nnet.components[name] = component
    return nnet


def make_am(model: AcousticModel, transition_model: TransitionModel, priors: FloatArray | None = None) -> AmNnet:
    """An acoustic model for decoding.

    Args:
        priors: (num_pdfs,) of the outputs, positive; None: none.

    Raises:
        DataError: the network's outputs are not the transition model's pdfs.
    """
    if model.output_dim != transition_model.num_pdfs:
        raise DataError(
            f"the network has {model.output_dim} outputs and the transition model {transition_model.num_pdfs} pdfs",
            file=model.config.source,
        )
    values = np.zeros(0, dtype=np.float32) if priors is None else np.asarray(priors, dtype=np.float32)
    return AmNnet(transition_model, from_torch(model), values, model.left_context, model.right_context)
