# make demo: a real language model, improved by PPO.   make test: the whole suite.   make check: lint, types, layers, tests.
# make pictures: the pictures of docs/, drawn anew.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check results pictures learning faults soak fuzz large setup clean

demo: setup
	$(BIN)/upslope train sentiment-ppo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

results: setup  # every recipe against its supervised start, what has no record yet, two at once; writes docs/results.md
	$(BIN)/python -m results --at-once 2

learning: setup  # every algorithm on two small tasks; writes its table into docs/algorithms.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.learning

pictures: setup
	OMP_NUM_THREADS=1 $(BIN)/python docs/pictures.py

# What takes long; each writes its section of docs/reliability.md.
faults: setup  # 200 runs struck at random points
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign

soak: setup  # an hour of training: memory and step time must stay
	$(BIN)/python -m tests.faults.soak

fuzz: setup  # ten minutes of malformed input for every reader
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python -m tests.faults.fuzz

large: setup  # a gigabyte of rows
	$(BIN)/python -m tests.faults.large

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "upslope needs Python 3.11 or later: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || { $(PYTHON) -m venv --clear --without-pip .venv && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }  # Debian's python3 comes without ensurepip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
