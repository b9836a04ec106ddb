# `make demo` and `make test` set up .venv first, unless that is done already.
.PHONY: setup demo quick test faults long lint bench gpu fuzz

export DS_ACCELERATOR ?= $(shell test -e /dev/nvidia0 && echo cuda || echo cpu)
BIN := .venv/bin
PYTHON ?= $(BIN)/python

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt launch/setup.sh $(wildcard data_pipeline/native/*.[ch])
	bash launch/setup.sh

.venv/backends: .venv/ready
	bash launch/setup.sh backends

.venv/slurm: .venv/ready
	bash launch/setup.sh slurm

demo: setup
	bash launch/demo.sh

# Lint, and the tests that take less than a few seconds: under 3 minutes on two cores.
quick: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long"

# All tests but the long ones. The second half starts ranks with short time limits, so its tests run one after another.
test: .venv/backends .venv/slurm
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile tests --ignore tests/operate \
	  --ignore-glob 'tests/train/test_*' $(addprefix --ignore tests/train/,checkpoint guard telemetry)
	$(BIN)/python -m pytest tests/operate tests/train $(addprefix --ignore tests/train/,engine tasks)

# The long form of the fault injections; docs/reliability.md quotes its results.
faults: .venv/backends .venv/slurm
	$(BIN)/python -m pytest -m "slow or long" --results docs/results/faults.json tests/launch/test_slurm.py \
	  $(addprefix tests/train/test_,random_kills.py save_faults.py checkpoint_faults.py prune.py best.py \
	    resume_elsewhere.py stop.py not_finite.py hangs.py world_sizes.py data_faults.py read_faults.py)

# All tests that take minutes, including those of `make faults`.
long: .venv/backends .venv/slurm
	$(BIN)/python -m pytest -m long

lint: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: .venv/backends
	$(BIN)/python examples/draw_dataset.py datasets/shapes-images
	$(BIN)/python launch/prepare.py datasets/shapes-images datasets/shapes
	$(BIN)/python launch/bench.py data
	$(BIN)/python launch/bench.py train

# Measurements on a GPU, in 7 minutes: speed, or PARTS=bits. Without .venv: make gpu PYTHON=python3 GPU_WHEELS=folder
# (docs/gpu.md).
PARTS ?= speed
gpu: $(if $(filter $(BIN)/%,$(PYTHON)),setup)
	$(PYTHON) launch/gpu.py --parts $(PARTS)

# 10^6 damaged JPEGs through the compiled decoder; needs clang.
fuzz:
	bash data_pipeline/native/fuzz/run.sh
