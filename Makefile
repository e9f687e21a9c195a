# `make quickstart` and `make test` need Python 3.11+, git and make; they fetch the rest.
UV_HOME := .uv
UV := $(UV_HOME)/bin/uv
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1
export UV_COMPILE_BYTECODE = 1

.PHONY: install quickstart test e2e assets lint check gpu-check clean

install: $(UV)
	$(UV) sync --frozen --extra operator --extra trainer --quiet

$(UV):
	$(PYTHON) -m venv $(UV_HOME)
	$(UV_HOME)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

quickstart: install
	$(BIN)/python examples/quickstart_data.py
	$(BIN)/finetune run examples/quickstart.yaml --fresh
	@echo 'Talk to it: .venv/bin/finetune chat runs/quickstart'

test: install lint assets
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder

# etcd, kube-apiserver, kube-controller-manager and helm for tests/cluster, and what a node needs for tests/e2e where it
# can run: given, or built once with Go.
assets: install
	$(BIN)/python tests/support/cluster/kube_assets.py

# Jobs on real kubelets: as root, with `apt-get install containerd runc iproute2 iptables ipset openssl`; skipped with
# the reason elsewhere. `FINETUNE_E2E=kind make e2e` takes kind and Docker instead.
e2e: install assets
	$(BIN)/pytest tests/e2e -rs

# What only a GPU can prove (docs/gpu.md): ten minutes at most. `make gpu-check GPU_CHECK=--tiny` runs the same code on
# the CPU, `GPU_CHECK='--part 1'` the first six minutes.
gpu-check: install
	$(BIN)/python benchmarks/gpu.py $(GPU_CHECK)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python crds/generate.py --check
	$(BIN)/zizmor --offline --quiet .github

clean:
	rm -rf .venv $(UV_HOME) runs .pytest_cache .mypy_cache .ruff_cache
