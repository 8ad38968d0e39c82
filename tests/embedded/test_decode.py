"""Decoding: Kaldi's own network and graph, the toy system, lattices, chunks, bad input."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kaldi_native_io
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.embedded.best_path import best_paths
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.decode import DecodeOptions, Decoder, decode_job, decode_to_lattices
from kaldi_mpi.embedded.lattice import read_lattices
from kaldi_mpi.embedded.score import score
from kaldi_mpi.embedded.scorers import ChunkOptions, in_chunks, load_scorer
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.symbols import SymbolTable
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.nnet3 import read_am, to_torch
from tests.paths import REPO, golden, kaldi_root
from tests.toy_hmm import toy_system


def matrices(rspecifier: str) -> dict[str, NDArray[np.float32]]:
    with kaldi_native_io.SequentialFloatMatrixReader(rspecifier) as reader:
        return {key: np.array(value) for key, value in reader}  # copies: the reader hands out views


def golden_scores() -> dict[str, NDArray[np.float32]]:
    return matrices(f"ark:{golden('am.out.ark')}")


def golden_decoder(options: DecodeOptions | None = None) -> Decoder:
    transitions = read_transition_model(golden("am.mdl"))
    return Decoder(golden("HCLG.fst"), transitions.tid_to_pdf, options or DecodeOptions())


def golden_words() -> dict[str, list[int]]:
    return {line.split()[0]: [int(w) for w in line.split()[1:]] for line in golden("words_best.txt").open()}


def test_kaldis_outputs_on_kaldis_graph_give_kaldis_words() -> None:
    decoder = golden_decoder()
    for key, scores in golden_scores().items():
        result = decoder.decode(key, scores)
        assert result is not None
        _, words, _ = result
        assert words == golden_words()[key]


def test_lattices_hold_the_best_path_with_unscaled_acoustics(tmp_path: Path) -> None:
    decoder = golden_decoder()
    symbols = SymbolTable.read(golden("words.txt"))
    summary = decode_to_lattices(decoder, golden_scores().items(), symbols, tmp_path / "lat.1.gz")
    assert (summary.done, summary.failed) == (2, 0)
    assert summary.frames == sum(map(len, golden_scores().values()))
    ours, theirs = dict(read_lattices(tmp_path / "lat.1.gz")), dict(read_lattices(golden("lat.ark")))
    scale, no_penalty = np.array([0.1, 1 / 7, 1 / 17]), np.zeros(3)
    # latgen-faster-mapped kept, per word sequence, the path that is best at 0.1; near that nothing is lost.
    assert best_paths(list(ours.values()), scale, no_penalty) == best_paths(list(theirs.values()), scale, no_penalty)
    for key, scores in golden_scores().items():
        result = decoder.decode(key, scores)
        assert result is not None
        lattice = ours[key]
        # The cheapest path's cost, by dynamic programming over states in topological order of the archive.
        cost = cheapest(lattice, 0.1)
        assert cost == pytest.approx(-result[2], abs=0.02)
        assert cost == pytest.approx(cheapest(theirs[key], 0.1), abs=0.1)


def cheapest(lattice: object, scale: float) -> float:
    """Cost of the best path, by relaxing all arcs until nothing changes."""
    costs = np.full(lattice.num_states + 1, np.inf)  # type: ignore[attr-defined]
    costs[lattice.start] = 0.0  # type: ignore[attr-defined]
    weights = lattice.graph.astype(float) + scale * lattice.acoustic  # type: ignore[attr-defined]
    while True:
        new = costs.copy()
        np.minimum.at(new, lattice.target, costs[lattice.source] + weights)  # type: ignore[attr-defined]
        if np.array_equal(new, costs):
            return float(costs[-1])
        costs = new


def test_archives_are_the_same_bytes_again(tmp_path: Path) -> None:
    symbols = SymbolTable.read(golden("words.txt"))
    for name in ("one.gz", "two.gz"):
        decode_to_lattices(golden_decoder(), golden_scores().items(), symbols, tmp_path / name)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    decode_to_lattices(golden_decoder(), golden_scores().items(), symbols, tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == gzip.decompress((tmp_path / "one.gz").read_bytes())


def test_utterances_that_reach_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (key, scores), *_ = golden_scores().items()
    beginning = scores[:2]  # not even silence is as short as that
    symbols = SymbolTable.read(golden("words.txt"))
    strict = golden_decoder(DecodeOptions(allow_partial=False))
    with caplog.at_level("WARNING", logger="kaldi_mpi"):
        assert strict.decode(key, beginning) is None
        partial = golden_decoder().decode(key, beginning)
    assert partial is not None
    assert "no final-state reached and --allow-partial=false" in caplog.text
    assert "Outputting partial output for utterance" in caplog.text
    with pytest.raises(DataError, match=r"lat\.1\.gz: none of 1 utterances could be decoded"):
        decode_to_lattices(strict, [(key, beginning)], symbols, tmp_path / "lat.1.gz")
    assert list(tmp_path.iterdir()) == []
    summary = decode_to_lattices(strict, [("x", beginning), (key, scores)], symbols, tmp_path / "lat.1.gz")
    assert (summary.done, summary.failed) == (1, 1)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    (key, scores), *_ = golden_scores().items()
    with pytest.raises(DataError, match=rf"key {key}: 111 columns of log-likelihoods, but 112 pdfs"):
        golden_decoder().decode(key, scores[:, 1:])
    toy = read_transition_model(toy_system() / "mono" / "final.mdl")
    with pytest.raises(DataError, match=r"HCLG\.fst: it has transition-id \d+, the model has 60"):
        Decoder(golden("HCLG.fst"), toy.tid_to_pdf, DecodeOptions())
    with pytest.raises(ConfigError, match="job 3 of 2 jobs"):
        decode_job(toy_system(), toy_system() / "test", tmp_path / "decode", nj=2, job=3)


def test_toy_system_is_decoded_and_scored() -> None:
    system = toy_system()
    decode = system / "mono" / "decode"
    for job in (1, 2):
        summary = decode_job(system / "mono" / "graph", system / "test", decode, nj=2, job=job)
        assert summary.failed == 0
    assert (decode / "num_jobs").read_text() == "2\n"
    line = score(system / "test", system / "mono" / "graph", decode)
    words = sum(map(len, DataDir(system / "test").text.values()))
    assert float(line.split()[1]) <= 5.0
    assert f"/ {words}," in line


def test_command_line(tmp_path: Path) -> None:
    """The program's log looks like Kaldi's; its errors are one line and status 1."""
    system = toy_system()
    shutil.copytree(system / "mono", tmp_path / "mono", ignore=shutil.ignore_patterns("graph", "decode"))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kaldi_mpi", "decode", *map(str, arguments)]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)

    done = run(system / "mono" / "graph", system / "test", tmp_path / "mono" / "decode")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    data = DataDir(system / "test")
    assert sum(line.split()[0] in data.text for line in lines) == 12
    assert lines[1].startswith("LOG (kaldi-mpi-decode[")
    assert f"Log-like per frame for utterance {data.utterances[0]} is " in lines[1]
    assert "Done 12 utterances, failed for 0" in lines[-2]
    assert "Overall log-likelihood per frame is " in lines[-1]

    done = run(system / "mono" / "graph", system / "test", tmp_path / "decode")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ERROR (kaldi-mpi-decode[") and f"{tmp_path}/final.mdl: cannot read" in done.stderr


@pytest.fixture(scope="module")
def nnet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with Kaldi's network, and a data directory with its features."""
    folder = tmp_path_factory.mktemp("nnet")
    (folder / "data").mkdir()
    shutil.copy(golden("am.mdl"), folder / "final.mdl")
    (folder / "data" / "feats.scp").write_text("".join(
        f"{key} {golden('feats_fm.ark')}:{place.rpartition(':')[2]}\n"
        for key, place in (line.split() for line in golden("feats_fm.scp").open())
    ))  # fmt: skip
    keys = sorted(golden_scores())
    (folder / "data" / "utt2spk").write_text("".join(f"{key} {key.split('-')[0]}\n" for key in keys))
    return folder


def golden_feats(folder: Path) -> dict[str, NDArray[np.float32]]:
    return matrices(f"scp:{folder / 'data' / 'feats.scp'}")


def test_networks_score_as_nnet3_compute(nnet_dir: Path) -> None:
    scorer, tid_to_pdf = load_scorer(nnet_dir / "final.mdl", DataDir(nnet_dir / "data"))
    assert tid_to_pdf.max() == 111
    inputs = matrices(f"ark:{golden('net_input.ark')}")
    for key, expected in golden_scores().items():
        feats = inputs[key]
        np.testing.assert_allclose(scorer(key, feats), expected, atol=1e-4)
        with pytest.raises(DataError, match="features have 13 columns, the network takes 40"):
            scorer(key, feats[:, :13])


def test_chunks(nnet_dir: Path) -> None:
    network = to_torch(read_am(nnet_dir / "final.mdl").nnet)
    feats = torch.from_numpy(next(iter(golden_feats(nnet_dir).values())))
    total = len(feats)
    whole = network.whole_utterance(feats)
    longer = in_chunks(network, feats, ChunkOptions(frames_per_chunk=total + 10))
    torch.testing.assert_close(longer, whole)
    # Each chunk begins anew: it is the whole-utterance result of its own frames and their context.
    size, left, right = 50, 20, 7
    options = ChunkOptions(size, left, right, extra_left_context_initial=0, extra_right_context_final=3)
    chunked = in_chunks(network, feats, options)
    assert chunked.shape == whole.shape
    for begin in range(0, total, size):
        count = min(size, total - begin)
        before = network.left_context + (0 if begin == 0 else left)
        after = network.right_context + (3 if begin + count == total else right)
        times = [min(max(t, 0), total - 1) for t in range(begin - before, begin + count + after)]
        with torch.no_grad():
            expected = network(feats[times].unsqueeze(0), -before, count)[0]
        torch.testing.assert_close(chunked[begin : begin + count], expected)
    assert not torch.allclose(chunked, whole, atol=1e-3)
    with pytest.raises(ConfigError, match="frames-per-chunk is -1"):
        in_chunks(network, feats, ChunkOptions(-1))


def test_models_of_no_kind(tmp_path: Path, nnet_dir: Path) -> None:
    shutil.copy(golden("trans.mdl"), tmp_path / "final.mdl")
    data = (tmp_path / "final.mdl").read_bytes()
    (tmp_path / "final.mdl").write_bytes(data + b"<Strange> ")
    with pytest.raises(DataError, match="neither GMMs nor an nnet3 network but <Strange>"):
        load_scorer(tmp_path / "final.mdl", DataDir(nnet_dir / "data"))


def test_log_likelihoods_for_other_decoders(nnet_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.embedded.loglikes", str(nnet_dir / "final.mdl")]
    command += [str(nnet_dir / "data"), f"ark:{tmp_path}/loglikes.ark"]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    written = matrices(f"ark:{tmp_path}/loglikes.ark")
    scorer, _ = load_scorer(nnet_dir / "final.mdl", DataDir(nnet_dir / "data"))
    for key, feats in golden_feats(nnet_dir).items():
        np.testing.assert_array_equal(written[key], scorer(key, feats))


def in_kaldi(folder: Path, command: str) -> str:
    root = kaldi_root()
    folders = [root / "src" / name for name in ("bin", "latbin", "nnet3bin", "gmmbin", "featbin")]
    environment = os.environ | {"PATH": ":".join(map(str, folders)) + ":" + os.environ["PATH"], "LC_ALL": "C"}
    done = subprocess.run(
        ["bash", "-c", f"set -e -o pipefail; {command}"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def words_of(text: str) -> dict[str, tuple[int, ...]]:
    return {line.split()[0]: tuple(map(int, line.split()[1:])) for line in text.splitlines()}


@pytest.mark.kaldi
@pytest.mark.parametrize("lmwt", [7, 10, 17])
def test_kaldi_reads_our_lattices(tmp_path: Path, lmwt: int) -> None:
    system = toy_system()
    shutil.copytree(system / "mono", tmp_path / "mono", ignore=shutil.ignore_patterns("decode"))
    decode = tmp_path / "mono" / "decode"
    decode_job(system / "mono" / "graph", system / "test", decode)
    entries = dict(read_lattices(decode / "lat.1.gz"))
    answers = best_paths(list(entries.values()), np.array([1 / lmwt]), np.array([0.0]))
    ours = {key: answer[0] for key, answer in zip(entries, answers, strict=True)}
    raw = "'ark:gunzip -c lat.1.gz|'"
    best = f"lattice-best-path --acoustic-scale={1 / lmwt}"
    assert words_of(in_kaldi(decode, f"{best} {raw} ark,t:-")) == ours
    determinized = f"lattice-determinize-pruned --acoustic-scale={1 / lmwt} --beam=8 {raw} ark:- | {best} ark:- ark,t:-"
    assert words_of(in_kaldi(decode, determinized)) == ours
    assert len(in_kaldi(decode, f"lattice-copy --write-compact=false {raw} ark,t:- | grep -c '^spk'").split()) == 1


@pytest.mark.kaldi
def test_kaldi_decodes_the_same_with_our_system(tmp_path: Path) -> None:
    """gmm-latgen-faster with our model and graph: the same words, and the same best costs."""
    system = toy_system()
    data = system / "test"
    output = in_kaldi(
        tmp_path,
        f"apply-cmvn --utt2spk=ark:{data}/utt2spk scp:{data}/cmvn.scp scp:{data}/feats.scp ark:- "
        "| add-deltas ark:- ark:- | gmm-latgen-faster --beam=15 --lattice-beam=8 --acoustic-scale=0.1 "
        f"--allow-partial=true {system}/mono/final.mdl {system}/mono/graph/HCLG.fst ark:- "
        "'ark:|gzip -c > lat.1.gz' ark,t:-",
    )
    shutil.copytree(system / "mono", tmp_path / "mono", ignore=shutil.ignore_patterns("decode"))
    decode_job(system / "mono" / "graph", data, tmp_path / "mono" / "decode")
    ours, theirs = (
        dict(read_lattices(tmp_path / "mono" / "decode" / "lat.1.gz")),
        dict(read_lattices(tmp_path / "lat.1.gz")),
    )
    answers = best_paths(list(ours.values()), np.array([0.1]), np.array([0.0]))
    assert {key: answer[0] for key, answer in zip(ours, answers, strict=True)} == words_of(output)
    for key, lattice in ours.items():
        assert cheapest(lattice, 0.1) == pytest.approx(cheapest(theirs[key], 0.1), rel=1e-4)


@pytest.mark.kaldi
def test_latgen_faster_mapped_takes_our_log_likelihoods(nnet_dir: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m tests.embedded.loglikes {nnet_dir}/final.mdl {nnet_dir}/data ark:-"
    output = in_kaldi(
        tmp_path,
        f"PYTHONPATH={REPO} {command} | latgen-faster-mapped --acoustic-scale=0.1 --beam=15 --lattice-beam=8 "
        f"--allow-partial=true {nnet_dir}/final.mdl {golden('HCLG.fst')} ark:- ark:/dev/null ark,t:-",
    )
    assert {key: list(words) for key, words in words_of(output).items()} == golden_words()
