# Each target installs its dependencies into .venv first. Start with `make demo` and `make test`.
# To use another Python: make PYTHON=python3.12 VENV=.venv-3.12 test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo processes filters digits moving sequential convolution highlight sunspots vanishing memory shuffled \
	frameworks policy test test-long test-all test-types fuzz mutants lint bench accelerators docs clean

demo: $(VENV)/.examples  ## train a character model on the Python language reference: out/char_lm/curve.png
	$(BIN)/python examples/char_lm.py $(ARGS)

processes: $(VENV)/.examples  ## train the same model in two processes with two devices each
	$(BIN)/python examples/char_lm_processes.py $(ARGS)

filters: $(VENV)/.examples  ## apply classical kernels to a photograph: out/filters.png
	$(BIN)/python examples/filters.py $(ARGS)

digits: $(VENV)/.examples  ## train a convolutional network on handwritten digits: out/digits.png
	$(BIN)/python examples/digits.py $(ARGS)

moving: $(VENV)/.examples  ## train a ConvLSTM on videos of moving digits: out/moving_digits.png
	$(BIN)/python examples/moving_digits.py $(ARGS)

sequential: $(VENV)/.examples  ## classify digits pixel by pixel with S5, LRU and GRU: out/sequential_digits.png
	$(BIN)/python examples/sequential_digits.py $(ARGS)

# The tutorials of docs/course.md, in the same order. Each writes a plot to out/.
convolution: $(VENV)/.examples  ## show convolution and its gradients step by step
	$(BIN)/python examples/convolution.py $(ARGS)

highlight: $(VENV)/.examples  ## highlight Python source: windows of characters against the state of a GRU
	$(BIN)/python examples/highlight.py $(ARGS)

sunspots: $(VENV)/.examples  ## forecast sunspots: AR by least squares and by convolution, latent AR with a GRU
	$(BIN)/python examples/sunspots.py $(ARGS)

vanishing: $(VENV)/.examples  ## vanishing and exploding gradients of RNN, GRU and LSTM; clipping and truncation
	$(BIN)/python examples/vanishing.py $(ARGS)

memory: $(VENV)/.examples  ## the adding and the copying task with different truncation windows
	$(BIN)/python examples/long_memory.py $(ARGS)

shuffled: $(VENV)/.examples  ## train the same model on a text, on shuffled words and on shuffled characters
	$(BIN)/python examples/shuffled.py $(ARGS)

policy: $(VENV)/.examples  ## train a recurrent policy in a T-maze: out/memory_policy.png
	$(BIN)/python examples/memory_policy.py $(ARGS)

frameworks: $(VENV)/.frameworks  ## compare with layers of Flax linen, Flax nnx, Equinox and Haiku
	$(BIN)/python examples/frameworks/in_linen.py $(ARGS)
	$(BIN)/python examples/frameworks/in_nnx.py $(ARGS)
	$(BIN)/python examples/frameworks/in_equinox.py $(ARGS)
	$(BIN)/python examples/frameworks/in_haiku.py $(ARGS)

test: $(VENV)/.test  ## run the default suite; ARGS="-k truncation" is passed to pytest
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

test-all: test test-long  ## run the default suite, then the long tests

test-long: $(VENV)/.test  ## run tests marked `long`: library, examples, benchmarks, site and release
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS) -m long --ignore=tests/repository
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS) -m long tests/repository

test-types: $(VENV)/.types  ## run the default suite with runtime checks of all annotations of the library
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --jaxtyping-packages=jaxseq,beartype.beartype $(ARGS)

fuzz: $(VENV)/.frameworks $(VENV)/.test  ## run the fuzz tests: hours, with fixed seeds
	PYTHONPATH=. $(BIN)/python tests/fuzz/geometries.py --count 500
	PYTHONPATH=. $(BIN)/python tests/fuzz/options.py --count 300
	PYTHONPATH=. $(BIN)/python tests/fuzz/chooser.py --count 200
	PYTHONPATH=. $(BIN)/python tests/fuzz/meshes.py --count 100
	PYTHONPATH=. $(BIN)/python tests/fuzz/right_functions.py --seeds 3

mutants: $(VENV)/.peers $(VENV)/.test  ## run mutation tests: about an hour
	$(BIN)/python tests/mutation/run_mutants.py $(ARGS)

lint: $(VENV)/.dev  ## check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(VENV)/.bench  ## run the benchmarks of docs/measured.md
	$(BIN)/python -m benchmarks.recurrence $(ARGS)
	$(BIN)/python -m benchmarks.conv $(ARGS)
	$(BIN)/python -m benchmarks.cells $(ARGS)
	$(BIN)/python -m benchmarks.scan $(ARGS)
	$(BIN)/python -m benchmarks.linear $(ARGS)
	$(BIN)/python -m benchmarks.forward_mode $(ARGS)
	$(BIN)/python -m benchmarks.sharding $(ARGS)

accelerators: $(VENV)/.accelerators  ## count what programs for a GPU and TPUs would run; pass VENV=.venv-accelerators
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.accelerators $(ARGS)

docs: $(VENV)/.docs  ## build the documentation for offline reading: out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# One stamp file per extra of pyproject.toml.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxseq needs Python 3.11 or newer; select one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) out .cache .pytest_cache .ruff_cache
