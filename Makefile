# make demo: set everything up and render two job files with a small model.
# make quick: the tests that start no daemon, in a minute.  make test: all tests.
# make soak: 10,000 images and 500 kills among people, about 15 minutes; root becomes other users.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread each: the small model is fastest so, and encoding has the other core.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test quick late soak lint fuzz hashes audit clean

$(VENV)/installed: pyproject.toml constraints.txt constraints-hashed.txt
	@echo "installing into $(VENV): torch, diffusers and friends, some minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement constraints-hashed.txt
	@$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/installed
	@mkdir -p demo
	@cp -n examples/config.yaml demo/config.yaml || true
	@test -d demo/model || $(BIN)/promptdrop model demo demo/model
	@$(BIN)/promptdrop init demo >/dev/null
	@$(BIN)/promptdrop submit --config demo/config.yaml examples/shapes.txt examples/scenes.yaml
	@$(BIN)/promptdrop run --config demo/config.yaml --drain
	@$(BIN)/python examples/contact_sheet.py demo/spool/outbox demo/sheet.png

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Whatever starts no daemon and imports no torch: within a minute.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick

# Tests of daemons that are late at random, as on a busy machine: what takes a moment for granted fails.
late: $(VENV)/installed
	PYTHONPATH=$(CURDIR)/tests/support/late $(BIN)/python -m pytest -n 5 --dist worksteal \
	    tests/daemon tests/hosts tests/kept --deselect tests/daemon/test_crash.py

soak: $(VENV)/installed
	$(BIN)/python tests/support/soak.py --people --workers 3 --images 10000 --kills 500

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# SECONDS of coverage-guided fuzzing; what it found stays in fuzz/ and is where the next run begins.
SECONDS ?= 600
fuzz: $(VENV)/installed
	$(BIN)/python tests/support/fuzz.py fuzz -max_total_time=$(SECONDS)

# After a change to constraints.txt. torch has no hash: its CPU and CUDA builds share a version.
hashes: $(VENV)/installed
	$(BIN)/python -m pip install --quiet uv
	grep -v ^torch== constraints.txt | $(BIN)/uv pip compile --quiet --no-deps --generate-hashes \
	    --universal --python-version 3.11 --no-annotate --no-header - --output-file constraints-hashed.txt

# Needs the network: asks a vulnerability database about every pin.
audit: $(VENV)/installed
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --no-deps --disable-pip --requirement constraints-hashed.txt

clean:
	rm -rf demo $(VENV)
