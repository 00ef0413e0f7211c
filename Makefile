# Every target sets up what it needs: Python 3.11 and make are enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/tour
BENCH_VENV := .venv-bench
BENCH ?=
SILENT ?=

.PHONY: tour test unit check format docs lab bench silent silent-trl clean

tour: $(VENV)/ready
	$(BIN)/posttrain tour --out $(OUT)

test: $(VENV)/ready  ## two processes of one thread each: tiny models gain nothing from more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests src --doctest-modules -n 2

unit: $(VENV)/ready
	$(BIN)/python -m pytest tests/unit -n 2

check: $(VENV)/ready
	$(BIN)/ruff format --check src tests recipes benchmarks
	$(BIN)/ruff check src tests recipes benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_house_rules.py

format: $(VENV)/ready
	$(BIN)/ruff format src tests recipes benchmarks
	$(BIN)/ruff check --fix src tests recipes benchmarks

docs: $(VENV)/ready  ## write the pages of methods again
	$(BIN)/python -m posttrain.catalogue docs

lab: $(VENV)/ready  ## make the lab's base model again, from nothing
	$(BIN)/python -m posttrain.lab.pretrain out/lab
	rm -rf src/posttrain/lab/base
	cp -r out/lab/base src/posttrain/lab/base

bench: $(BENCH_VENV)/ready  ## posttrain against TRL; BENCH="--only grpo --sizes 7m" for a part
	PYTHONPATH=benchmarks $(BENCH_VENV)/bin/python -m against_trl $(BENCH)

silent: $(VENV)/ready  ## planted failures; SILENT="--only weights-nan", "--clean" or "--mutants"
	PYTHONPATH=benchmarks $(BIN)/python -m silent_failures $(SILENT)

silent-trl: $(BENCH_VENV)/ready  ## the same failures in TRL
	PYTHONPATH=benchmarks $(BENCH_VENV)/bin/python -m silent_failures --against trl $(SILENT)

$(BENCH_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	    --editable '.[bench]'
	touch $@

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) out
