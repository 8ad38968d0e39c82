"""HMM topology, decision tree and transition model, between Kaldi's files and the wheels.

kaldi-hmm-gmm can build these objects but not read Kaldi's files; here they are put together from the bytes
of a ``tree`` file, the text of a topology and the transitions' log-probabilities. The parts are plain data,
so that they can be sent to other processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded import wheels
from kaldi_mpi.errors import DataError

_BINARY_MARK = b"\0B"


@dataclass(frozen=True)
class Hmm:
    """A decision tree and a transition model.

    Attributes:
        tree: the bytes of Kaldi's binary ``tree`` file.
        topology: the text of a ``topo`` file.
        log_probs: (num_transition_ids + 1,) float32; element 0 is not used.
    """

    tree: bytes
    topology: str
    log_probs: NDArray[np.float32]

    @classmethod
    def monophone(cls, topo: str | Path, shared_phones: str | Path) -> Hmm:
        """A tree without context, and a transition model with the topology's own probabilities.

        Args:
            topo: the ``topo`` file of a lang directory.
            shared_phones: its ``phones/sets.int``; the phones of one line share their pdfs.

        Raises:
            DataError: a file is missing or malformed, or phones have no topology.
        """
        khg = wheels.load().khg
        try:
            text = Path(topo).read_text(encoding="utf-8")
            sets = [[int(p) for p in line.split()] for line in Path(shared_phones).read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read: {error}", file=str(topo)) from error
        topology = _topology(text, str(topo))
        known = set(topology.phones)
        for phone in (phone for phones in sets for phone in phones):
            if phone not in known:
                raise DataError(f"phone {phone} of {shared_phones} has no topology", file=str(topo))
        tree = khg.monophone_context_dependency_shared(
            phone_classes=sets, phone2num_pdf_classes=topology.get_phone_to_num_pdf_classes()
        )
        transitions = khg.TransitionModel(tree, topology)
        tree_bytes = _BINARY_MARK + np.array(tree.__getstate__()[0], dtype=np.int8).tobytes()
        return cls(tree_bytes, text, np.array(transitions.log_probs, dtype=np.float32))

    def build_tree(self, file: str = "tree") -> Any:
        """The wheel's ContextDependency.

        Args:
            file: named in errors.

        Raises:
            DataError: not a binary tree.
        """
        khg = wheels.load().khg
        if not self.tree.startswith(_BINARY_MARK):
            raise DataError("not a binary tree file", file=file)
        # The class has no reader; its unpickling is one.
        tree = khg.ContextDependency.__new__(khg.ContextDependency)
        try:
            tree.__setstate__((np.frombuffer(self.tree[2:], np.int8).tolist(),))
        except RuntimeError as error:
            raise DataError("damaged or truncated tree", file=file) from error
        return tree

    def build(self, file: str = "tree") -> tuple[Any, Any]:
        """The wheel's ContextDependency and TransitionModel.

        Raises:
            DataError: tree, topology and log-probabilities do not belong together.
        """
        khg = wheels.load().khg
        tree = self.build_tree(file)
        fresh = khg.TransitionModel(tree, _topology(self.topology, file))
        if fresh.num_transition_ids + 1 != len(self.log_probs):
            raise DataError(
                f"the tree gives {fresh.num_transition_ids} transition-ids but the model has {len(self.log_probs) - 1}",
                file=file,
            )
        state = list(fresh.__getstate__())
        state[6] = self.log_probs.tolist()
        state[7] = _non_self_loop_log_probs(fresh, self.log_probs).tolist()
        transitions = khg.TransitionModel.__new__(khg.TransitionModel)
        transitions.__setstate__(tuple(state))
        return tree, transitions

    def with_log_probs(self, log_probs: NDArray[np.float32]) -> Hmm:
        """The same with other transition probabilities."""
        return Hmm(self.tree, self.topology, np.array(log_probs, dtype=np.float32))


def tid_to_pdf(transitions: Any) -> NDArray[np.int32]:
    """(num_transition_ids + 1,) int32: the pdf of each transition-id; element 0 is -1."""
    table = np.array(transitions.transition_id_to_pdf_array(), dtype=np.int32)
    table[0] = -1
    return table


def _topology(text: str, file: str) -> Any:
    topology = wheels.load().khg.HmmTopology()
    try:
        topology.read(text)
        topology.check()
    except RuntimeError as error:
        raise DataError("not a valid topology", file=file) from error
    return topology


def _non_self_loop_log_probs(transitions: Any, log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """For each transition-state (1-based; element 0 unused) the log of one minus its self-loop's probability."""
    result = np.zeros(transitions.num_transition_states + 1, dtype=np.float32)
    state_of = np.array(transitions.id2state)
    for tid in range(1, len(log_probs)):
        if transitions.is_self_loop(tid):
            rest = max(1.0 - float(np.exp(np.float64(log_probs[tid]))), 1e-10)
            result[state_of[tid]] = np.log(rest)
    return result
