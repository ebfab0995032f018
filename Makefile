# Two commands are all a newcomer needs: `make study` and `make test`. Both make .venv and install into it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux the default torch brings gigabytes of CUDA; where a CPU build of this version is offered it is taken first.
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

.PHONY: study test test-unit lint format docs clean install

study: install
	$(BIN)/kvwise study --output study-out --overwrite-own

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-unit: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --ignore=tests/end_to_end

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages that are generated from the code; the tests fail when one is stale.
docs: install
	$(BIN)/python -m kvwise.models.support > docs/models.md
	$(BIN)/python -m kvwise.tasks.page > docs/tasks.md
	$(BIN)/python -m kvwise.methods.page > docs/methods.md
	$(BIN)/python -m kvwise.server.observing.metrics_page > docs/observability.md

install: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build study-out
