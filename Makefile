PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
DOCS := .venv-docs

.PHONY: install demo test test-hosts lint docs

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q -e '.[dev,all]'
	-$(VENV)/bin/ensemble-attacks doctor
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/ensemble-attacks demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

test-hosts: $(STAMP)
	$(VENV)/bin/python -m pytest -m hosts tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(DOCS)/.installed: docs/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --disable-pip-version-check -q -r docs/requirements.txt
	touch $(DOCS)/.installed
