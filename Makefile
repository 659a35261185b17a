# make demo   install, train, evaluate and report on the embedded dataset
# make study  install and run the leakage study on it, with three seeds
# make test   install and run the tests (DETECTRON2_SRC=<checkout> for those of a Detectron2 checkout)
# make coverage  the tests, and which lines they run
# make docs   the documentation as a site, output/site; a broken link or reference fails
# make campaign  install and try hundreds of wrong inputs, and trainings that are killed and resumed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.bn_detection
DEMO_DIR ?= output/demo
TEST_JOBS ?= 2

# A checkout of Detectron2 to use in place of the installed one.
ifdef DETECTRON2_SRC
export PYTHONPATH := $(abspath $(DETECTRON2_SRC))$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.PHONY: install demo study test coverage campaign lint docs clean

install: $(STAMP)

$(STAMP): setup.py constraints.txt $(wildcard bn_detection/install_detectron2/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt setuptools --editable ".[dev,docs]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --constraint constraints.txt imagecorruptions-imaug
	$(BIN)/python tools/install_detectron2.py
	touch $@

demo: install
	$(BIN)/python tools/demo.py --output-dir $(DEMO_DIR)

study: install
	$(BIN)/python tools/study.py configs/studies/leakage.yaml --jobs 2

# A file of tests is run by one process, so that what its tests share is made once.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

# Not a part of test: before Python 3.14 it costs a fifth of the time.
coverage: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --cov

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
	rm -rf $(VENV) output datasets build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
