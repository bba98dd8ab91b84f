# make test   install into .venv with the test extras, run the whole suite
# make demo   install into .venv, draw and upsample images with the bundled models
# make lint   what the tests do not look at
# make soak   what takes too long for make test: kills, launchers and seeds by the dozen

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# One thread per process: the suite runs a process per core, and small networks gain nothing
# from more.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: test demo lint soak clean

test: .venv/test
	$(TEST_ENV) $(BIN)/python -m pytest -n auto

demo: .venv/demo
	$(BIN)/python examples/demo.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: .venv/test
	$(TEST_ENV) $(BIN)/python -m pytest -o addopts="-q --strict-markers" -s tests/soak \
		tests/test_hosts.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[test]"
	touch $@ .venv/demo

clean:
	rm -rf .venv demo_output
