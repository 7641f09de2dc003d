# The same words are used by CI. Test, lint and bench need `make build` (or `pip install -e ".[test]"`) first.
PYTHON ?= python

.PHONY: build test test-gpu lint format bench

build:
	$(PYTHON) -m pip install -c constraints.txt -e ".[test,dev]"

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile tests

# Checks the kernels on the device that torch sees; fails where there is none.
test-gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
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
	for op in add_norm gated_act answer_logits head_write_rows; do $(PYTHON) bench/bench_$$op.py || exit 1; done
