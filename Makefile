# make demo: set everything up and render two job files with a small model.  make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread each: the small model is fastest so, and encoding has the other core.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): torch, diffusers and friends, some minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/installed
	@mkdir -p demo
	@cp -n examples/config.yaml demo/config.yaml || true
	@test -d demo/model || $(BIN)/promptdrop model demo demo/model
	@$(BIN)/promptdrop init demo
	@$(BIN)/promptdrop submit --config demo/config.yaml examples/shapes.txt examples/scenes.yaml
	@$(BIN)/promptdrop run --config demo/config.yaml --drain
	@$(BIN)/python examples/contact_sheet.py demo/spool/outbox demo/sheet.png

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo $(VENV) build
