# Thin names over what .ci/run does. Each target installs what it needs, once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-servers setup-test demo demo-cluster proof sapling test check check-k8s check-deploy bench soak

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get
PLAYWRIGHT := agent-worker/playwright/node_modules/.package-lock.json
VENV := target/venv
# Playwright needs Node.js 20; where the machine's is older or missing, one from the package registry stands in.
NODE := target/node
NODE_PACKAGE := node-linux-$(if $(filter aarch64,$(shell uname -m)),arm64,x64)@22
export PATH := $(CURDIR)/$(NODE)/node_modules/.bin:$(PATH)
NPM_QUIET := --ignore-scripts --no-audit --no-fund --loglevel=error
PYTHON_READY := $(VENV)/ready
# What ours is measured against, for `make bench` only.
BULLMQ := target/bench/bullmq/node_modules/.package-lock.json
CELERY := target/bench/celery/ready
# llama.cpp's server, beside which ours is measured, and models of random weights for both.
LLAMA := target/bench/llama
LLAMA_SERVER := $(LLAMA)/llama-server
LLAMA_PYTHON := $(LLAMA)/venv/ready
LLAMA_MODELS := $(LLAMA)/models/tiny/ready $(LLAMA)/models/0.6b/ready
TOKENIZER := crates/qwen3-text/assets/tokenizer.json.zst
PYTHON_NEEDS := examples/python/requirements.txt examples/first-adapter/requirements.txt tests/testbed/requirements.txt
# What checks the Helm chart.
K8S := target/k8s
HELM := $(K8S)/helm
K8S_READY := $(K8S)/venv/ready
# Tests bring features of libraries that programs do without: built together, nothing is built twice. `check` sees to it that programs
# need none of them.
TEST_BUILD := cargo build --locked --workspace --bins --tests
# What some tests hold programs against and is not ours to give away: RunPod's description, the workshop's traces. Where there
# is no copy they are left out, and counted as skipped.
NEED_COPIES := test(/the_workshops_/) | test(/^(scaler::runpod::tests::(client|provider)|runpod::contract)::/) \
	| binary(scenarios) & test(/^runpod(_scaler)?::/)
TESTS := $(if $(wildcard ../shared/data),,-E 'not ($(NEED_COPIES))')

help: ## Lists the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

# --- what is missing -----------------------------------------------------------------------------------------------

# A package is asked for by the command that it brings, so that a machine which has it from elsewhere is left alone.
define need
	@command -v $(1) >/dev/null || { echo "installing $(2)"; $(APT) update -qq; $(APT) install -y -qq --no-install-recommends $(2); }
endef

setup: ## Installs what running needs: a C compiler, Node, Chromium, the locked Playwright MCP server
	$(call need,cc,build-essential)
	$(call need,npm,npm)
	@node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)' 2>/dev/null \
		|| { echo "installing Node.js 22"; npm install --prefix $(NODE) $(NPM_QUIET) $(NODE_PACKAGE); }
	$(call need,chromium,chromium)
	@$(MAKE) --no-print-directory $(PLAYWRIGHT)

setup-servers: setup ## Installs what a cluster needs on top: Redis, an S3 server
	$(call need,redis-server,redis-server)
	$(call need,python3,python3)
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { $(APT) update -qq; $(APT) install -y -qq --no-install-recommends python3-venv; }
	@$(MAKE) --no-print-directory $(PYTHON_READY)

setup-test: setup-servers ## Installs what testing needs on top: cargo-nextest, Python's gRPC tools, the compiler of CUDA kernels, clocks that are wrong
	$(call need,faketime,faketime)
	$(call need,ip,iproute2)
	@command -v cargo-nextest >/dev/null || cargo install cargo-nextest --locked

$(PLAYWRIGHT): agent-worker/playwright/package-lock.json
	cd agent-worker/playwright && npm ci $(NPM_QUIET)
	@touch $@

$(PYTHON_READY): $(PYTHON_NEEDS)
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(PYTHON_NEEDS:%=-r %)
	@touch $@

setup-bench: setup ## Installs what measuring needs on top: Redis, and the queues and the model server that ours are measured against
	$(call need,cmake,cmake)
	$(call need,redis-server,redis-server)
	$(call need,python3,python3)
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { $(APT) update -qq; $(APT) install -y -qq --no-install-recommends python3-venv; }
	@$(MAKE) --no-print-directory $(BULLMQ) $(CELERY) $(LLAMA_SERVER) $(LLAMA_MODELS)

$(BULLMQ): $(wildcard examples/bench/bullmq/*)
	@mkdir -p target/bench/bullmq
	@cp $^ target/bench/bullmq
	@# `npm ci` refuses a lock without packages for other systems that the registry does not have.
	@cd target/bench/bullmq && npm install --no-save $(NPM_QUIET) >&2
	@touch $@

$(CELERY): examples/bench/celery/requirements.txt
	python3 -m venv target/bench/celery
	target/bench/celery/bin/pip install --quiet -r $<
	@touch $@

$(K8S_READY): k8s/requirements.txt deploy/requirements.txt
	$(call need,python3,python3)
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { $(APT) update -qq; $(APT) install -y -qq --no-install-recommends python3-venv; }
	python3 -m venv $(K8S)/venv
	$(K8S)/venv/bin/pip install --quiet $(^:%=-r %)
	@touch $@

$(HELM): k8s/helm.txt k8s/unpack_helm.py | $(K8S_READY)
	@rm -rf $(K8S)/package
	$(K8S)/venv/bin/pip download --quiet --no-deps --dest $(K8S)/package -r $<
	python3 k8s/unpack_helm.py $(K8S)/package $@
	@rm -rf $(K8S)/package

$(LLAMA_PYTHON): examples/bench/llama/requirements.txt
	python3 -m venv $(LLAMA)/venv
	$(LLAMA)/venv/bin/pip install --quiet -r $<
	@touch $@

# Built here, for the instructions that this machine has. The source package of its Python bindings carries all of it.
$(LLAMA_SERVER): examples/bench/llama/source.txt | $(LLAMA_PYTHON)
	@rm -rf $(LLAMA)/source $(LLAMA)/build
	$(LLAMA)/venv/bin/pip download --quiet --no-deps --no-binary :all: --dest $(LLAMA)/source -r $<
	tar xzf $(LLAMA)/source/*.tar.gz -C $(LLAMA)/source --strip-components=1
	cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF >$(LLAMA)/build.log
	cmake --build $(LLAMA)/build --target llama-server --parallel $$(nproc) >>$(LLAMA)/build.log
	@cp $(LLAMA)/build/bin/llama-server $@
	@rm -rf $(LLAMA)/source $(LLAMA)/build

$(LLAMA)/models/tiny/ready: examples/bench/llama/model.py $(LLAMA_PYTHON)
	$(LLAMA)/venv/bin/python $< tiny $(@D) $(TOKENIZER)
	@touch $@

$(LLAMA)/models/0.6b/ready: examples/bench/llama/model.py $(LLAMA_PYTHON)
	$(LLAMA)/venv/bin/python $< 0.6b $(@D) $(TOKENIZER) bf16 q8_0
	@touch $@

# --- what people do ------------------------------------------------------------------------------------------------

demo: setup ## Trains a small model in a closed loop, in real browsers on this machine, and prints what it solves before and after
	cargo build --locked --release -p espalier-cli --bin espalier
	examples/sapling/demo.sh target/release

proof: setup ## The same on three sites, each with ways of its own
	cargo build --locked --release -p espalier-cli --bin espalier
	for site in 3 5 7; do examples/sapling/demo.sh target/release $$site; done

sapling: ## Makes that small model anew in target/sapling: minutes on a GPU, days without
	cargo build --locked --release -p espalier-cli -p espalier-sapling -p espalier-infer-worker --bin espalier --bin sapling --bin espalier-infer-worker
	examples/sapling/make.sh target/release target/sapling

demo-cluster: setup-servers ## The same with Redis, S3, two coordinators and three workers, of which some are killed
	cargo build --locked --release -p espalier-cli -p espalier-coordinator -p espalier-agent-worker -p espalier-tests --bin espalier --bin espalier-coordinator --bin espalier-agent-worker --bin scripted-model
	examples/practice/demo-cluster.sh target/release $(VENV)/bin/weed

test: setup-test ## Runs all tests, with real browsers and real processes
	$(TEST_BUILD)
	cargo nextest run --locked --workspace $(TESTS)

check: ## Format, lints, rules of the tree
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo check --locked --workspace --bins

check-k8s: $(K8S_READY) $(HELM) ## What the Helm chart renders to, by schemas, by rules of safety, and against the programs
	$(K8S)/venv/bin/python k8s/check.py $(HELM)

check-deploy: $(K8S_READY) ## What images are made of, and the file of Compose
	$(K8S)/venv/bin/hadolint deploy/Dockerfile
	$(K8S)/venv/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

bench: ## Measures; JSON lines on standard output, everything else on standard error
	@$(MAKE) --no-print-directory setup-bench >&2
	@cargo build --locked --release -p espalier-cli -p espalier-tests -p espalier-coordinator -p espalier-infer-worker --bin espalier --bin scripted-model --bin toy-mcp --bin espalier-coordinator --bin espalier-infer-worker >&2
	@examples/practice/bench.sh target/release target/bench

soak: setup-test ## 1,000 rounds of random kill -9, and as many of random faults over a cluster
	$(TEST_BUILD)
	ESPALIER_SOAK_ROUNDS=1000 cargo nextest run --locked --workspace --profile soak -E 'package(espalier-tests) & test(/::random_/)'
