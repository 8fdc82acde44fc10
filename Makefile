# `make demo` and `make test` are all a newcomer needs: each makes .venv with what it uses.
# Another Python: make PYTHON=python3.12 VENV=.venv-3.12 test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo processes filters digits moving convolution sunspots vanishing memory shuffled frameworks policy \
	test test-long test-all test-types fuzz mutants lint bench docs clean

demo: $(VENV)/.examples  ## train a character model on the language reference of Python
	$(BIN)/python examples/char_lm.py $(ARGS)

processes: $(VENV)/.examples  ## the same model in two processes of two devices each
	$(BIN)/python examples/char_lm_processes.py $(ARGS)

filters: $(VENV)/.examples  ## classical kernels on a photograph: out/filters.png
	$(BIN)/python examples/filters.py $(ARGS)

digits: $(VENV)/.examples  ## train a convolutional network on handwritten digits
	$(BIN)/python examples/digits.py $(ARGS)

moving: $(VENV)/.examples  ## train a ConvLSTM on videos of moving digits: out/moving_digits.png
	$(BIN)/python examples/moving_digits.py $(ARGS)

# The short course of docs/course.md, in its order; each leaves a picture in out/.
convolution: $(VENV)/.examples  ## a kernel over an input, forward and backward, number by number
	$(BIN)/python examples/convolution.py $(ARGS)

sunspots: $(VENV)/.examples  ## foresee the sunspots: AR by least squares and by convolution, latent AR by a GRU
	$(BIN)/python examples/sunspots.py $(ARGS)

vanishing: $(VENV)/.examples  ## where the gradients of RNN, GRU and LSTM die, and what clipping and truncation do
	$(BIN)/python examples/vanishing.py $(ARGS)

memory: $(VENV)/.examples  ## the adding and the copying problem, by window of truncation
	$(BIN)/python examples/long_memory.py $(ARGS)

shuffled: $(VENV)/.examples  ## the same model on the same text, its order destroyed
	$(BIN)/python examples/shuffled.py $(ARGS)

policy: $(VENV)/.examples  ## a policy that remembers, in a maze: out/memory_policy.png
	$(BIN)/python examples/memory_policy.py $(ARGS)

frameworks: $(VENV)/.frameworks  ## inside Flax linen, Flax nnx, Equinox, Haiku: the same losses as their own layers, and the time
	$(BIN)/python examples/frameworks/in_linen.py $(ARGS)
	$(BIN)/python examples/frameworks/in_nnx.py $(ARGS)
	$(BIN)/python examples/frameworks/in_equinox.py $(ARGS)
	$(BIN)/python examples/frameworks/in_haiku.py $(ARGS)

test: $(VENV)/.test  ## the default suite; ARGS="-k truncation" and the like reach pytest
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

test-all: test test-long  ## the default suite, then what takes minutes

test-long: $(VENV)/.test  ## the marker `long`: of the library, then the examples, benchmarks, site and release
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS) -m long --ignore=tests/repository
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS) -m long tests/repository

test-types: $(VENV)/.types  ## the default suite with every annotation of the library checked where its function is called
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --jaxtyping-packages=jaxseq,beartype.beartype $(ARGS)

fuzz: $(VENV)/.frameworks $(VENV)/.test  ## random geometries, options, meshes, right functions; hours, fixed seeds
	PYTHONPATH=. $(BIN)/python tests/fuzz/geometries.py --count 500
	PYTHONPATH=. $(BIN)/python tests/fuzz/options.py --count 300
	PYTHONPATH=. $(BIN)/python tests/fuzz/chooser.py --count 200
	PYTHONPATH=. $(BIN)/python tests/fuzz/meshes.py --count 100
	PYTHONPATH=. $(BIN)/python tests/fuzz/right_functions.py --seeds 3

mutants: $(VENV)/.peers $(VENV)/.test  ## break the library in named ways, and see whether the suite notices; about an hour
	$(BIN)/python tests/mutation/run_mutants.py $(ARGS)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench  ## the tables of docs/measured.md, side by side in one process
	$(BIN)/python -m benchmarks.recurrence $(ARGS)
	$(BIN)/python -m benchmarks.conv $(ARGS)
	$(BIN)/python -m benchmarks.cells $(ARGS)
	$(BIN)/python -m benchmarks.scan $(ARGS)
	$(BIN)/python -m benchmarks.sharding $(ARGS)

docs: $(VENV)/.docs  ## the documentation as a site that reads from the disk: out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# One stamp for each extra of pyproject.toml.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxseq needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) out .cache .pytest_cache .ruff_cache
