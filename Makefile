# The commands of this project; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled DeepSpeed ops stay inside the environment: a shared cache can hold a stale lock.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install torch demo digits test test-slow test-gpu bench bench-gpu lint format clean clean-runs

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install everything that the demo and the tests need

# Everything that decides what is installed, the kernels' sources included.
NATIVE := setup.py megatron_nuwa/ops/build.py $(wildcard megatron_nuwa/ops/csrc/*/*)

torch: ## create .venv with PyTorch alone
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt setuptools wheel torch

# torch first: the kernels are compiled against the torch that is installed.
$(STAMP): pyproject.toml constraints.txt demo-media.txt $(NATIVE)
	$(MAKE) torch
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e '.[mpi,parquet,demo,app,dev]'
	$(BIN)/pip install --disable-pip-version-check --no-deps -r demo-media.txt
	# Tests of ranking take its networks and tokenizer; its torchvision fits few builds of torch.
	$(BIN)/pip install --disable-pip-version-check --no-deps -c constraints.txt open-clip-torch
	touch $@

demo: install ## clips -> VQ-GAN -> token corpus -> pretraining -> generated video, in runs/demo
	$(BIN)/python -m launch.demo

digits: install ## moving handwritten digits -> training -> clips for held-out captions -> score
	$(BIN)/python -m launch.moving_digits

# One thread a process: several processes with a thread for every core slow each other down.
# A file's tests share what it made, so it stays whole; by their usual order the fewest tests come
# last, and those take longest.
TEST_WORKERS ?= 2
test: install ## the tests that CI runs, TEST_WORKERS (2) files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: install ## tests of minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: install ## tests of the CUDA kernels, on a machine with a GPU
	$(BIN)/python -m pytest -m gpu

bench: install ## nearby attention, training steps, loader, decoding and the farm, against their peers
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore -m benchmarks.nearby_attention
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.model_step
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step_overhead
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loader
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.decoding
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.farm

bench-gpu: install ## on a GPU: encoding, sampling, a step of 870 M, the kernels, the operator against its peers
	mkdir -p runs/bench-gpu
	$(BIN)/python -m benchmarks.encoding --seconds 240 --output runs/bench-gpu/encoding.json
	$(BIN)/python -m benchmarks.generation --output runs/bench-gpu/generation.json
	$(BIN)/python -m benchmarks.real_step --clips 8 --images 16 --clip-batches 4 \
		--output runs/bench-gpu/real_step.json \
		training.checkpoint_activations=none training.compile=true
	$(BIN)/python -m benchmarks.nearby_kernels --peers cuda sdpa-flash sdpa-cudnn flex \
		--output runs/bench-gpu/nearby_kernels.json
	$(BIN)/python -m benchmarks.kernel_layouts --output runs/bench-gpu/kernel_layouts.json
	$(BIN)/python -W ignore -m benchmarks.nearby_attention --output runs/bench-gpu/nearby_attention.json

lint: install ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, the compiled kernels and caches; runs/ stays
	rm -f megatron_nuwa/ops/_native_*
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

clean-runs: ## remove what demo, digits and bench-gpu left in runs/, and nothing else there
	rm -rf runs/demo runs/moving_digits runs/moving_digits_gpu runs/bench-gpu
