# `make demo` and `make test` are all a newcomer needs: both install into .venv first, when something has changed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv/.docs-installed

.PHONY: demo test test-all install check lint types layers docs curve clean

demo: $(INSTALLED)
	$(BIN)/flashgrpo demo

# Every golden number, first ratio, refusal, and a resume after kill -9: a few minutes on two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# The rest: kill storms, numbers of processes, browsers, Ray, whole runs of every family (tests/slow.txt lists them).
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --durations=20 -m slow

install: $(INSTALLED)

check: lint types layers test-all

lint: $(INSTALLED)
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/ruff format --check src tests tools benchmarks

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

# The loss curves of this commit and of another one on this machine, compared to the last digit.
curve: $(INSTALLED)
	$(BIN)/python -m tools.curve --against $(AGAINST)

# The documentation site, into site/; what its pages say is tested by tests/test_docs.py.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS_INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

clean:
	rm -rf .venv
