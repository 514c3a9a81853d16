PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: install demo test test-hosts lint

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q -e '.[dev]'
	-$(VENV)/bin/ensemble-attacks doctor
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/ensemble-attacks demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest

test-hosts: $(STAMP)
	$(VENV)/bin/python -m pytest -m hosts tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
