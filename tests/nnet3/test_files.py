"""Files: transition models, matrices, and what happens with malformed ones and with a full disk."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.tokens import Writer, read_matrix, write_matrix
from kaldi_mpi.formats.transition import (
    HmmState,
    TransitionModel,
    parse_transition_model,
    read_transition_model,
    write_transitions,
)
from kaldi_mpi.nnet3 import read_am, read_nnet, to_torch, write_am
from kaldi_mpi.nnet3.am import AmNnet
from kaldi_mpi.nnet3.network import Nnet
from tests.paths import REPO, golden


def small_transition_model(extended: bool = False) -> TransitionModel:
    loop = 1 if extended else 0
    states = [HmmState(0, loop, ((0, 0.75), (1, 0.25))), HmmState(-1, -1, ())]
    tuples = [(1, 0, 0, 2 if extended else 0), (3, 0, 1, 3 if extended else 1)]
    logs = np.log(np.array([1, 0.75, 0.25, 0.75, 0.25], dtype=np.float32))
    return TransitionModel([1, 3], [-1, 0, -1, 0], [states], tuples, logs)


def write(path: Path, model: TransitionModel, binary: bool) -> Path:
    with path.open("wb") as stream:
        write_transitions(model, Writer(stream, binary))
    return path


@pytest.mark.parametrize("name", ["trans.mdl", "trans.txt"])
def test_transition_model_same_bytes(tmp_path: Path, name: str) -> None:
    model = read_transition_model(golden(name))
    out = write(tmp_path / name, model, name.endswith(".mdl"))
    assert out.read_bytes() == golden(name).read_bytes()


def test_pdfs_and_phones_are_those_of_show_transitions() -> None:
    """show-transitions printed each transition-id with its phone and pdf."""
    model = read_transition_model(golden("trans.mdl"))
    names = {}
    for line in golden("phones.txt").read_text().splitlines():
        name, number = line.split()
        names[name] = int(number)
    phone = pdf = -1
    seen = 0
    for line in golden("show_transitions.txt").read_text().splitlines():
        words = line.split()
        if words[0] == "Transition-state":
            phone, pdf = names[words[4]], int(words[-1])
        elif words[0] == "Transition-id":
            tid = int(words[2])
            assert (model.tid_to_phone[tid], model.tid_to_pdf[tid]) == (phone, pdf)
            seen += 1
    assert seen == model.num_transition_ids == len(model.tid_to_pdf) - 1
    assert model.tid_to_pdf[0] == -1 and model.tid_to_pdf.dtype == np.int32
    assert model.num_pdfs == 112


def test_alignments_map_to_pdfs_as_ali_to_pdf_did() -> None:
    model = read_transition_model(golden("trans.mdl"))
    lines = zip(golden("ali.txt").read_text().splitlines(), golden("ali_pdf.txt").read_text().splitlines(), strict=True)
    for tids, pdfs in lines:
        assert model.tid_to_pdf[[int(x) for x in tids.split()[1:]]].tolist() == [int(x) for x in pdfs.split()[1:]]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("extended", [True, False])
def test_transition_model_round_trip(tmp_path: Path, binary: bool, extended: bool) -> None:
    model = small_transition_model(extended)
    assert model.is_hmm is not extended
    again = read_transition_model(write(tmp_path / "t", model, binary))
    assert (again.phones, again.phone_to_entry, again.entries, again.tuples) == (
        model.phones,
        model.phone_to_entry,
        model.entries,
        model.tuples,
    )
    assert np.allclose(again.log_probs, model.log_probs, rtol=1e-6)
    assert again.tid_to_pdf.tolist() == ([-1, 2, 0, 3, 1] if extended else [-1, 0, 0, 1, 1])
    assert again.tid_to_phone.tolist() == [-1, 1, 1, 3, 3]


def test_text_of_a_transition_model() -> None:
    model = parse_transition_model(golden("trans.txt").read_text())
    assert model.tid_to_pdf.tolist() == read_transition_model(golden("trans.mdl")).tid_to_pdf.tolist()
    with pytest.raises(DataError, match=r"^GMM, byte offset 0: <TransitionModel> expected, found <Nothing>"):
        parse_transition_model("<Nothing> ", "GMM")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (1, 1), (0, 0)])
def test_matrix_round_trip(tmp_path: Path, binary: bool, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    write_matrix(tmp_path / "m", matrix, binary)
    assert np.allclose(read_matrix(tmp_path / "m"), matrix, rtol=1e-6)
    if binary:
        assert np.array_equal(read_matrix(tmp_path / "m"), matrix)


def test_matrix_is_read_by_kaldi_native_io(tmp_path: Path) -> None:
    import kaldi_native_io

    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_matrix(tmp_path / "m", matrix)
    assert np.array_equal(np.array(kaldi_native_io.FloatMatrix.read(str(tmp_path / "m"))), matrix)


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"^/nowhere/final\.mdl: cannot read: No such file"):
        read_am("/nowhere/final.mdl")


def reads(path: Path) -> bool:
    """Whether a damaged file is still accepted; anything but a DataError that names it fails the test."""
    try:
        if path.name.startswith("am"):
            am = read_am(path)
            to_torch(am.nnet)
        else:
            to_torch(read_nnet(path))
    except DataError as error:
        assert error.file == str(path) and str(error).startswith(str(path)), error
        return False
    return True


@pytest.mark.parametrize("name", ["lstm.raw", "lstm.raw.txt", "am.mdl"])
def test_truncated_anywhere(tmp_path: Path, name: str) -> None:
    data = golden(name).read_bytes()
    path = tmp_path / name
    rng = random.Random(1)
    # am.mdl ends with its priors; the network files with a token and a space that may be missing.
    cuts = [*range(0, 60), *rng.sample(range(60, len(data) - 2), 60), len(data) - 9]
    for cut in cuts:
        path.write_bytes(data[:cut])
        assert not reads(path), cut


def test_truncation_names_component_and_offset(tmp_path: Path) -> None:
    data = golden("lstm.raw").read_bytes()
    (tmp_path / "short.raw").write_bytes(data[: data.index(b"lstm1.W_all <Nat") + 9000])
    with pytest.raises(DataError, match=r"short\.raw, key lstm1\.W_all, byte offset \d+: file ends: \d+ bytes"):
        read_nnet(tmp_path / "short.raw")


@pytest.mark.parametrize("name", ["lstm.raw", "lstm.raw.txt", "am.mdl"])
def test_damaged_bytes(tmp_path: Path, name: str) -> None:
    """Never a crash, a hang or another exception; damage of structure is seen, of a number cannot be."""
    data = golden(name).read_bytes()
    path = tmp_path / name
    rng = random.Random(2)
    # Structure is dense in the config lines, and around tokens.
    tokens = [at for at in range(len(data)) if data[at : at + 1] == b"<"]
    places = [*rng.sample(range(min(len(data), 3000)), 60), *rng.sample(tokens, 40)]
    accepted = 0
    for place in places:
        at = min(len(data) - 1, place + rng.randrange(0, 12))
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        accepted += reads(path)
    assert accepted < len(places)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.booleans(), st.sampled_from(["<Nnet3> \n\n<NumComponents> ", "<TransitionModel> "]))
def test_random_bytes_are_errors(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, binary: bool, begin: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.mdl"
    path.write_bytes((b"\0B" if binary else b"") + begin.encode() + noise)
    with pytest.raises(DataError):
        read_am(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("component=in.relu input=in.affine", "component=in.relo input=in.affine", "there is no component in.relo"),
        ("input=lstm2.m\n", "input=lstm2.n\n", r"its input lstm2\.n does not exist"),
        (
            "dim-offset=24 dim=24\ncomponent-node name=lstm1.cm",
            "dim-offset=40 dim=24\ncomponent-node name=lstm1.cm",
            "columns 40 to 64",
        ),
        ("input=lstm2.m\n", "input=Append(lstm2.m, input)\n", "input of dimension 64 for a component of 24"),
        ("IfDefined(Offset(lstm2.m_trunc, -3))", "Offset(lstm2.m_trunc, -3)", "node output: cannot be computed"),
        ("input-node name=input dim=40", "input-node name=input dim=0", "dim: must be positive"),
        ("objective=linear", "objective=linear colour=red", "colour: is not an option of output-node"),
        ("Offset(input, -2)", "Offset(input, minus)", "integer expected in descriptor"),
        ("Offset(input, -2)", "ReplaceIndex(input, x, 2)", "only the t index can be replaced"),
    ],
)
def test_inconsistent_networks(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = golden("lstm.raw.txt").read_text()
    (tmp_path / "bad.raw").write_text(text.replace(old, new, 1))
    nnet = read_nnet(tmp_path / "bad.raw")
    assert old in text
    with pytest.raises(DataError, match=message) as caught:
        to_torch(nnet)
    assert str(caught.value).startswith(str(tmp_path / "bad.raw"))


def test_unknown_component_type_is_named(tmp_path: Path) -> None:
    text = golden("lstm.raw.txt").read_text().replace("NormalizeComponent", "MaxpoolingComponent")
    (tmp_path / "pool.raw").write_text(text)
    with pytest.raises(
        DataError, match=r"pool\.raw, key in\.renorm, byte offset \d+: component type <Maxpool.* not supported"
    ):
        read_nnet(tmp_path / "pool.raw")


def small_am() -> AmNnet:
    lines = ["input-node name=input dim=4", "output-node name=output input=input objective=linear"]
    return AmNnet(small_transition_model(True), Nnet(lines), np.full(4, 0.25, dtype=np.float32))


@pytest.mark.parametrize("binary", [True, False])
def test_am_round_trip(tmp_path: Path, binary: bool) -> None:
    write_am(small_am(), tmp_path / "final.mdl", binary)
    am = read_am(tmp_path / "final.mdl")
    assert am.priors.tolist() == [0.25] * 4 and to_torch(am.nnet).output_dim == 4
    assert read_nnet(tmp_path / "final.mdl").config_lines == am.nnet.config_lines
    assert read_transition_model(tmp_path / "final.mdl").num_pdfs == 4


def test_wrong_number_of_priors(tmp_path: Path) -> None:
    am = small_am()
    am.priors = am.priors[:3]
    with pytest.raises(ValueError, match="3 priors for 4 pdfs"):
        write_am(am, tmp_path / "final.mdl")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while the data is written out; an older final.mdl stays as it was."""
    am = small_am()
    write_am(am, tmp_path / "final.mdl")
    old = (tmp_path / "final.mdl").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("final.mdl", "new.mdl"):
        with pytest.raises(DataError, match=rf"{name}: cannot write: No space left on device"):
            write_am(am, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["final.mdl"]
    assert (tmp_path / "final.mdl").read_bytes() == old


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    """The system really refuses, half-way through a large file (a limit on file size stands for the disk's)."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from kaldi_mpi.nnet3 import read_am, write_am\n"
        "from kaldi_mpi.errors import DataError\n"
        "try: write_am(read_am(sys.argv[1]), sys.argv[2])\n"
        "except DataError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(golden("am.mdl")), str(tmp_path / "final.mdl")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{tmp_path}/final.mdl: cannot write: File too large\n", done.stderr
    assert list(tmp_path.iterdir()) == []
