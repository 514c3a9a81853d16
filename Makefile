PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PAGES := ensemble_attacks ensemble_attacks.autoattack ensemble_attacks.robustbench ensemble_attacks.diagnostics \
	ensemble_attacks.registry ensemble_attacks.data ensemble_attacks.evaluation.ledger \
	ensemble_attacks.evaluation.runner ensemble_attacks.evaluation.sweep defenses

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

docs: $(STAMP)
	$(VENV)/bin/python -c "import ensemble_attacks as ea, pdoc.__main__; [getattr(ea, name) for name in ea.__all__]; pdoc.__main__.cli(['-d', 'google', '-o', 'site', *'$(PAGES)'.split()])"
