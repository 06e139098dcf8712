# Every target does its own set-up, in .venv; running one twice installs once.
# PYTHON=/path/to/python3 names another Python; ARGS="..." is passed on.

BIN := .venv/bin
NB ?=
JOBS ?= 2

export OMP_WAIT_POLICY := PASSIVE
export PYTHONHASHSEED := 0
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test lab docs check coverage faults bench sync clean env-demo env-dev env-bench

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

env-demo env-dev env-bench:
	@scripts/setup $(@:env-%=%)

demo: env-demo  ## train, tune and compress a small language model: demo/report.html
	@$(BIN)/gfopt demo $(ARGS)

test: env-dev  ## every notebook, every test, the drift checks, the site
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=8 --durations-min=5 $(ARGS)

lab: env-dev  ## read and run the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb $(ARGS)

docs: env-dev  ## the site, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

check: env-dev  ## drift between notebooks, package and README; the book's rules; lint; types
	@bad=0; for step in "python docs/tools.py check" "python docs/tools.py survey" "ruff check" mypy; do \
	  echo "$$step"; $(BIN)/$$step || bad=1; done; exit $$bad

coverage: env-dev  ## which lines and branches of the package the tests reach (ARGS="tests/test_study.py" for some)
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n $(JOBS) --dist worksteal --ignore tests/test_notebooks.py $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report
	@json=$$(mktemp) && $(BIN)/coverage json -q -o $$json; \
	  $(BIN)/python docs/tools.py coverage $$json; bad=$$?; rm -f $$json; exit $$bad

faults: env-dev  ## plant every known fault in a copy; the tests must find each (ARGS="search" for one area)
	$(BIN)/python docs/tools.py faults $(ARGS)

sync: env-dev  ## after editing notebooks: clean, export, run and store, README (NB="a.ipynb ..." for some)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python docs/tools.py run -j $(JOBS) $(NB)
	$(BIN)/python docs/tools.py readme

bench: env-dev env-bench  ## run the recorded experiments again, slow cells included
	$(BIN)/python docs/tools.py run -j 1 --flags slow -- $(or $(NB),$(wildcard nbs/6_experiments/*.ipynb))

clean:  ## remove everything that was made, .venv included
	rm -rf .venv demo docs/_build docs/notebooks docs/api docs/index.ipynb
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
