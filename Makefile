# Two commands do everything: `make study` and `make test`. Each makes its own .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help study test bench docs peers lint types imports unit clean fuzz validation

help:
	@echo "make study   study the three embedded models; ends with the path of the report"
	@echo "make test    lint, types, import contract, tests"
	@echo "make bench   the benchmarks as one table, some minutes; ARGS=--quick for small sizes"
	@echo "make docs    the documentation as a site; ends with the path of its first page"
	@echo "make peers   the same numbers from pyvene, PyTorch hooks and TransformerLens, in an environment of their own"
	@echo "make validation   each method of localisation against planted circuits, a quarter of an hour; ARGS='--seeds 2' for less"
	@echo "make fuzz    12,000 cases of bad pictures, files, questions and selectors; CASES=100000 for more"
	@echo "make clean   remove .venv and caches"

study: .venv/.ready
	$(BIN)/interp-vlm study $(ARGS)

bench: .venv/.ready
	$(BIN)/python experiments/benchmarks $(ARGS)

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "$(CURDIR)/site/index.html"

peers: .venv-peers/.ready
	.venv-peers/bin/python -m pytest -m peers tests/peers $(ARGS)

test: lint types imports unit

validation: .venv/.ready
	$(BIN)/python -m experiments.ground_truth $(ARGS)

# More cases than the tests try, and other ones at each run; a case that fails is printed whole.
CASES ?= 12000
fuzz: .venv/.ready
	FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -q tests/fuzz

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/pyright

imports: .venv/.ready
	$(BIN)/lint-imports

unit: .venv/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal --nbmake tests docs

# The stamp is the last thing written, so that an interrupted installation starts again.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version); expected Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv/.docs: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

.venv-peers/.ready: pyproject.toml constraints.txt tests/peers/requirements.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -r tests/peers/requirements.txt -e .
	touch $@

clean:
	rm -rf site .venv .venv-peers .pytest_cache .ruff_cache .hypothesis build *.egg-info
