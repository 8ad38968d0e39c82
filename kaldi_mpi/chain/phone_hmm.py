"""The HMM of a phone in its context, where the topology is the chain one: one state that emits.

The first frame has the forward pdf and each further one the self-loop's, so that a phone lasts a frame at least
(Povey et al. 2016, section 2.4). The forward transition is counted where the phone is left, as in a Kaldi graph
whose self-loops come after the phone's own arc (reorder=true).
"""

from __future__ import annotations

from dataclasses import dataclass

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.formats.tree import ContextTree


@dataclass(frozen=True)
class PhoneHmm:
    """A phone whose context is known.

    Attributes:
        phone: > 0.
        forward_pdf, loop_pdf: pdf-ids of the first and of further frames.
        forward_id, loop_id: transition-ids of these.
        forward_cost, loop_cost: -log of the probabilities of leaving and of staying.
    """

    phone: int
    forward_pdf: int
    loop_pdf: int
    forward_id: int
    loop_id: int
    forward_cost: float
    loop_cost: float

    def labels(self, transition_ids: bool) -> tuple[int, int]:
        """What the first and further frames have in an FST: pdf-ids + 1 or transition-ids."""
        if transition_ids:
            return self.forward_id, self.loop_id
        return self.forward_pdf + 1, self.loop_pdf + 1


class PhoneHmms:
    """The HMMs of a system.

    Args:
        tree: of any context width.
        transitions: its transition model.

    Attributes:
        context_width, central_position: of the tree.
        num_pdfs, num_transition_ids: of the system.

    Raises:
        DataError: a phone's topology is another than the chain one.
    """

    def __init__(self, tree: ContextTree, transitions: TransitionModel) -> None:
        self.context_width, self.central_position = tree.context_width, tree.central_position
        self._tree = tree
        self.num_pdfs = max(transitions.num_pdfs, 1 + max(tree.pdfs()))
        self.num_transition_ids = transitions.num_transition_ids
        self._hmms: dict[tuple[int, int, int], PhoneHmm] = {}
        self._of_window: dict[tuple[int, ...], PhoneHmm] = {}
        self._classes: dict[int, tuple[int, int]] = {}  # of a phone: pdf classes of forward transition and self-loop
        for phone in transitions.phones:
            states = transitions.entries[transitions.phone_to_entry[phone]]
            if len(states) != 2 or {to for to, _ in states[0].transitions} != {0, 1} or states[1].transitions:
                raise DataError(
                    f"phone {phone} has not the topology of chain models (one state that emits)", file=tree.file
                )
            self._classes[phone] = states[0].pdf_class, states[0].self_loop_pdf_class
        first_id = 1
        for phone, _, forward, loop in transitions.tuples:
            order = [to for to, _ in transitions.entries[transitions.phone_to_entry[phone]][0].transitions]
            loop_id, forward_id = first_id + order.index(0), first_id + order.index(1)
            loop_cost, forward_cost = (-float(transitions.log_probs[number]) for number in (loop_id, forward_id))
            self._hmms[phone, forward, loop] = PhoneHmm(
                phone, forward, loop, forward_id, loop_id, forward_cost, loop_cost
            )
            first_id += len(order)
        self._of_id = {number: hmm for hmm in self._hmms.values() for number in (hmm.forward_id, hmm.loop_id)}

    def of(self, window: tuple[int, ...]) -> PhoneHmm:
        """The HMM of the phone at the central position of context_width phones, 0 beyond an utterance's ends.

        Raises:
            DataError: the phone is unknown, or the tree and the transition model are of different systems.
        """
        found = self._of_window.get(window)
        if found is None:
            phone = window[self.central_position]
            if phone not in self._classes:
                raise DataError(f"phone {phone} is not in the transition model", file=self._tree.file)
            forward, loop = (self._tree.pdf(window, pdf_class) for pdf_class in self._classes[phone])
            try:
                found = self._of_window[window] = self._hmms[phone, forward, loop]
            except KeyError:
                raise DataError(
                    f"phone {phone} with pdfs {forward}, {loop} is not in the transition model: it is of another tree",
                    file=self._tree.file,
                ) from None
        return found

    def by_id(self) -> dict[int, PhoneHmm]:
        """The HMM that each transition-id belongs to."""
        return self._of_id
