# Everything runs in .venv with the versions of constraints.txt. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test slow lint bench clean

help: ## say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv, install pinned torch and this package (editable, native library in place)

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## train SmolLM2 by plain RLHF and by FPO, side by side; the report is runs/demo/report.html
	$(BIN)/fpo-train fetch smollm2
	rm -rf runs/demo
	$(BIN)/fpo-train run --config demo.yaml --compare none,practical,relaxed --out runs/demo

# a file a process: two with a thread each take half the time of one with two
test: $(STAMP) ## run the tests, but for those on the real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

slow: $(STAMP) ## run the tests on the real model (SmolLM2), some minutes
	$(BIN)/python -m pytest tests -m slow

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## run every benchmark case and write benchmarks/results/<device>/
	$(BIN)/python -m benchmarks run all

clean: ## remove what make built (.venv, native library, caches), never runs/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis fpo_kernels/*.so
