# make demo   install, train, evaluate and report on the embedded dataset
# make study  install and run the leakage study on it, with three seeds
# make test   install and run the tests (DETECTRON2_SRC=<checkout> for those of a Detectron2 checkout)
# make test-fast  a part of them, in about a minute
# make coverage  the tests, and which lines they run
# make docs   the documentation as a site, output/site; a broken link or reference fails
# make dist   install and build the sdist and the wheel, into dist/
# make campaign  install and try hundreds of wrong inputs, and trainings that are killed and resumed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.bn_detection
DEMO_DIR ?= output/demo
# One more than the cores that it is meant for: tests wait for processes.
TEST_JOBS ?= 3
# A file of tests is run by one process, so that what its tests share is made once.
XDIST = -n $(TEST_JOBS) --dist loadfile

# A checkout of Detectron2 to use in place of the installed one.
ifdef DETECTRON2_SRC
export PYTHONPATH := $(abspath $(DETECTRON2_SRC))$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.PHONY: install demo study dist test test-fast coverage campaign lint docs clean

install: $(STAMP)

# A python3 without ensurepip leaves an environment without pip, which is made anew.
$(STAMP): pyproject.toml constraints.txt $(wildcard bn_detection/install_detectron2/*.*)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	    echo "error: $(PYTHON) has no venv with pip. On Debian and Ubuntu: apt install" \
	    "$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; \
	    exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	    --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
	    --constraint constraints.txt imagecorruptions-imaug
# On all cores, where pip uses one; as for pip, a file that is no Python is no error.
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	$(BIN)/bn-detection install-detectron2
	touch $@

demo: install
	$(BIN)/bn-detection demo --output-dir $(DEMO_DIR)

study: install
	$(BIN)/bn-detection study studies/leakage.yaml --jobs 2

# An sdist and, out of it, a wheel, into dist/.
dist: install
	$(BIN)/python -m build --no-isolation

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST)

# Without tests that have a time limit of their own, as processes and trainings do, and without the
# files that take longest.
SLOW := campaign cli collect collectives configs convert corruptions detector diagnose examples \
    freeze gpu_benchmark install_detectron2 kernels launch population_benchmark population_hook \
    preemption pretend_cuda recalibrate report resume study study_execution train_net wheel
test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) -m "not timeout" \
	    $(SLOW:%=--ignore=tests/test_%.py)

# Not a part of test: before Python 3.14 it costs a fifth of the time.
coverage: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) --cov

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo output/site/index.html

campaign: install
	PYTHONPATH=tests$(if $(PYTHONPATH),:$(PYTHONPATH)) $(BIN)/python -m campaign

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) output datasets build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
