# Two commands on a fresh machine: `make run` (install, then the main job on the built-in model) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# real models and texts for the benches that use them
SHARED ?= ../shared

.PHONY: install run test test-all check bench system-deps peers clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

run: install                ## the main job: a ranked table and plots of the KV-cache methods on the built-in model
	$(BIN)/broadsheet compare caches --budgets 0.25 --html out/caches.html --json out/caches.json

test: install               ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install           ## the slow ones too, and new examples for the properties
	HYPOTHESIS_PROFILE=default $(BIN)/python -m pytest -m "not gpu and not peers"

check: install              ## lint, types, fast tests
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest

peers: install              ## the libraries that the benches compare with, and their tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]"
	$(BIN)/python -m pytest -m peers

bench: install              ## rewrites every committed number under benchmarks/results, the claims page and the pictures
	$(BIN)/python benchmarks/pocket_card.py --sessions 8
	$(BIN)/python benchmarks/caches.py
	$(BIN)/python benchmarks/caches_ablations.py --scale 0.6
	$(BIN)/python benchmarks/caches_ablations.py --model pocket-2m-mha --study xquant --scale 0.7
	$(BIN)/python benchmarks/caches_ablations.py --model $(SHARED)/models/stories260K --text $(SHARED)/data/tinystories_wikitext_1000/tinystories_1000.json
	$(BIN)/python benchmarks/mpcache_study.py
	$(BIN)/python benchmarks/bfp_study.py
	$(BIN)/python benchmarks/decode_kernel.py
	$(BIN)/python benchmarks/bitstack_resize.py
	$(BIN)/python benchmarks/group_matmul.py
	$(BIN)/python benchmarks/olive_kernel.py
	$(BIN)/python benchmarks/aqlm_kernel.py
	$(BIN)/python benchmarks/aqlm_sizes.py
	$(BIN)/python benchmarks/weights.py
	$(BIN)/python benchmarks/bitstack_study.py
	$(BIN)/python benchmarks/bitstack_regions.py
	$(BIN)/python benchmarks/olive_study.py
	$(BIN)/python benchmarks/crash_study.py
	$(BIN)/python benchmarks/outliertune_study.py
	$(BIN)/python benchmarks/integer_linear.py
	$(BIN)/python benchmarks/dfloat11_decode.py
	$(BIN)/python benchmarks/dfloat11_context.py
	$(BIN)/python benchmarks/code_study.py
	$(BIN)/python benchmarks/accllm_ladder.py
	$(BIN)/python benchmarks/accllm_ladder.py --model $(SHARED)/models/stories260K --text $(SHARED)/data/tinystories_wikitext_1000/tinystories_1000.json --tokens 160 --items 48 --out benchmarks/results/accllm_ladder.stories260K.records.json
	$(BIN)/python benchmarks/chat_harness.py
	$(BIN)/python benchmarks/longproc_study.py --official $(SHARED)/data/longproc
	$(BIN)/python benchmarks/fingpt_benchmark_study.py --shared $(SHARED)/data
	$(BIN)/python benchmarks/enamel_study.py --data $(SHARED)/data/enamel
	$(BIN)/python benchmarks/muldimif_study.py --data $(SHARED)/data/muldimif
	$(BIN)/python benchmarks/vif_rag_study.py
	$(BIN)/python benchmarks/decrim_study.py
	$(BIN)/python benchmarks/spar_study.py
	$(BIN)/python benchmarks/sequential_monitors_study.py
	$(BIN)/python benchmarks/instinct_study.py
	$(BIN)/python benchmarks/estimates.py
	$(BIN)/python benchmarks/long_context_peak.py
	$(BIN)/python benchmarks/flexsp_study.py
	$(BIN)/python benchmarks/flexsp_executor.py
	$(BIN)/python benchmarks/megascale_tables.py
	$(BIN)/python benchmarks/megascale_faults.py
	$(BIN)/python benchmarks/megascale_diagnosis.py
	$(BIN)/python benchmarks/megascale_goodput.py
	$(BIN)/python benchmarks/melt_study.py
	$(BIN)/python benchmarks/mlir_cost_study.py corpus
	$(BIN)/python benchmarks/mlir_cost_study.py models ensemble order speed clock transfer plans fusion unroll remat report
	$(BIN)/python benchmarks/evals_over_http.py
	$(BIN)/python benchmarks/web_search.py
	$(BIN)/python benchmarks/web_faults.py
	$(BIN)/python benchmarks/web_report.py
	$(BIN)/python benchmarks/web_pictures.py
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/broadsheet claims --write

DEBIAN := bubblewrap g++ chromium postgresql
system-deps:                ## for the sandbox's and the page's tests, which skip where one of these is missing
	@if command -v bwrap >/dev/null && command -v g++ >/dev/null && command -v chromium >/dev/null && \
		ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then echo "here: $(DEBIAN)"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		(apt-get install -y -qq --no-install-recommends $(DEBIAN) || (apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends $(DEBIAN))) >/dev/null 2>&1 || echo "not installed: $(DEBIAN)"; \
	else echo "install $(DEBIAN) to run all tests"; fi

clean:
	rm -rf $(VENV) out build dist
