# `make demo` and `make test` are the two commands of the README; `.ci/run` is `make lint` and `make test`.

SHELL := /bin/bash
# rustup's directory, for a shell opened before rustup was installed.
export PATH := $(PATH):$(HOME)/.cargo/bin

# For one test: make test TEST=name-or-part-of-it
TEST ?=
# The Kubernetes of the tests: a current one, or 1.20 for the oldest supported one.
export KUBE ?=
SCRIPTS := .ci/run $(wildcard scripts/*.sh tests/*/*.sh)
TEST_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtnode-test

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: demo
demo: ## install what is missing, run the daemon on this machine's libvirt, show labels and metrics
	@scripts/demo.sh

# `cargo test` is available in every toolchain. It runs the tests of a binary as threads of one
# process, so a test that depends on libvirt's process-wide state (event loop, error handler) starts
# the binary `virtnode` as its own process. Doc tests run first, so that the last lines are the
# summary of the integration tests. Without a Kubernetes API server all tests still run; those that
# need one fail and name the variable to set. The first run builds the server, which takes minutes.
.PHONY: test
test: ## install what the tests need and run them all
	@scripts/install-deps.sh test
	@set -eu; \
	if [ -x tests/kube/build-server.sh ]; then \
		if assets=$$(tests/kube/build-server.sh); then \
			export KUBEBUILDER_ASSETS="$$assets"; \
		else \
			echo "make test: no Kubernetes API server (see above): the tests that need one will fail." >&2; \
		fi; \
	fi; \
	cargo test --locked --doc -- $(TEST); \
	cargo test --locked --no-fail-fast --lib --bins --tests -- $(TEST)

.PHONY: lint
lint: ## what must be clean before a change lands: format, clippy, documentation, shell scripts
	@scripts/install-deps.sh build
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps --document-private-items
	@if scripts/install-deps.sh lint; then \
		echo shellcheck $(SCRIPTS); \
		shellcheck $(SCRIPTS); \
	else \
		echo "make lint: shellcheck is not available, so the shell scripts were not checked." >&2; \
	fi
	@if command -v cargo-deny >/dev/null; then \
		echo cargo deny --locked --offline check bans licenses sources; \
		cargo deny --locked --offline check bans licenses sources; \
	fi

.PHONY: fmt
fmt: ## format the source
	cargo fmt

.PHONY: bench
bench: ## criterion's benchmarks
	@scripts/install-deps.sh build
	cargo bench --locked

.PHONY: figures
figures: ## measure the figures of docs/figures.md and print them next to their targets
	@scripts/install-deps.sh test
	@scripts/figures.sh

.PHONY: dist
dist: ## build the Debian package, the tarball and SHA256SUMS, in dist/
	@scripts/install-deps.sh build
	@scripts/dist.sh

.PHONY: image
image: ## build the container image, with podman, docker or buildah
	@scripts/image.sh

.PHONY: image-test
image-test: ## build the image without a registry and run it (as root, with buildah and debootstrap; minutes)
	@scripts/install-deps.sh image
	@scripts/image.sh --local
	@scripts/image-test.sh

.PHONY: clean-test-cache
clean-test-cache: ## remove the API servers that `make test` built (they are rebuilt when needed)
	rm -rf -- "$(TEST_CACHE)"
