# Everything a newcomer needs: `make train` runs the main job, `make test` the tests.
# Both set up .venv first. On a GPU machine choose the torch build: make TORCH="torch>=2.11" train

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN     = $(VENV)/bin
TRAIN  ?= preset=quick

# Suites and keys of `tdmpc2-fast bench`, and checkouts of the official code and the JAX port to measure beside ours.
BENCH  ?= planner update
OFFICIAL ?=
JAX    ?=
# `make learning`: runs of the list, and keys.
RUNS   ?=
# `make gpu`: what to run (first, rest, more or names of parts), in how many minutes, and a folder for rows and logs.
PARTS  ?=
MINUTES ?=
KEEP   ?=
# Packages for a GPU machine without network: the folder to use there; its Python, the folder to fetch into, what it has.
WHEELS ?=
FOR    ?= 3.12
INTO   ?= build/wheels
HAS    ?=
THEIRS  = $(if $(OFFICIAL),official=$(abspath $(OFFICIAL))) $(if $(JAX),jax=$(abspath $(JAX)))

.DEFAULT_GOAL := help
.PHONY: help setup train test test-cpu test-slow test-all coverage gpu wheels report lint typecheck suites golden bench learning \
        bench-report results clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

# The stamp carries the torch build, so that choosing another one installs it.
READY   = $(VENV)/.ready-$(subst =,-,$(subst >,_,$(TORCH)))

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[train,bench,dev]"
	@touch $@

setup: $(READY)  ## install everything into .venv

train: setup     ## train a real task; ends with its curve and a video (under five minutes on two CPU cores)
	$(BIN)/tdmpc2-fast train $(TRAIN)

PYTEST  = -m pytest -n auto --dist worksteal

# Tests of kernels run on those of Triton, interpreted, and on those of the CPU: as this machine has them,
# with AMX emulated, and with a sanitizer.
OF_KERNELS = $(addprefix tests/kernels/,autograd backward layers losses plan update) \
	tests/algorithm/test_kernel_plan.py tests/algorithm/test_kernel_update.py
NATIVE   = TDMPC2_NATIVE=1 $(BIN)/python $(PYTEST) $(OF_KERNELS)
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all -g1
ASAN     = ASAN_OPTIONS=detect_leaks=0 CXX=g++ \
	LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)"

test: setup      ## run the tests, a process per core, but for the slow ones
	$(BIN)/python $(PYTEST) -m "not slow"
	$(NATIVE) -m "not slow"

test-cpu: setup  ## the CPU's kernels again: in AVX2, with AMX emulated, and under the address and undefined-behaviour sanitizers
	TDMPC2_CPU_ISA=avx2 $(NATIVE)
	$(ASAN) TDMPC2_CPU_FLAGS="$(SANITIZE) -DEMULATE_AMX" $(NATIVE) -k bfloat16 -m "not slow"
	$(ASAN) TDMPC2_CPU_FLAGS="$(SANITIZE)" $(NATIVE) -m "not slow"
	FUZZ_CASES=1000 $(NATIVE) -k fuzz

test-slow: setup ## run the tests that `make test` leaves out: soaks and large ranges of fuzz
	$(BIN)/python $(PYTEST) -m slow

test-all: setup  ## run all tests
	$(BIN)/python $(PYTEST)

# Reported even where a test fails: what is measured runs at half the speed, and some tests have deadlines.
COVER   = CHECKOUT=$(CURDIR) COVERAGE_FILE=$(CURDIR)/build/coverage/$(1) $(BIN)/python -m coverage
coverage: setup  ## run all tests and report the lines they cover: those of `make test`, then all
	@rm -rf build/coverage && mkdir -p build/coverage
	-$(call COVER,most) run $(PYTEST) -m "not slow"
	-$(call COVER,slow) run $(PYTEST) -m slow
	@$(call COVER,most) combine --quiet
	@$(call COVER,all) combine --quiet --keep build/coverage/most build/coverage/slow.*
	@echo 'make test:' && $(call COVER,most) report
	@echo 'make test-all:' && $(call COVER,all) report

lint: setup      ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup ## mypy over the packages, laid out as they are installed
	@rm -rf build/typecheck && mkdir -p build/typecheck/tdmpc2_fast
	@ln -s $(CURDIR)/tdmpc2_fast/* build/typecheck/tdmpc2_fast/
	@ln -s $(CURDIR)/kernels $(CURDIR)/train $(CURDIR)/benchmarks build/typecheck/tdmpc2_fast/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml tdmpc2_fast

# Suites that live in interpreters of their own: those that install in two minutes, and tasks of theirs to play.
SUITES ?= metaworld myosuite
CHECK  ?= mw-door myo-reach
OWN     = $(shell $(BIN)/python -c "from tdmpc2_fast.train.envs.apart.interpreters import python_of as of; print(of('$(1)'))")
suites: setup    ## install and test suites that have an interpreter of their own, and extras; SUITES="maniskill" CHECK=cube
	@rm -rf build/suites && mkdir -p build/suites/tdmpc2_fast
	@ln -s $(CURDIR)/tdmpc2_fast/* build/suites/tdmpc2_fast/
	@ln -s $(CURDIR)/kernels $(CURDIR)/train build/suites/tdmpc2_fast/
	$(foreach s,$(SUITES),$(BIN)/tdmpc2-fast suites install $(s) && \
		$(call OWN,$(s)) -m pip install --quiet pytest && cd build/suites && PYTHONPATH=$(CURDIR)/build/suites \
		$(call OWN,$(s)) -P -m pytest -q -c /dev/null --noconftest -p no:cacheprovider \
		$(CURDIR)/tests/train/envs/suites/test_$(s).py && cd $(CURDIR) && ) true
	$(BIN)/python -m pip install --quiet --editable ".[robotics,envpool]"
	$(BIN)/python $(PYTEST) tests/train/envs/test_robotics.py tests/train/envs/dmcontrol/test_envpool_engine.py
	$(foreach c,$(CHECK),$(BIN)/tdmpc2-fast tasks $(c) --check && ) true

golden: setup    ## parity with the recorded official numbers, array by array
	$(BIN)/python tests/golden_check.py tests/golden --implementation reference
	$(BIN)/python tests/golden_check.py tests/golden --implementation torch
	TRITON_INTERPRET=1 $(BIN)/python tests/golden_check.py tests/golden --implementation triton

gpu:             ## what a GPU has to show, with PYTHON's torch and triton; then PARTS="rest more"; MINUTES=7 WHEELS= KEEP=
	@rm -rf build/gpu && mkdir -p build/gpu/tdmpc2_fast
	@ln -s $(CURDIR)/tdmpc2_fast/* build/gpu/tdmpc2_fast/
	@ln -s $(CURDIR)/kernels $(CURDIR)/train $(CURDIR)/benchmarks build/gpu/tdmpc2_fast/
	@PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -P -m tdmpc2_fast.benchmarks.gpu $(PARTS) $(THEIRS) \
		$(if $(WHEELS),wheels=$(abspath $(WHEELS))) $(if $(MINUTES),minutes=$(MINUTES)) $(if $(KEEP),out=$(abspath $(KEEP)))

wheels:          ## fetch what a GPU machine without network lacks, for `make gpu WHEELS=`; FOR=3.12 INTO= HAS="lxml"
	@$(PYTHON) -P benchmarks/gpu/wheels.py for=$(FOR) into=$(INTO) "has=$(HAS)"

report: setup    ## compile the kernels for sm_80, sm_90 and sm_100, no GPU needed: registers, spills, what plans and updates cost
	env -u TRITON_INTERPRET $(BIN)/python -m tdmpc2_fast.kernels.report
	env -u TRITON_INTERPRET $(BIN)/python -m tdmpc2_fast.benchmarks.static

learning: setup  ## runs that are compared with published ones (docs/results.md): RUNS="walker-walk", none for the list
	@set -f; $(BIN)/python -m tdmpc2_fast.benchmarks.learning $(RUNS) $(if $(OFFICIAL),official=$(abspath $(OFFICIAL)))

bench: setup     ## plan and update against the reference, eager and compiled; OFFICIAL=, JAX=CHECKOUT add theirs
	$(BIN)/tdmpc2-fast bench $(BENCH) $(THEIRS)

bench-report: setup # a report, not a test of speed: it fails only where results differ
	@rm -rf build/bench
	$(BIN)/tdmpc2-fast bench planner update replay size=1 repeats=7 compiled=false out=build/bench
	-$(BIN)/python benchmarks/compare.py $(lastword $(sort $(wildcard benchmarks/results/amd-epyc-*.json))) build/bench/*.json by=ratios

results: setup   ## RESULTS.md, its pictures and the table in the README from the files in benchmarks/results
	$(BIN)/python -m tdmpc2_fast.benchmarks.report

clean:           ## remove .venv and caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
