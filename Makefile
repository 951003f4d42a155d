# Everything runs in .venv with the versions of constraints.txt. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

FLOOR := .floor/bin
NEWEST := .newest/bin
PEERS := .peers/bin
# of the training layer, what stands on transformers and peft
ON_TRANSFORMERS := $(addprefix tests/fpo_train/test_,policy.py generation.py decoding.py trial.py loop.py reward_model.py weights.py)
ON_TRL := $(addprefix tests/fpo_train/test_,trl.py reward_function.py monitor.py)
# a native build that fails ends the target; 0 goes on without, as plain pip does
FPO_REQUIRE_NATIVE ?= 1

export TOKENIZERS_PARALLELISM := false
export FPO_REQUIRE_NATIVE

.PHONY: help setup demo test slow floor newest lint docs bench peers carried clean

# a copy of the tree in $(1): its libraries are built against the torch there, and not in place of those of .venv
define copy
mkdir -p $(1)/tree
cd $(1)/tree && rm -rf csrc fpo_kernels fpo_train benchmarks tests
cp -rp csrc fpo_kernels fpo_train benchmarks tests setup.py pyproject.toml README.md LICENSE $(1)/tree
rm -f $(1)/tree/fpo_kernels/_native*
endef

help: ## say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv, install pinned torch and this package (editable; what native code can be built must build)

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

slow: $(STAMP) ## run the tests on the real model (SmolLM2), and the C++ kernels under sanitizers, some minutes
	$(BIN)/python -m pytest tests -m slow

# 900 s: compiling every Triton kernel anew takes minutes where the machine is busy
floor: ## build and test with the oldest versions served (constraints-floor.txt), in .floor: about a quarter of an hour
	test -x $(FLOOR)/python || $(PYTHON) -m venv .floor
	$(FLOOR)/python -m pip install --quiet --disable-pip-version-check -c constraints-floor.txt torch setuptools numpy
	$(call copy,.floor)
	$(FLOOR)/python -m pip install --quiet --disable-pip-version-check -c constraints-floor.txt --no-build-isolation \
		-e '.floor/tree[triton]' hypothesis pytest pytest-benchmark pytest-timeout pytest-xdist
	cd .floor/tree && OMP_NUM_THREADS=1 ../bin/python -m pytest -n 2 --dist loadfile --timeout 900 -p no:cacheprovider \
		tests/fpo_kernels tests/compile_only tests/gpu $(ON_TRANSFORMERS)
	cd .floor/tree && ../bin/python -m pytest -p no:cacheprovider -m slow tests/test_sanitizers.py

# TRL's oldest asks for younger tools than the rest does, and for requests without saying so
	grep -E '^(torch|transformers|peft|triton)=' constraints-floor.txt > .floor/trl.txt
	$(FLOOR)/python -m pip install --quiet --disable-pip-version-check -c .floor/trl.txt accelerate==1.4.0 trl==1.10.0 requests
	cd .floor/tree && OMP_NUM_THREADS=1 ../bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider $(ON_TRL)

# torch is the pinned one, all else as new as the bounds of pyproject.toml let it be; peft itself asks for the old name
newest: ## test what stands on transformers and peft with their newest releases, in .newest: a few minutes
	test -x $(NEWEST)/python || $(PYTHON) -m venv .newest
	grep '^torch==' constraints.txt > .newest/torch.txt
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check -c .newest/torch.txt torch setuptools numpy
	$(call copy,.newest)
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check -c .newest/torch.txt --no-build-isolation \
		--upgrade --upgrade-strategy eager -e '.newest/tree[trl]' \
		hypothesis pytest pytest-benchmark pytest-timeout pytest-xdist
	cd .newest/tree && OMP_NUM_THREADS=1 ../bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider \
		-W error::FutureWarning -W 'ignore:`is_gradient_checkpointing` is deprecated:FutureWarning' $(ON_TRANSFORMERS)
	cd .newest/tree && OMP_NUM_THREADS=1 ../bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider $(ON_TRL)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build README and docs/ into site/, with the API from docstrings; open site/index.html
	$(BIN)/python -m mkdocs build --strict

peers: ## make .peers, other people's packages for `python -m benchmarks run packages`
	test -x $(PEERS)/python || $(PYTHON) -m venv .peers
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools numpy
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r benchmarks/packages/requirements.txt
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		-r benchmarks/packages/alone.txt

carried: ## make .peers/carried, those of them that are pure Python, for a machine without a network
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .peers/carried \
		-r benchmarks/packages/carried.txt

bench: $(STAMP) ## run every benchmark case and write benchmarks/results/<device>/
	$(BIN)/python -m benchmarks run all

clean: ## remove what make built (.venv, .floor, .newest, native libraries, caches), never runs/
	rm -rf .venv .floor .newest build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis fpo_kernels/_native*
