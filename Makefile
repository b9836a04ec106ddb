# Everything a newcomer needs. `make demo` and `make test` do their own set-up; done once, it costs nothing.
.PHONY: setup demo test faults long lint bench gpu fuzz

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

test: .venv/backends .venv/slurm
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile tests/catmodel tests/data_pipeline tests/examples tests/hostile tests/launch
	$(BIN)/python -m pytest tests/train  # ranks that have limits on their time: one test after the other

# Faults injected for real, the long form: docs/reliability.md is made of what this measures.
faults: .venv/backends .venv/slurm
	$(BIN)/python -m pytest -m "slow or long" --results docs/results/faults.json tests/launch/test_slurm.py \
	  $(addprefix tests/train/test_,random_kills.py save_faults.py checkpoint_faults.py prune.py best.py resume_elsewhere.py stop.py \
	    not_finite.py hangs.py world_sizes.py data_faults.py read_faults.py)

# The tests that take minutes and that `make faults` leaves out, too.
long: .venv/backends .venv/slurm
	$(BIN)/python -m pytest -m long

lint: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: .venv/backends
	$(BIN)/python examples/draw_dataset.py datasets/shapes-images
	$(BIN)/python launch/prepare.py datasets/shapes-images datasets/shapes
	$(BIN)/python launch/bench.py data
	$(BIN)/python launch/bench.py train

# What only a GPU can show, in 8 minutes. Where there is no .venv: make gpu PYTHON=python3 GPU_WHEELS=folder (docs/performance.md).
gpu: $(if $(filter $(BIN)/%,$(PYTHON)),setup)
	$(PYTHON) launch/gpu.py

# 10^6 damaged JPEGs through the compiled decoder; needs clang.
fuzz:
	bash data_pipeline/native/fuzz/run.sh
