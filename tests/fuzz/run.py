"""Builds the fuzz targets under AddressSanitizer and UndefinedBehaviorSanitizer, and runs them.

``make fuzz``, or ``python -m tests.fuzz.run [--seconds 60] [--targets matrix egs] [--compiler gcc]``. With a clang
that has libFuzzer its coverage leads the mutations; otherwise tests/fuzz/driver.c mutates by a seed. The exit
status is 1 when a target fails; the input that made it fail is kept, and its name printed. To run a target with
that input again::

    build/fuzz/fuzz_matrix build/fuzz/crash_matrix...
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.seeds import TARGETS, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
# Frame pointers make the traces whole; a sanitizer's finding ends the program.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
FLAGS = ["-std=c11", "-ffp-contract=off", "-Wall", "-Wextra", "-Icsrc", *SANITIZE]
# Parts with threads are for ThreadSanitizer (tests/sanitize.py).
WITHOUT = {"queue.c", "cache.c", "plan.c", "thread.c"}


@dataclass(frozen=True)
class Compiler:
    """What builds the targets; `fuzzer`: it has libFuzzer."""

    command: str
    fuzzer: bool


def works(command: str, flags: list[str], program: str, directory: Path) -> bool:
    """Whether a program can be built with these flags, and runs."""
    directory.mkdir(parents=True, exist_ok=True)
    source, binary = directory / "try.c", directory / "try"
    source.write_text(program, "utf-8")
    try:
        subprocess.run([command, *flags, "-o", str(binary), str(source)], check=True, capture_output=True)
        subprocess.run([str(binary), "-runs=1"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def find_compiler(directory: Path, wanted: str | None = None) -> Compiler | None:
    """A compiler with both sanitizers, if there is any: clang with libFuzzer before others."""
    entry = "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return d == 0 && n > 0; }\n"
    for command in [wanted] if wanted else ["clang", os.environ.get("CC", "cc"), "gcc"]:
        if "clang" in command and works(command, [*SANITIZE, "-fsanitize=fuzzer"], entry, directory):
            return Compiler(command, True)
        if works(command, SANITIZE, "int main(void) { return 0; }\n", directory):
            return Compiler(command, False)
    return None


def build(compiler: Compiler, directory: Path, targets: list[str]) -> None:
    """Build ``fuzz_NAME`` of each target in a directory.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why.
    """
    directory.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *(["-fsanitize=fuzzer-no-link"] if compiler.fuzzer else [])]
    ours = [path for path in sorted((ROOT / "csrc").glob("*.c")) if path.name not in WITHOUT]
    common = [HERE / "memory_file.c", *([] if compiler.fuzzer else [HERE / "driver.c"]), *ours]
    mains = [HERE / f"fuzz_{name}.c" for name in targets]

    def compile_one(source: Path) -> str:
        output = str(directory / f"{source.stem}.o")
        subprocess.run([compiler.command, *flags, "-c", "-o", output, str(source)], check=True, cwd=ROOT)
        return output

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, [*common, *mains]))
    linking = [*SANITIZE, *(["-fsanitize=fuzzer"] if compiler.fuzzer else [])]
    for main, name in zip(objects[len(common) :], targets, strict=True):
        parts = [*objects[: len(common)], main]
        subprocess.run(
            [compiler.command, *linking, *parts, "-lm", "-o", str(directory / f"fuzz_{name}")], check=True, cwd=ROOT
        )


def command_of(compiler: Compiler, directory: Path, target: str, seconds: float, seed: int, runs: int) -> list[str]:
    """How a target is run; `runs` 0: as many as there is time for."""
    files, dictionary = write(directory, target)
    limit = [f"-runs={runs}"] if runs else []
    program = str(directory / f"fuzz_{target}")
    if not compiler.fuzzer:
        artifact = directory / f"crash_{target}"
        return [program, f"-seconds={seconds}", f"-seed={seed}", f"-artifact={artifact}", *limit, *map(str, files)]
    options = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", "-max_len=16384", "-timeout=20"]
    if dictionary.stat().st_size > 0:
        options.append(f"-dict={dictionary}")
    options += [f"-artifact_prefix={directory}/crash_{target}_", "-print_final_stats=1"]
    return [program, *options, *limit, str(files[0].parent)]


def summary(output: str) -> str:
    """What a target's output says about how far it went."""
    driver = re.search(r"^\d+ runs, \d+ a second$", output, re.MULTILINE)
    if driver:
        return driver.group()
    found = [
        re.findall(pattern, output) for pattern in (r"executed_units: (\d+)", r"exec_per_sec: +(\d+)", r"cov: (\d+)")
    ]
    runs, rate, coverage = (values[-1] if values else "?" for values in found)
    return f"{runs} runs, {rate} a second, {coverage} edges covered"


def run(
    compiler: Compiler, directory: Path, targets: list[str], *, seconds: float, seed: int = 0, runs: int = 0
) -> int:
    """Run targets one after the other, `seconds` in total; returns how many failed."""
    failed = 0
    for target in targets:
        command = command_of(compiler, directory, target, seconds / len(targets), seed, runs)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        print(f"{target}: {summary(done.stdout + done.stderr)}", flush=True)
        if done.returncode != 0:
            failed += 1
            print(f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}\n{target} failed: {' '.join(command)}", flush=True)
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build and run the fuzz targets.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--compiler", help="the compiler to use, rather than the best that is found")
    options = parser.parse_args()
    compiler = find_compiler(BUILD, options.compiler)
    if compiler is None:
        print("no compiler with -fsanitize=address,undefined is found", file=sys.stderr)
        return 1
    print(f"{compiler.command}, {'libFuzzer' if compiler.fuzzer else 'tests/fuzz/driver.c'}", flush=True)
    build(compiler, BUILD, options.targets)
    return 1 if run(compiler, BUILD, options.targets, seconds=options.seconds, seed=options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
