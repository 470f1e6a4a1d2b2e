# The commands of the project. `make` alone lists them.

CARGO ?= cargo
RUSTDOCFLAGS := -D warnings

.PHONY: help demo build man install uninstall test sim soak model bench bench-engine bench-jobs lint guest clients fuzz fuzz-corpus clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | \
		awk -F':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo: guest ## Boot a guest on a voted disk, corrupt a replica under it, and watch
	$(CARGO) build --release --locked --quiet
	tests/guest/demo.sh

build: ## Build the daemon (target/release/quorum-blkd)
	$(CARGO) build --release --locked

man: ## Write the man pages and the completions for shells (target/manual)

install: ## Install it all: PREFIX=/usr/local, DESTDIR=, and a variable for each directory (packaging/install.mk)

uninstall: ## Remove what `make install` has installed, given the same variables

include packaging/install.mk

test: guest clients lint ## Everything that checks the project
	$(CARGO) test --locked --workspace --no-fail-fast -- --nocapture
	$(MAKE) model
	$(MAKE) sim SECONDS=60

sim: ## Random runs in the simulator: SEEDS=n, or SECONDS=n, or SEED=s to replay one
	QUORUM_BLK_SIM_SEEDS=$(SEEDS) QUORUM_BLK_SIM_SEED=$(SEED) QUORUM_BLK_SIM_SECONDS=$(SECONDS) \
		$(CARGO) test --locked --profile sim --features sim --test sim -- --nocapture $(if $(SEED)$(SEEDS),keeps_the_contract)

soak: ## Kill the daemon under load, for SECONDS=n in each of three ways; SEED=s for the same requests
	QUORUM_BLK_SOAK_SECONDS=$(SECONDS) $(if $(SEED),QUORUM_BLK_TEST_SEED=$(SEED)) \
		$(CARGO) test --locked --release --test device daemon_killed -- --nocapture

model: ## Every interleaving of what worker threads share (loom)
	$(CARGO) test --locked --target-dir target/model --features loom --lib engine::shared

fuzz: ## Feed the device with hostile input for SECONDS=60 each; TARGET=name: only that one (fuzz/README.md)
	SECONDS_EACH=$(SECONDS) fuzz/run.sh $(TARGET)

fuzz-corpus: ## Make the committed inputs of the fuzzer anew from all it has found
	fuzz/run.sh --corpus $(TARGET)

bench-engine: ## Instructions of the engine for each request: as recorded (RECORD=1: record), and how they scale
	$(CARGO) bench --locked --bench engine -- $(if $(RECORD),--record)

bench-jobs: ## What a scrub and a resync cost a guest: ONLY=row, BENCH_SECONDS=0.5, BENCH_ROUNDS=7, BENCH_DIR=directory
	BENCH_ONLY='$(ONLY)' $(CARGO) bench --locked --quiet --bench jobs

bench: guest ## Compare with qemu-storage-daemon: ONLY=row, BENCH_SECONDS=1, BENCH_ROUNDS=3, BENCH_DIR=directory
	BENCH_ONLY='$(ONLY)' $(CARGO) bench --locked --quiet --bench disk

lint: ## Formatting, clippy and documentation, warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(CARGO) metadata --locked --manifest-path fuzz/Cargo.toml --format-version 1 >/dev/null
	$(CARGO) clippy --locked --workspace --all-targets --features sim -- -D warnings
	RUSTDOCFLAGS='$(RUSTDOCFLAGS)' $(CARGO) doc --locked --workspace --features sim --no-deps --document-private-items --quiet

guest: ## Install QEMU and prepare the small Linux guest of the demo and the tests
	tests/guest/prepare.sh

clients: ## Fetch the programs of others that the tests of the monitor, the metrics and the installation use
	tests/clients/prepare.sh

clean: ## Remove everything that was built
	$(CARGO) clean
	$(CARGO) clean --manifest-path fuzz/Cargo.toml
