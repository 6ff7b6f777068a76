# Everything runs from .venv, which is made on first use and brought up to date when pyproject.toml changes.
# Marks of the tests to run; `make test MARKS=...` chooses others.
MARKS ?= not slow and not gpu and not hub
PYTHON ?= python3
BIN := .venv/bin
CHROMIUM := /usr/bin/chromium

.PHONY: venv demo test lint bench docs assets chromium

venv: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; sys.exit("fastattr needs Python 3.11 or newer: remove .venv, then make PYTHON=python3.12 venv" if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/fastattr demo

test: venv chromium
	$(BIN)/python -m pytest -m "$(MARKS)"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/emoji.py --quick

docs: venv
	$(BIN)/python -m mkdocs build --strict

assets: venv
	$(BIN)/fastattr build hub_scripts/configs/emoji.yaml --yes --run runs/emoji --assets fastattr/assets/emoji
	$(BIN)/python -m fastattr.evaluation.showcase generated fastattr/assets/emoji/attributor --generator fastattr/assets/emoji/generator
	$(BIN)/python -m fastattr.evaluation.showcase counterfactuals fastattr/assets/emoji/attributor --truth benchmarks/truth/emoji-bench

# The browser tests drive Debian's Chromium; Playwright's own browser build is not used.
chromium:
	@case "$(MARKS)" in *"not browser"*) exit 0;; esac; \
	if [ -x $(CHROMIUM) ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium; \
	else \
		echo "The browser tests need $(CHROMIUM). Install it ('sudo apt-get install chromium'), or leave them out with" >&2; \
		echo "  make test MARKS='$(MARKS) and not browser'" >&2; \
		exit 1; \
	fi
