"""The fuzz targets on their seeds and a number of mutations; ``make fuzz`` runs them for longer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz.run import Compiler, build, command_of, find_compiler, run
from tests.fuzz.seeds import TARGETS, write
from tests.paths import REPO


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Compiler, Path]:
    directory = tmp_path_factory.mktemp("fuzz")
    compiler = find_compiler(directory, "gcc") or find_compiler(directory, "cc")
    if compiler is None or compiler.fuzzer:
        pytest.skip("no gcc with AddressSanitizer and UndefinedBehaviorSanitizer")
    build(compiler, directory, list(TARGETS))
    return compiler, directory


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs(target: str, built: tuple[Compiler, Path], capfd: pytest.CaptureFixture[str]) -> None:
    compiler, directory = built
    failed = run(compiler, directory, [target], seconds=60.0, seed=1, runs=20000)
    assert failed == 0, capfd.readouterr().out
    assert f"{target}: 20000 runs" in capfd.readouterr().out


def test_a_failure_is_found_and_its_input_kept(built: tuple[Compiler, Path], tmp_path: Path) -> None:
    """A target that reads one byte too many where an input has a certain byte in it."""
    compiler, _ = built
    (tmp_path / "bad.c").write_text(
        '#include "fuzz.h"\n'
        "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {\n"
        "    if (size > 0 && memchr(data, 0xEE, size) != NULL) return data[size] == 7;\n"
        "    return 0;\n"
        "}\n"
    )
    here = REPO / "tests" / "fuzz"
    sources = [str(tmp_path / "bad.c"), str(here / "driver.c")]
    program, artifact, seed = tmp_path / "bad", tmp_path / "crash", tmp_path / "seed"
    command = [compiler.command, "-std=c11", "-g", "-fsanitize=address", f"-I{here}", f"-I{REPO / 'csrc'}"]
    subprocess.run([*command, *sources, "-o", str(program)], check=True)
    seed.write_bytes(b"0123456789")
    done = subprocess.run(
        [str(program), "-runs=100000", f"-artifact={artifact}", str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "heap-buffer-overflow" in done.stderr
    assert b"\xee" in artifact.read_bytes()
    again = subprocess.run([str(program), "-runs=1", f"-artifact={artifact}", str(artifact)], check=False)
    assert again.returncode == 1


def test_a_sanitizer_is_at_work_in_the_targets(built: tuple[Compiler, Path]) -> None:
    compiler, directory = built
    program = command_of(compiler, directory, "matrix", 1.0, 0, 1)[0]
    assert b"__asan_" in Path(program).read_bytes()
    assert b"__ubsan_" in Path(program).read_bytes()


def test_seeds_are_many_and_small(tmp_path: Path) -> None:
    for target in TARGETS:
        files, _ = write(tmp_path, target)
        assert len(files) >= 3
        assert sum(file.stat().st_size for file in files) < 100_000
