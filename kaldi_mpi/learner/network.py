"""The recipe's network: from its xconfig to a model whose transforms are estimated from the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.tokens import read_matrix, read_vector, write_matrix
from kaldi_mpi.learner.alignment_counts import PRIOR_SCALE_FILE
from kaldi_mpi.learner.chain_objective import XENT
from kaldi_mpi.learner.dataset import Context, Dataset
from kaldi_mpi.learner.validate import Pass, lda_statistics
from kaldi_mpi.loader import Examples
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel, Config, build_model, missing_transforms, parse_xconfig, transform_files
from kaldi_mpi.models.components import BatchNorm, FixedScale, NoOp
from kaldi_mpi.models.components.dropout import GeneralDropout, SpecAugmentTimeMask
from kaldi_mpi.models.config import ComponentNode, DimRangeNode, InputNode, OutputNode, read_config
from kaldi_mpi.nnet3 import read_nnet, to_torch
from kaldi_mpi.transport.world import World

# What may stand between the network's input and a transform that is estimated: it has nothing that is trained.
_BEFORE_TRANSFORMS = (GeneralDropout.kind, SpecAugmentTimeMask.kind, BatchNorm.kind, NoOp.kind)


class Network:
    """The model that an xconfig, a final.config that Kaldi made of one, or a model file describes.

    It is built once, on the CPU.

    Attributes:
        model: its transforms that no file has yet (``lda.mat``) are stand-ins until `estimate_transforms`.
        missing: these: (component, path).
        transforms: the files of all that there are, or will be.
        scaled: components that take ``presoftmax_prior_scale.vec``; 1 until `scale_by_priors`.

    Args:
        xconfig: the file.
        seed: of the parameters at the start.
        world: rank 0 says for all which transforms there are.
        input_model: a model file (.raw or .mdl) that is trained further in place of the xconfig's; or None.

    Raises:
        ConfigError: the xconfig is malformed.
        DataError: a transform or the input model cannot be read.
    """

    def __init__(self, xconfig: str, seed: int, world: World, input_model: str | None = None) -> None:
        self._source = xconfig if input_model is None else input_model
        self.missing: list[tuple[str, str]] = []
        self.transforms: list[str] = []
        self.scaled: list[str] = []
        if input_model is not None:
            self.model: AcousticModel = to_torch(read_nnet(input_model))
            return
        config = read_config(xconfig) if xconfig.endswith(".config") else parse_xconfig(xconfig)
        self.missing = world.broadcast(missing_transforms(config))
        self.transforms = sorted({path for _, path in transform_files(config)})
        transforms = {
            path: stand_in(config, component) if (component, path) in self.missing else read_matrix(path)
            for component, path in transform_files(config)
        }
        vectors = {spec.name: spec.options["scales"] for spec in config.components if "scales" in spec.options}
        self.scaled = [name for name, path in vectors.items() if Path(path).name == PRIOR_SCALE_FILE]
        for name, path in vectors.items():
            if name in self.scaled:
                transforms[path] = np.ones((1, _width_of(config, name)), np.float32)
            else:
                transforms[path] = read_vector(path)
        self.model = build_model(config, seed=seed, transforms=transforms)

    @property
    def context(self) -> Context:
        """Rows that the network needs beside a labelled frame."""
        return Context(self.model.left_context, self.model.right_context)

    def check_output(self, num_pdfs: int | None, xent: bool = False) -> None:
        """Raises ConfigError if the output has not the tree's pdf-ids, or is not linear; None: there is no tree.

        Args:
            xent: whether ``output-xent`` is to be there, too, of the same size.
        """
        model = self.model
        if xent and XENT not in model.outputs:
            raise ConfigError(f"{self._source}: it has no {XENT}, which --chain.xent-regularize trains (0 does not)")
        if xent and model.graph.dim(XENT) != num_pdfs:
            raise ConfigError(
                f"{self._source}: {XENT} has dim={model.graph.dim(XENT)}, but the tree has {num_pdfs} pdf-ids"
            )
        node = next(n for n in model.config.nodes if n.name == model.main_output)
        if num_pdfs is not None and isinstance(node, OutputNode) and node.objective != "linear":
            raise ConfigError(
                f"{self._source}: {node.name} has objective={node.objective}; an acoustic model's is linear, of "
                "log-probabilities (others: train_raw_dnn.py, train_raw_rnn.py)"
            )
        if num_pdfs is not None and self.model.output_dim != num_pdfs:
            raise ConfigError(
                f"{self._source}: the output has dim={self.model.output_dim}, but the tree has {num_pdfs} pdf-ids"
            )

    def check_input(self, feat_dim: int, ivector_dim: int, ivectors_can_be_given: bool) -> None:
        """Raises ConfigError if the inputs do not have the dimensions of the data.

        Args:
            ivectors_can_be_given: whether an option that was not given would bring i-vectors.
        """
        model = self.model
        if model.input_dim != feat_dim:
            raise ConfigError(f"{self._source}: the input has dim={model.input_dim}, but the features have {feat_dim}")
        if model.ivector_dim != ivector_dim:
            have = f"i-vectors of {ivector_dim}" if ivector_dim else "none"
            wanted = f"an i-vector of dim={model.ivector_dim}" if model.ivector_dim else "no i-vector"
            hint = " (--feat.online-ivector-dir gives them)" if ivectors_can_be_given else ""
            raise ConfigError(f"{self._source}: the network takes {wanted}, but the data have {have}{hint}")

    def check_data(self, dataset: Dataset) -> None:
        """Raises ConfigError if the network does not fit the data, or examples do not fit the tree."""
        options, train = dataset.options, dataset.train
        self.check_input(
            train.feat_dim, train.ivector_dim, options.egs_dir is None and options.online_ivector_dir is None
        )
        num_pdfs = self.model.output_dim  # the tree's, where there is one: `check_output`
        if isinstance(train, Examples) and train.num_pdfs != num_pdfs:
            raise ConfigError(
                f"the examples in {options.egs_dir} have {train.num_pdfs} pdf-ids, but the tree has {num_pdfs}"
                if options.ali_dir
                else f"the examples in {options.egs_dir} have {train.num_pdfs} classes, and the output dim={num_pdfs}"
            )

    def scale_by_priors(self, path: Path) -> None:
        """Put ``presoftmax_prior_scale.vec`` into the components that take it.

        Raises:
            DataError: it cannot be read, or has another size.
        """
        for name in self.scaled:
            component = self.model.by_name[name]
            scales = read_vector(path)
            if not isinstance(component, FixedScale) or len(scales) != component.input_dim:
                raise DataError(f"{len(scales)} numbers, and {name} has {component.input_dim} columns", file=str(path))
            component.scales.copy_(torch.from_numpy(np.asarray(scales, np.float32)))

    def estimate_transforms(self, dataset: Dataset, world: World, max_chunks: int) -> None:
        """Estimate the missing transforms, on all learners together, over about `max_chunks` chunks.

        They are written to the paths that the xconfig names, where a later run finds them again.
        """
        how = Pass(dataset, world, torch.device("cpu"))
        for component, path in self.missing:
            stats = lda_statistics(self.model, component, dataset.train, how, max_chunks, dataset.options.seed)
            if world.rank == 0:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_matrix(path, stats.estimate())
                logger.info("estimated %s from %d frames", path, stats.counts.sum())
            world.barrier()
        for component, path in self.missing:
            self.model.set_transform(component, read_matrix(path))
        self.missing = []


def _width_of(config: Config, component: str) -> int:
    """Columns of what a component gets, which is the output of an affine one."""
    outputs = {spec.name: int(spec.options.get("output-dim", 0)) for spec in config.components}
    of_nodes = {node.name: outputs[node.component] for node in config.nodes if isinstance(node, ComponentNode)}
    return _node_of(config, component).input.dim(of_nodes.__getitem__)


def _node_of(config: Config, component: str) -> ComponentNode:
    return next(n for n in config.nodes if isinstance(n, ComponentNode) and n.component == component)


def stand_in(config: Config, component: str) -> NDArray[np.float32]:
    """An identity of the right size for a transform that is not known yet, (dim, dim + 1)."""
    dims = {node.name: node.dim for node in config.nodes if isinstance(node, InputNode)}
    # Layers without anything trained may lie in between (spec-augment-layer, idct-layer).
    specs = {spec.name: spec for spec in config.components}
    for node in config.nodes:
        if isinstance(node, DimRangeNode) and node.input_node in dims:
            dims[node.name] = node.dim
        elif isinstance(node, ComponentNode):
            spec = specs[node.component]
            if spec.type in _BEFORE_TRANSFORMS:
                dims[node.name] = int(spec.options.get("dim", 0))
            elif "matrix" in spec.options and (rows := _rows(config, spec.options["matrix"])):
                dims[node.name] = rows
    try:
        dim = _node_of(config, component).input.dim(dims.__getitem__)
    except KeyError as above:
        # Its statistics would depend on layers that are still to be trained.
        raise ConfigError(
            f"{config.source}: layer {component} takes {above} as its input; "
            "a fixed-affine-layer can only transform the network's input"
        ) from None
    return np.eye(dim, dim + 1, dtype=np.float32)


def _rows(config: Config, path: str) -> int:
    """Of a transform that is known; 0: it is still to be estimated."""
    if path in config.transforms:
        return len(config.transforms[path])
    return len(read_matrix(path)) if Path(path).exists() else 0
