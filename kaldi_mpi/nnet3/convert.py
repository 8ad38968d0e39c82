"""Between nnet3 files and PyTorch: the same nodes, the same components, the same bits."""

from __future__ import annotations

import numpy as np

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.tokens import FloatArray
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.models.components import ComponentModule
from kaldi_mpi.models.config import Place, parse_config
from kaldi_mpi.models.model import AcousticModel
from kaldi_mpi.nnet3.am import AmNnet
from kaldi_mpi.nnet3.components import KINDS, Nnet3Component, empty_statistics
from kaldi_mpi.nnet3.network import Nnet

_RATES = {
    "LearningRateFactor": "learning_rate_factor",
    "MaxChange": "max_change",
    "L2Regularize": "l2_regularize",
    "LearningRate": "learning_rate",
}


def to_torch(nnet: Nnet) -> AcousticModel:
    """The PyTorch network of an nnet3 file; all its components are kept, also those that no node uses.

    Raises:
        DataError: a component that is inconsistent or not supported yet, a network that is not consistent;
            names the file and the component or node.
    """
    modules: dict[str, ComponentModule] = {}
    for name, component in nnet.components.items():
        if component.type not in KINDS:
            raise DataError(f"component type {component.type} is not supported yet", file=nnet.source, key=name)
        values = dict(component.values)
        rates = {attribute: values.pop(token) for token, attribute in _RATES.items() if token in values}
        try:
            module = KINDS[component.type].to_torch(values)
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


def from_torch(model: AcousticModel) -> Nnet:
    """The nnet3 network of a PyTorch one, with the same nodes."""
    nnet = Nnet(model.config.node_lines(), source=model.config.source)
    for name, module in model.by_name.items():
        values = {**module.attributes, **KINDS[module.kind].to_file(module)}
        if module.updatable:
            values.update({token: getattr(module, attribute) for token, attribute in _RATES.items()})
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
