# .venv is set up on demand: `make run` installs the runtime dependencies, the checks add the test extra.
PYTHON ?= python3
# An index of CPU builds of torch, for machines where the default index provides the CUDA build.
TORCH_INDEX ?=
# Test processes, with one thread each, as more threads would oversubscribe the cores.
JOBS ?= 2
STAGE ?= decode

BIN := .venv/bin
PIP := $(BIN)/python -m pip
# Compiling all of torch's modules takes longer than unpacking them; each is compiled when it is first imported instead.
PIP_INSTALL := $(PIP) install --disable-pip-version-check -qq --no-compile
INSTALL := $(PIP_INSTALL) --constraint constraints.txt
# Everything but torch and Triton, whose builds depend on the GPU, is installed from lock files and must have their hashes.
# HASHES=no, another system or another Python installs the versions of constraints.txt without hashes.
HASHES ?= yes
INSTALL_LOCKED := $(PIP_INSTALL) --no-deps --require-hashes
HAS_LOCK := [ "$(HASHES)" = yes ] && $(BIN)/python -c 'import sys; sys.exit(sys.platform != "linux" or sys.version_info[:2] != (3, 11))'
INSTALL_TORCH := $(INSTALL) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
INSTALL_TRITON := $(INSTALL) "triton; platform_system == 'Linux'"
INSTALL_EDITABLE := $(INSTALL) --no-build-isolation --editable
export PYTHONDONTWRITEBYTECODE :=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
CPP := $(wildcard runtime/kernels/cpu/*.h runtime/kernels/cpu/*.cpp generated/kernels/cpu/*.cpp)
RUN_READY := .venv/.run-ready
TEST_READY := .venv/.test-ready

.DEFAULT_GOAL := help
# Every target with a comment is a command, and not a file.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\#.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

setup: $(TEST_READY) ## Create .venv with the dependencies of running and testing

run: $(RUN_READY) ## Serve a batch of prompts with the bundled tiny model
	$(BIN)/python examples/serve_tiny.py

PORT ?= 8000
serve: $(RUN_READY) ## Serve the bundled tiny model on PORT, and print a curl command
	$(BIN)/sagellm serve examples/tiny_python_model --served-model-name tiny --port $(PORT)

# Files that test-fast skips: those that compile kernels, run thousands of random inputs or start processes.
SLOW := tests/codegen/test_canary.py tests/codegen/test_cases.py tests/codegen/test_fuzz.py tests/codegen/test_incremental.py tests/codegen/test_ops.py \
	tests/codegen/test_writer.py tests/core/test_text.py tests/engine/test_embed.py tests/engine/test_oracle.py \
	tests/engine/test_oracle_experts.py tests/engine/test_oracle_nested.py tests/examples tests/executor tests/kernels tests/loader/test_bad_checkpoints.py \
	tests/models/test_families.py tests/passes/test_rule_validation.py tests/repo/test_commands.py tests/repo/test_docs_excerpts.py \
	tests/repo/test_packaging.py tests/repo/test_quoted_errors.py tests/repo/test_readme.py \
	tests/scheduler/test_comparison.py tests/scheduler/test_determinism.py tests/scheduler/test_fuzz.py \
	tests/scheduler/test_random_schedules.py tests/server tests/sim/test_auto.py tests/sim/test_sarathi.py \
	tests/sim/test_simulate_command.py tests/sim/test_simulator.py tests/text/test_chat_template.py tests/text/test_detokenizer.py \
	generated/tests

test-fast: $(TEST_READY) ## Run the fast part of the suite, in less than a minute
	$(PYTEST) --numprocesses $(JOBS) --dist loadfile $(addprefix --ignore=,$(SLOW))

# After `drift`, `generate` writes nothing but its state, with which tests generate overlays faster. `worksteal` keeps
# tests of a folder together, for their fixtures, and yet all processes are busy until the end.
test: lint types drift ## Run the whole suite: lint, types, drift of generated/, tests
	$(BIN)/sagellm generate
	$(PYTEST) --numprocesses $(JOBS) --dist worksteal

# transformers, the oracle of other tests, does not accept versions that are as low.
LOWEST := tests/codegen/test_cases.py tests/codegen/test_explain.py tests/codegen/test_source.py tests/core tests/engine/test_calls.py \
	tests/engine/test_prompts.py tests/executor/test_kernel_choice.py tests/inspect tests/text/test_chat_messages.py \
	tests/text/test_stop.py tests/text/test_token_text.py

test-lowest: ## Check with the lowest declared versions of the dependencies, in .venv-lowest
	$(PYTHON) -m venv --clear .venv-lowest
	$(PYTHON) tests/repo/lowest.py > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --disable-pip-version-check -qq --no-compile \
	  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") --requirement .venv-lowest/requirements.txt
	PYTHONPATH=_dev .venv-lowest/bin/python -m sageLLM.runtime.cli.entry generate --check
	PYTHONPATH=_dev .venv-lowest/bin/python examples/serve_tiny.py
	PYTHONPATH=_dev OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(LOWEST)

generate: $(RUN_READY) ## Generate code from specs/ into generated/
	$(BIN)/sagellm generate

accept: generate $(TEST_READY) ## Regenerate, rewrite the snapshots, show the changes
	@status=0; SAGELLM_ACCEPT=1 $(PYTEST) --snapshot-update || status=$$?; git --no-pager diff --stat; exit $$status

lint: $(TEST_READY) ## Check lint and format with ruff and clang-format, and the wording of docs and messages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python tests/repo/wording.py --check

types: $(TEST_READY) ## Check types with mypy --strict
	$(BIN)/mypy -p sageLLM

SANITIZE = LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 SAGELLM_COMPILE_TIMEOUT=600 \
	SAGELLM_KERNEL_FLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" \
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest --timeout 1200

sanitize: sanitize-threads sanitize-gemms $(TEST_READY) ## Run the CPU kernels' tests with the address, undefined-behaviour and thread sanitizers
	$(SANITIZE) tests/kernels/test_cpu_thread_pool.py tests/executor/test_streams.py tests/kernels/test_cpu_ops.py tests/kernels/test_cpu_attention.py

sanitize-gemms: $(TEST_READY) ## Run the tests of GEMMs and of caches of codes with the address and undefined-behaviour sanitizers
	$(SANITIZE) tests/kernels/test_cpu_gemm.py tests/kernels/test_coded_gemm.py tests/kernels/test_int8_activations.py tests/kernels/test_kv_codes.py

# Only the kernels and the runner are instrumented. Without address randomisation, for which the sanitizer of gcc 12 has no
# room, and with threads after a fork, which one test makes.
sanitize-threads: $(TEST_READY) ## Run the tests of threads and streams with the thread sanitizer
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so)" \
	TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:die_after_fork=0 SAGELLM_KERNEL_FLAGS="-O1 -g -fsanitize=thread" \
	OMP_NUM_THREADS=2 setarch -R $(BIN)/python -m pytest tests/kernels/test_cpu_thread_pool.py tests/executor/test_streams.py

SEEDS ?=
ONLY ?=
fuzz-scheduler: $(TEST_READY) ## Run random schedules SEEDS=FROM:TO (a million new ones each day); a failing one can be replayed by its seed
	PYTHONPATH=_dev $(BIN)/python tests/scheduler/fuzz.py $(if $(SEEDS),--seeds $(SEEDS)) --jobs $(JOBS)

mutants: $(TEST_READY) ## Check that the tests notice small faults in the scheduler, KV cache, generator and passes; ONLY=TEXT selects
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py --jobs $(JOBS) --only "$(ONLY)"

parallel-layouts: $(TEST_READY) ## Compare two ranks, and two pipeline stages, with one process, for every layout in three modes
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/parallel/layouts.py --modes hybrid,time_share,strict

af-matrix: $(TEST_READY) ## Compare attention and FFN workers with one process, and kill FFN workers at random points
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/parallel/af_matrix.py --kills 3

planner-cases: $(TEST_READY) ## Compare the planner's choices with all other deployments in 30 held cases; takes about 4 minutes of processor time
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/sim/plan_cases.py

dynamo: need-DYNAMO_PYTHON $(TEST_READY) ## Run a worker with the frontend of NVIDIA Dynamo, by DYNAMO_PYTHON, a Python with ai-dynamo and this package's dependencies
	SAGELLM_DYNAMO_PYTHON="$(DYNAMO_PYTHON)" $(PYTEST) tests/deploy/test_dynamo.py

nixl: need-NIXL_PYTHON ## Run the tests of KV transfers over NIXL by NIXL_PYTHON, a Python with nixl and this package's dependencies of testing
	PYTHONPATH=_dev OMP_NUM_THREADS=1 "$(NIXL_PYTHON)" -m pytest tests/transport tests/parallel/test_prefill_decode.py -k nixl

two-hosts: $(TEST_READY) ## Run a deployment by its torchrun commands on two hosts, which are network namespaces; as root
	SAGELLM_TWO_HOSTS=1 $(PYTEST) tests/deploy/test_two_hosts.py

manifests: $(TEST_READY) ## Check the Kubernetes manifests of all deployments with Kubernetes' JSON Schemas, in .venv-manifests
	$(PYTHON) -m venv --clear .venv-manifests
	.venv-manifests/bin/python -m pip install --disable-pip-version-check -qq kubernetes-validate
	PYTHONPATH=_dev $(BIN)/python tests/deploy/print_pods.py | .venv-manifests/bin/python tests/deploy/validate_objects.py

launches: $(TEST_READY) ## Launch ranks with torchrun, and in two network namespaces, and compare with one process
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/parallel/launches.py

KILLS ?= 200
CHAOS_REQUESTS ?= 800
chaos: $(TEST_READY) ## Kill prefill and decode workers at KILLS points of CHAOS_REQUESTS requests, and compare every answer
	PYTHONPATH=_dev $(BIN)/python benchmarks/chaos.py --requests $(CHAOS_REQUESTS) --kills $(KILLS)

TRANSFERS ?= 1000000
chaos-transfers: $(TEST_READY) ## Simulate TRANSFERS (a million) of KV with loss, duplication, reordering and kills; send 100,000 malformed frames
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py --simulated $(TRANSFERS)
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py --frames 100000

fuzz-gguf: $(TEST_READY) ## Read 10^4 GGUF files with mutated headers, 40 times as many as the suite
	SAGELLM_GGUF_SCALE=40 $(PYTEST) --timeout=3600 tests/formats/test_gguf.py -k mutated

fuzz-text: $(TEST_READY) ## Print and parse 50 times as many random graphs as the suite
	SAGELLM_TEXT_SCALE=50 $(PYTEST) --timeout=3600 tests/core/test_text.py

SCHEMAS ?= 0:10000
fuzz-schemas: $(TEST_READY) ## Draw random JSON schemas SCHEMAS=FROM:TO (10,000) and texts of their grammars, and validate the texts
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/grammar/random_schemas.py --seeds $(SCHEMAS)

fuzz-specs: $(TEST_READY) ## Mutate specs, and put hostile texts into them, 50 times as often as the suite; random edits
	SAGELLM_SPEC_SCALE=50 SAGELLM_EDIT_SEEDS=0:50 SAGELLM_EDIT_ROUNDS=2 $(PYTEST) --timeout=7200 tests/codegen/test_fuzz.py tests/codegen/test_canary.py \
	  tests/codegen/test_incremental.py

cases: $(TEST_READY) ## Run all spec cases of tests/codegen/cases by the command; the suite runs a sample
	SAGELLM_CASES=all $(PYTEST) --timeout=3600 --numprocesses $(JOBS) tests/codegen/test_cases.py

CHECKS ?=
conformance: $(TEST_READY) ## Run outside clients and suites against a server, each in an environment; CHECKS="litellm ..." selects
	PYTHONPATH=_dev OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run.py $(if $(CHECKS),--only $(CHECKS))

BODIES ?= 0:100000
fuzz-server: $(TEST_READY) ## Send the random requests BODIES=FROM:TO (100,000) to a server; a failing one can be repeated by its seed
	PYTHONPATH=_dev:tests/server OMP_NUM_THREADS=1 $(BIN)/python tests/server/random_requests.py --seeds $(BODIES)

REQUESTS ?= 1000000
SOAK_SECONDS ?= 7200
SOAK_TOTAL ?=
soak-server: $(TEST_READY) ## Send REQUESTS to a server in SOAK_SECONDS, cancel 30 %, and look for leaks; SOAK_TOTAL=FILE adds up runs
	PYTHONPATH=_dev:tests/server OMP_NUM_THREADS=1 $(BIN)/python tests/server/soak.py --requests $(REQUESTS) --seconds $(SOAK_SECONDS) \
	  $(if $(SOAK_TOTAL),--total "$(SOAK_TOTAL)")

overload-server: $(TEST_READY) ## Measure a server at capacity, at 10x its capacity, and with 1,000 posts at once
	PYTHONPATH=_dev:tests/server OMP_NUM_THREADS=1 $(BIN)/python tests/server/overload.py

# The planted bugs change functions of the scheduler while it runs, which compiled code does not allow.
.PHONY: compiled
compiled: $(TEST_READY) ## Build a wheel with a compiled scheduler and KV manager, install it in out/compiled, and run their tests
	rm -rf out/wheel out/compiled
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 $(BIN)/python -m build --wheel --no-isolation --outdir out/wheel
	$(PIP_INSTALL) --no-deps --no-index --target out/compiled out/wheel/*.whl
	$(PYTEST) --override-ini "pythonpath=out/compiled tests/scheduler tests/sim" --ignore tests/scheduler/test_planted_bugs.py \
	  tests/scheduler tests/kv tests/sim

SCREENSHOTS ?= out/web
web-test: $(TEST_READY) ## Click through the server's web page in headless Chromium, with pictures in SCREENSHOTS
	SAGELLM_SCREENSHOTS="$(SCREENSHOTS)" $(PYTEST) tests/web

interpret: $(TEST_READY) ## Run all checks of the GPU kernels in Triton's interpreter, without a GPU; the suite runs a sample
	SAGELLM_INTERPRET=all $(PYTEST) tests/kernels/triton/test_interpreter.py

aot: $(TEST_READY) ## Compile all GPU kernels for all targets (SAGELLM_AOT=sm_90: for one), without a GPU; SAGELLM_ACCEPT=1 accepts new resource usage
	SAGELLM_AOT=$(or $(SAGELLM_AOT),all) $(PYTEST) tests/kernels/triton/test_compile_ahead.py

drift: $(RUN_READY) ## Fail if generated/ differs from what specs/ and templates/ produce
	$(BIN)/sagellm generate --check

explain: need-NAME $(RUN_READY) ## Print everything known of NAME=<op, model, pass, rule, error code>
	$(BIN)/sagellm explain "$(NAME)"

graph: need-MODEL $(RUN_READY) ## Print the graph of MODEL=<layout> [STAGE=prefill|decode|hybrid]
	$(BIN)/sagellm graph "$(MODEL)" --stage "$(STAGE)"

need-%:
	@test -n "$($*)" || { echo "$* is not set: run make $(MAKECMDGOALS) $*=..." >&2; exit 2; }

bench: $(RUN_READY) ## Measure the figures of the README
	$(BIN)/python benchmarks/run_all.py

peers-setup: $(TEST_READY) ## Make the environments of the other engines, and prepare and check them; takes long, once
	$(BIN)/python benchmarks/peers/environments.py
	PYTHONPATH=_dev $(BIN)/python benchmarks/peers/run.py --prepare

bench-peers: $(TEST_READY) ## Compare with the other engines of make peers-setup, in 25 minutes on a quiet machine, with resume
	PYTHONPATH=_dev $(BIN)/python benchmarks/peers/run.py --drop-caches --minutes 24 --out benchmarks/results/peers.json
	PYTHONPATH=_dev $(BIN)/python benchmarks/peers/publish.py

images: $(RUN_READY) ## Make the pictures of the README; requires Chromium
	$(BIN)/python docs/images/make_images.py

lock: $(TEST_READY) ## Write the lock files again from constraints.txt, on Linux with Python 3.11
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check -qq pip-tools
	$(BIN)/python tests/repo/lock.py

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv .venv-lowest .venv-lock .venv-conformance .venv-manifests .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_READY): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sageLLM requires Python 3.11 or newer, got '$(PYTHON)': run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv (once; torch is about 200 MB as a CPU build)"
	$(PYTHON) -m venv .venv
	@if $(HAS_LOCK); then set -x; $(INSTALL_LOCKED) -r requirements.lock && $(INSTALL_TORCH) && $(INSTALL_EDITABLE) . --no-deps; \
	else echo "Installing the versions of constraints.txt without hashes: requirements.lock is for Linux and Python 3.11"; \
	  set -x; $(INSTALL_TORCH) && $(INSTALL) hatchling && $(INSTALL_EDITABLE) '.[serve]'; fi
	@touch $@

$(TEST_READY): $(RUN_READY) requirements-test.lock
	@if $(HAS_LOCK); then set -x; $(INSTALL_LOCKED) -r requirements-test.lock && $(INSTALL_TRITON); \
	else set -x; $(INSTALL_EDITABLE) '.[test]'; fi
	@touch $@
