# The commands of the project. `make` alone lists them.

CARGO ?= cargo
RUSTDOCFLAGS := -D warnings

# Puts the list of all crates and versions into the programs, if cargo-auditable is installed.
AUDITABLE := $(if $(shell command -v cargo-auditable),auditable)

.PHONY: help demo build man install uninstall test sim mutants soak slow-guest verify-guest
.PHONY: model bench bench-engine bench-jobs bench-records lint guest firmware clients fuzz
.PHONY: advisories fuzz-corpus clean exhaustive protocol crash crash-plot

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | \
		awk -F':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo: guest ## Boot a guest on a voted disk, corrupt a replica, cut the power, and watch
	$(CARGO) build --release --locked --quiet
	tests/guest/demo.sh

build: ## Build quorum-blkd and quorum-blkctl (target/release/)
	$(CARGO) $(AUDITABLE) build --release --locked

man: ## Write the man pages and shell completions (target/manual)

install: ## Install everything: PREFIX=/usr/local, DESTDIR= (more in packaging/install.mk)

uninstall: ## Remove what `make install` installed, given the same variables

include packaging/install.mk

test: guest firmware clients lint ## Run every check of the project
	$(CARGO) test --locked --workspace --no-fail-fast -- --nocapture
	QUORUM_BLK_TEST_AIO=threads $(CARGO) test --locked --test replicas -- --nocapture
	$(MAKE) model
	$(MAKE) exhaustive
	$(MAKE) protocol
	$(MAKE) sim FIRST=1 SEEDS=$(TEST_SEEDS)

# The same seeds in each `make test`, so that what fails there is what was changed.
TEST_SEEDS := 40000

sim: ## Run random seeds in the simulator: SEEDS=n or SECONDS=n, FIRST=s; SEED=s replays one
	QUORUM_BLK_SIM_SEEDS=$(SEEDS) QUORUM_BLK_SIM_SEED=$(SEED) QUORUM_BLK_SIM_SECONDS=$(SECONDS) \
		QUORUM_BLK_SIM_FIRST=$(FIRST) \
		$(CARGO) test --locked --profile sim --features sim --test sim -- --nocapture \
		$(if $(SEED)$(if $(FIRST),,$(SEEDS)),keeps_the_contract)

crash: clients ## Cut the power at random moments: SECONDS=60, CLASS=name; SEED=s, STATE=dir
	QUORUM_BLK_CRASH_SECONDS=$(or $(SECONDS),60) QUORUM_BLK_CRASH_CLASS=$(CLASS) \
		QUORUM_BLK_CRASH_SEED=$(SEED) QUORUM_BLK_CRASH_STATE=$(STATE) \
		$(CARGO) test --locked --profile sim --features sim --test crash \
		nothing_flushed_is_lost -- --nocapture

crash-plot: ## Draw docs/crash.svg from the table in docs/crash.md
	QUORUM_BLK_DRAW=1 $(CARGO) test --locked --test repository crash_plot

mutants: ## Break one rule at a time, a test must fail: ONLY=name, SECONDS=60 for each
	ONLY='$(ONLY)' SECONDS_EACH='$(SECONDS)' tests/mutants/run.sh

soak: ## Kill the daemon under load in three ways, SECONDS=n each; SEED=s: the same requests
	QUORUM_BLK_SOAK_SECONDS=$(SECONDS) $(if $(SEED),QUORUM_BLK_TEST_SEED=$(SEED)) \
		$(CARGO) test --locked --release --test device daemon_killed -- --nocapture

slow-guest: guest ## A guest works for SECONDS=600 on replicas whose flushes take 1.5 s
	QUORUM_BLK_SLOW_SECONDS=$(or $(SECONDS),600) \
		$(CARGO) test --locked --test vm slow_flushes -- --nocapture

verify-guest: guest ## fio verifies for SECONDS=600 over a replica: corrupt, slow, flapping
	QUORUM_BLK_VERIFY_SECONDS=$(or $(SECONDS),600) \
		$(CARGO) test --locked --test vm verified_work -- --nocapture --test-threads=1

model: ## Check every interleaving of what worker threads share (loom)
	$(CARGO) test --locked --target-dir target/model --features loom --lib engine::shared

exhaustive: ## Check every case of a vote, an answer, a flush and a settlement
	$(CARGO) test --locked --profile sim --features sim --test exhaustive -- --nocapture

protocol: ## Explore a model of the protocol with all crashes and records; LARGE=1: for minutes
	$(CARGO) test --locked --profile sim --features sim --test protocol -- --nocapture \
		--test-threads 1 $(if $(LARGE),--include-ignored)

fuzz: ## Fuzz each target for SECONDS=60; TARGET=name: only that one (fuzz/README.md)
	SECONDS_EACH=$(SECONDS) fuzz/run.sh $(TARGET)

fuzz-corpus: ## Reduce the fuzzer's committed inputs to the fewest with the same coverage
	fuzz/run.sh --corpus $(TARGET)

bench-engine: ## Count the engine's instructions per request, and compare with the record (RECORD=1)
	$(CARGO) bench --locked --bench engine -- $(if $(RECORD),--record)

bench-jobs: ## Measure what jobs cost a guest: ONLY=row, BENCH_SECONDS, BENCH_ROUNDS, BENCH_DIR
	BENCH_ONLY='$(ONLY)' $(CARGO) bench --locked --quiet --bench jobs

bench-records: ## Measure what records cost a guest that writes: ONLY=row, BENCH_SECONDS, BENCH_DIR
	BENCH_ONLY='$(ONLY)' $(CARGO) bench --locked --quiet --bench records

bench: guest ## Compare with qemu-storage-daemon: ONLY=row, BENCH_SECONDS, BENCH_ROUNDS, BENCH_DIR
	BENCH_ONLY='$(ONLY)' $(CARGO) bench --locked --quiet --bench disk

advisories: ## Compare the dependencies with the RustSec database (cargo-deny and the network)
	$(CARGO) deny --all-features --locked check

lint: ## Check formatting, clippy and documentation; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(CARGO) metadata --locked --manifest-path fuzz/Cargo.toml --format-version 1 >/dev/null
	$(CARGO) clippy --locked --workspace --all-targets --features sim -- -D warnings
	RUSTDOCFLAGS='$(RUSTDOCFLAGS)' $(CARGO) doc --locked --workspace --features sim --no-deps \
		--document-private-items --quiet
	$(if $(shell command -v cargo-deny),$(DENY),@echo "lint: cargo-deny is not installed")

# Without advisories: whether there are new ones does not depend on the project.
DENY = $(CARGO) deny --all-features --locked check licenses bans sources

guest: ## Install QEMU and prepare the small Linux guest of the demo and the tests
	tests/guest/prepare.sh

firmware: guest ## Make the disks from which the tests boot the guest with SeaBIOS and OVMF
	tests/guest/firmware.sh

clients: ## Fetch the programs that the tests of monitor, metrics and installation use
	tests/clients/prepare.sh

clean: ## Remove all build output
	$(CARGO) clean
	$(CARGO) clean --manifest-path fuzz/Cargo.toml
