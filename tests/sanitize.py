"""Runs the loader's tests with the C extension built under sanitizers.

``make sanitize``, or ``python -m tests.sanitize [--kinds address thread] [-- PYTEST ARGUMENTS]``. Two kinds:

address
    AddressSanitizer and UndefinedBehaviorSanitizer, and all tests of the loader.
thread
    ThreadSanitizer, and the tests in which threads read.

The extension is built into build/sanitize; the tree's own is left alone. Leaks are not looked for here, because
Python itself does not free all it has: the fuzz targets do that. Needs gcc. The exit status is 1 if a test fails
or a sanitizer finds something; what it found is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.sanitized_extension import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
sys.path.insert(0, str(ROOT / "csrc"))

from build_csrc import STANDARD, WARNINGS, loader  # noqa: E402


@dataclass(frozen=True)
class Kind:
    """A build, what must be loaded before Python, and the tests that are run with it."""

    flags: tuple[str, ...]
    library: str
    options: str
    tests: tuple[str, ...]


KINDS = {
    "address": Kind(
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "libasan.so",
        "detect_leaks=0:detect_stack_use_after_return=1",
        ("test_*.py",),
    ),
    "thread": Kind(
        ("-fsanitize=thread",),
        "libtsan.so",
        "halt_on_error=0:second_deadlock_stack=1",
        (
            "test_reader.py",
            "test_requests.py",
            "test_order.py",
            "test_plan.py",
            "test_bad_input.py",
            "test_disk.py",
            "test_egs.py",
            "test_single_frames.py",
        ),
    ),
}


def compiler() -> str:
    """gcc: its sanitizers' libraries can be loaded before a Python that was built without them."""
    return os.environ.get("CC", "gcc")


def build(kind: Kind, directory: Path) -> Path:
    """Build the extension with a sanitizer; returns its file.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generated = directory / "_csrc.c"
    loader.emit_c_code(str(generated))
    flags = [*STANDARD, "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", *WARNINGS, *kind.flags]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> str:
        output = str(directory / f"{source.stem}.o")
        subprocess.run([compiler(), *flags, "-c", "-o", output, str(source)], check=True)
        return output

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, [generated, *sorted((ROOT / "csrc").glob("*.c"))]))
    extension = directory / "_csrc.abi3.so"
    subprocess.run([compiler(), "-shared", *kind.flags, *objects, "-lpthread", "-lm", "-o", str(extension)], check=True)
    return extension


def environment(kind: Kind, extension: Path, log: Path) -> dict[str, str]:
    """Of a Python that loads the extension; findings go to files that start with `log`."""
    found = subprocess.run(
        [compiler(), f"-print-file-name={kind.library}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    options = f"{kind.options}:log_path={log}"
    return {
        **os.environ,
        ENVIRONMENT: str(extension),
        "LD_PRELOAD": found,
        "PYTHONMALLOC": "malloc",  # so that each array has memory of its own, and what surrounds it is guarded
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
        "TSAN_OPTIONS": options,
    }


def run(name: str, arguments: list[str]) -> bool:
    """Build and test one kind; returns whether all is well."""
    kind, directory = KINDS[name], BUILD / name
    extension = build(kind, directory)
    for old in directory.glob("found.*"):
        old.unlink()
    files = sorted({str(path) for pattern in kind.tests for path in (ROOT / "tests" / "loader").glob(pattern)})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.sanitized_extension", "-m", "not kaldi and not slow"]
    command += arguments or files
    print(f"{name}: {extension}", flush=True)
    log = directory / "found"
    status = subprocess.run(command, cwd=ROOT, env=environment(kind, extension, log), check=False).returncode
    findings = sorted(directory.glob("found.*"))
    for path in findings:
        print(path.read_text("utf-8", "replace"), flush=True)
    print(f"{name}: exit status {status} of the tests, {len(findings)} processes with findings", flush=True)
    return status == 0 and not findings


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the loader's tests under sanitizers.")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("arguments", nargs="*", help="for pytest, in place of the kind's test files (after --)")
    options = parser.parse_args()
    results = [run(name, options.arguments) for name in options.kinds]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
