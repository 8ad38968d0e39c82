"""Data directories: what is read, what is refused and with which words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaldi_mpi.embedded.datadir import DataDir, copy_data_dir, read_table, spk2utt_of, write_table
from kaldi_mpi.errors import DataError
from tests.speech import digit_strings, tone_dir

KEYS = st.text(st.characters(blacklist_categories=["Z", "C"]), min_size=1, max_size=8)


@given(st.dictionaries(KEYS, st.lists(KEYS, min_size=1, max_size=3).map(" ".join), min_size=1))
def test_a_table_comes_back_sorted_as_the_c_locale_sorts(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("table") / "text"
    write_table(path, table)
    assert read_table(path) == table
    in_file = [line.split(b" ")[0] for line in path.read_bytes().split(b"\n")[:-1]]
    assert in_file == sorted(in_file)


def test_reads_all_files(tmp_path: Path) -> None:
    data = DataDir(tone_dir(tmp_path))
    data.validate()
    assert data.utterances == ["spk0-00", "spk0-01", "spk1-02", "spk1-03"]
    assert data.text["spk0-00"] == ["ONE", "TWO"]
    assert data.spk2utt == {"spk0": ["spk0-00", "spk0-01"], "spk1": ["spk1-02", "spk1-03"]}
    assert data.segments == {}


def spoil(data: Path, name: str, old: str, new: str) -> None:
    path = data / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("text", "spk1-02 ONE TWO\n", "", "text, key spk1-02: the utterance is in utt2spk but not here"),
        ("wav.scp", "spk1-02 ", "spk1-2b ", "wav.scp, key spk1-02: the utterance is in utt2spk but not here"),
        ("utt2spk", "spk1-02 spk1\n", "", "utt2spk, key spk1-02: the utterance is in wav.scp but not here"),
        ("text", "spk0-01 ONE", "spk0-00 ONE", "text, key spk0-00: the key is there twice (again in line 2)"),
        ("utt2spk", "spk0-01 spk0", "spk0-01", "utt2spk, key spk0-01: line 2 has no value after the key"),
        ("utt2spk", "spk0-01 spk0", "spk0-01 spk0 x", "utt2spk, key spk0-01: expected one speaker, got"),
        ("text", "spk0-01 ONE TWO\n", "\n", "text: line 2 is blank"),
        ("text", "spk0-01 ONE TWO", "spk0-01 ONE <s>", "text, key spk0-01: the text holds the reserved word"),
        ("utt2spk", "spk0-01 spk0", "spk0-01 spk2", "spk2utt, key spk2: the speaker is in utt2spk but not"),
        ("spk2utt", " spk0-01", "", "spk2utt, key spk0: the speaker's utterances are not those of utt2spk"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    data = tone_dir(tmp_path)
    spoil(data, name, old, new)
    with pytest.raises(DataError) as caught:
        DataDir(data).validate()
    assert str(caught.value).startswith(f"{data}/{message}")


def test_wrong_order_names_the_line(tmp_path: Path) -> None:
    data = tone_dir(tmp_path)
    lines = (data / "text").read_text().splitlines(keepends=True)
    (data / "text").write_text("".join(lines[::-1]))
    with pytest.raises(DataError, match=r"text, key spk1-02: not in the C locale's order: it comes after spk1"):
        DataDir(data).validate()


def test_speakers_and_utterances_need_one_order(tmp_path: Path) -> None:
    data = tone_dir(tmp_path)
    (data / "spk2utt").unlink()
    (data / "utt2spk").write_text("spk0-00 b\nspk0-01 b\nspk1-02 a\nspk1-03 b\n")
    with pytest.raises(DataError, match="utt2spk, key spk1-02: sorted by utterance, speaker a comes after"):
        DataDir(data).validate()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    data = tone_dir(tmp_path)
    (data / "text").unlink()
    with pytest.raises(DataError, match=r"data/text: no such file"):
        DataDir(data).validate()
    with pytest.raises(DataError, match=r"data/feats.scp: no such file"):
        DataDir(data).validate(text=False, feats=True)


def test_not_a_data_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a Kaldi data directory: it has no wav\.scp and no feats\.scp"):
        DataDir(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such directory"):
        DataDir(tmp_path / "nowhere")


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "x"])
def test_frame_counts_are_whole_and_positive(tmp_path: Path, number: str) -> None:
    data = tone_dir(tmp_path)
    (data / "utt2num_frames").write_text(f"spk0-00 {number}\n")
    with pytest.raises(DataError, match="utt2num_frames, key spk0-00: expected a positive number"):
        _ = DataDir(data).utt2num_frames


@pytest.mark.parametrize("value", ["rec 1.0 0.5", "rec 0 x", "rec 0", "rec -1 2"])
def test_segments_need_a_start_and_a_later_end(tmp_path: Path, value: str) -> None:
    data = tone_dir(tmp_path)
    (data / "segments").write_text(f"spk0-00 {value}\n")
    with pytest.raises(DataError, match="segments, key spk0-00: expected 'RECORDING START END'"):
        _ = DataDir(data).segments


def test_import_sorts_makes_paths_absolute_and_drops_old_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tone_dir(tmp_path / "user")
    monkeypatch.chdir(tmp_path)
    scp = (source / "wav.scp").read_text().replace(f"{tmp_path}/", "").splitlines()
    scp[1] = "spk0-01 cat user/wav/spk0-01.wav |"
    (source / "wav.scp").write_text("\n".join(scp[::-1]) + "\n")
    (source / "spk2utt").unlink()
    target = tmp_path / "recipe" / "data" / "train"
    target.mkdir(parents=True)
    (target / "feats.scp").write_text("of an earlier corpus\n")
    data = copy_data_dir(source, target)
    assert not data.has("feats.scp") and data.has("spk2utt")
    assert list(data.wav_scp) == sorted(data.wav_scp)
    assert data.wav_scp["spk0-00"] == str(tmp_path / "user/wav/spk0-00.wav")
    assert data.wav_scp["spk0-01"] == "cat user/wav/spk0-01.wav |"


def test_import_refuses_missing_audio_and_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tone_dir(tmp_path)
    with pytest.raises(DataError, match="it is the directory to be written"):
        copy_data_dir(source, source)
    monkeypatch.chdir(tmp_path)
    spoil(source, "wav.scp", str(tmp_path / "wav/spk0-01.wav"), "elsewhere/a.wav")
    with pytest.raises(DataError) as caught:
        copy_data_dir(source, tmp_path / "copy")
    assert str(caught.value) == (
        f"{source}/wav.scp, key spk0-01: no such audio file: elsewhere/a.wav "
        f"(a relative path counts from {os.getcwd()})"
    )
    assert not (tmp_path / "copy").exists()


def test_takes_strings_of_real_digits(tmp_path: Path) -> None:
    strings = digit_strings(tmp_path / "strings")
    for part, count in (("train", 12), ("test", 6)):
        data = copy_data_dir(strings / part, tmp_path / "data" / part)
        assert len(data.utterances) == count
        assert data.spk2utt == spk2utt_of(data.utt2spk) and set(data.spk2utt) == {"george", "jackson", "lucas"}


@pytest.mark.kaldi
def test_kaldi_agrees_on_what_is_valid(tmp_path: Path) -> None:
    import subprocess

    from tests.paths import kaldi_root

    data = tone_dir(tmp_path / "corpus")
    scripts = tmp_path / "recipe"
    scripts.mkdir()
    (scripts / "utils").symlink_to(kaldi_root() / "egs/wsj/s5/utils")

    def kaldi_accepts(path: Path) -> bool:
        command = ["utils/validate_data_dir.sh", "--no-feats", str(path)]
        return subprocess.run(command, cwd=scripts, capture_output=True, check=False).returncode == 0

    assert kaldi_accepts(data)
    for name, old, new in (
        ("text", "spk1-02 ONE TWO\n", ""),
        ("utt2spk", "spk0-01 spk0", "spk0-01 spk2"),
        ("text", "spk0-01 ONE TWO", "spk0-01 ONE <s>"),
        ("text", "spk0-01 ONE", "spk0-00 ONE"),
    ):
        spoilt = tmp_path / "spoilt"
        shutil.copytree(data, spoilt)
        spoil(spoilt, name, old, new)
        assert not kaldi_accepts(spoilt)
        with pytest.raises(DataError):
            DataDir(spoilt).validate()
        shutil.rmtree(spoilt)
