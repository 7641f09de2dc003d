# The same words are used by CI. Test, lint and bench need `make build` (or `pip install -e ".[test]"`) first.
PYTHON ?= python

.PHONY: build test test-gpu lint format bench

build:
	$(PYTHON) -m pip install -c constraints.txt -e ".[test,dev]"

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile tests

# Builds, and checks the kernels and the engine on the device that torch sees; fails where there is none.
test-gpu:
	$(PYTHON) bench/gpu.py --quick
	$(PYTHON) -m pytest tests/ops

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench:
	$(PYTHON) bench/bench_discovery.py
	$(PYTHON) bench/bench_streaming.py
	for op in add_norm gated_act answer_logits head_write_rows slice_grad masked_adamw; do $(PYTHON) bench/bench_$$op.py || exit 1; done
