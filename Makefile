# make run    start the server with the embedded model and open its page: talk about a picture
# make answer answer the bundled spoken question about the bundled picture; writes answer.wav
# make test   ruff, mypy and pytest
# make lint   ruff and mypy only
# make clean  forget the environment and the caches
#
# Both install into .venv first, once; another interpreter: make run PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run answer test lint clean

run: $(VENV)/.installed
	$(BIN)/moshivis serve --open

answer: $(VENV)/.installed
	$(BIN)/moshivis talk --example --out answer.wav

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: an interrupted installation leaves none behind and is taken up again.
$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "moshivis needs Python 3.11, 3.12 or 3.13, but there is no '$(PYTHON)' here. Install one of them (Debian,"; \
	  echo "Ubuntu: apt-get install python3 python3-venv) or name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "moshivis needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one:"; \
	  echo "make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "'$(PYTHON)' cannot create environments: its venv module is missing. On Debian and Ubuntu install it with"; \
	  echo "apt-get install python3-venv"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) --editable '.[serve]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) --editable '.[dev,data,eval,mini,serve,train]'
	@touch $@ $(VENV)/.installed
