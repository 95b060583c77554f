# Every target works on a fresh clone: the first one creates .venv and installs the package into it, which needs
# the network once. After that nothing is installed again until one of the files that describe the environment changes.
#
#   make test PYTHON=python3.13             another Python, 3.11 or newer (remove .venv first if it has another)
#   make test CONSTRAINTS=                  the newest releases, not the exact versions of constraints.txt
#   make docs                               the site, in docs/_build/html; a warning is an error
#   make test ARGS='tests/commands/test_cli.py -x'   arguments for pytest

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
# `loadfile` keeps the tests of one file in one process, where they share compiled functions and fixtures.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo demo-pretrained docs test test-slow lint format

demo: $(STAMP)
	$(BIN)/mtp-jax train experiments/code_cpu.py --overwrite
	$(BIN)/mtp-jax generate runs/code_cpu --held-out 3 --max-new-tokens 160
	$(BIN)/mtp-jax bench decode runs/code_cpu --report

# SmolLM2-135M of the package registry, or the model that MTP_JAX_DEMO_MODEL names.
demo-pretrained: $(STAMP)
	$(BIN)/python experiments/pretrained.py

docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

test: $(STAMP)
	$(PYTEST) $(ARGS)

# Pytest exits with 5 where no test is that long.
test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS) || [ $$? = 5 ]

# Pyright would ask the network for a newer release of itself.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mtp_jax needs Python 3.11 or newer, and \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@echo 'Installing mtp_jax and its tools into .venv (about a minute, needs the network)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[dev]'
	@touch $@
