# make test    set up .venv and run the tests
# make demo    set up .venv and do the main job on a real model, in front of you
# make lint    style, format and types
# make bench   measure it: targets, statistics, solve, builds, commands (python -m benchmarks --help)
# make docs    the documentation as a site, in site/
# make dist    the wheel and the source archive, in dist/

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin
STAMP := .venv/.complete

.PHONY: venv test test-slow lint demo bench docs dist clean

venv: $(STAMP)

# The stamp comes last: an interrupted set-up is taken up again, a complete one is left alone.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --constraint constraints.txt --editable . --group dev
	touch $(STAMP)

# Two processes with one thread each: the models in the tests are too small for more. Compiled first, as pip
# compiles what it installs: many tests start patchkit anew.
test: venv
	$(BIN)/python -m compileall -q patchkit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m 'not slow and not gpu'

test-slow: venv
	$(BIN)/python -m pytest --timeout 3600 -m 'slow and not gpu'

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: venv
	$(BIN)/python examples/demo.py

bench: venv
	$(BIN)/python -m benchmarks

# A dead link or anchor is an error. The variable silences the theme's notice of its end in 2027.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo site/index.html

dist: venv
	$(BIN)/python -m build

clean:
	rm -rf .venv build demo dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
