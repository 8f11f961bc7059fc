# The entry points of the project. `make help` lists them.
#
# What is downloaded (crates, Go tools, Debian packages for the test images) is cached outside
# the tree, in CORACLE_CACHE; what is built stays in CARGO_TARGET_DIR.

CORACLE_CACHE    ?= $(HOME)/.cache/coracle
CARGO            ?= cargo
TARGET           := $(shell uname -m)-unknown-linux-gnu
CARGO_TARGET_DIR ?= target
RELEASE          := $(CARGO_TARGET_DIR)/$(TARGET)/release
SMALL            := $(CARGO_TARGET_DIR)/$(TARGET)/small
OUT              := $(CARGO_TARGET_DIR)/release
CORACLE_COMMIT   ?= $(shell git describe --always --dirty --abbrev=40 2>/dev/null)
DESTDIR          ?=
FUZZ_SECONDS     ?= 30
PREFIX           ?= /usr/local

BINARIES := coracle containerd-shim-coracle-v2 coracled
TOOLS    := fixtures probe demo bench vm cve-replay sweep without

# Every tool is found by absolute path, whatever the working directory of a test.
BIN_DIR  := $(abspath $(OUT))
RUN_ENV  := CORACLE_CACHE="$(CORACLE_CACHE)" CORACLE_BIN_DIR="$(BIN_DIR)"

.PHONY: help build tools man completions run test test-host test-vm bench check install clean deps \
    cve-replay sweep matrix \
    check-format check-lints check-units check-architecture check-dependencies fuzz

help:
	@echo 'make build     release binaries in $(OUT)'
	@echo 'make run       a pod from a loopback registry, end to end (ONCE=1: then stop)'
	@echo 'make test      the end-to-end tests, as root; TEST=name: those whose name holds it'
	@echo 'make test-vm   those that need cgroup v2, systemd, AppArmor or CRIU, in a guest'
	@echo 'make bench     measurements against runc, crun and containerd, in $(CARGO_TARGET_DIR)/bench'
	@echo 'make cve-replay RUNTIME=path  what attacked container runtimes once, against any of them'
	@echo 'make sweep     every command with a fault at every system call; SWEEP="--verb run --fault kill"'
	@echo 'make check     format, lints, unit tests, architecture, licences'
	@echo 'make matrix    what containerd 1.6, 1.7, testing and 2.4 can do with the shim, as a table'
	@echo 'make fuzz      the fuzz targets of the runtime, FUZZ_SECONDS (30) each'
	@echo 'make man       manual pages in $(OUT)/man; make completions: for bash, zsh and fish'
	@echo 'make install   binaries, systemd unit, manual and completions under DESTDIR and PREFIX'
	@echo 'make deps      what run, test and bench need: packages by apt, Go tools in the cache'
	@echo 'make clean     remove what was built'

# The commit is told to `coracle --version` alone.
build:
	CORACLE_COMMIT="$(CORACLE_COMMIT)" $(CARGO) build --locked --profile small --bins -p coracle
	$(CARGO) build --locked --release --bins -p coracle-shim -p coracle-cri
	@mkdir -p $(OUT)
	@for b in $(BINARIES); do \
	    case $$b in coracle) from=$(SMALL) ;; *) from=$(RELEASE) ;; esac; \
	    ln -f $$from/$$b $(OUT)/$$b || cp -f $$from/$$b $(OUT)/$$b || exit 1; done
	@ls -l $(addprefix $(OUT)/,$(BINARIES))

# Programs that only tests, `make run` and `make bench` use.
tools:
	$(CARGO) build --locked --release --bins -p coracle-fixtures -p coracle-integration
	@mkdir -p $(OUT)
	@for b in $(TOOLS); do ln -f $(RELEASE)/$$b $(OUT)/$$b || cp -f $(RELEASE)/$$b $(OUT)/$$b; done
	@for b in floor peak; do cc -O2 -static -s -Wall -Wextra -o $(OUT)/$$b integration/floor/$$b.c || exit 1; done

# From the definitions that the runtime parses its command line with.
man completions:
	$(CARGO) run --locked --quiet -p coracle --example manual -- $@ $(OUT)/$@

deps:
	@CORACLE_CACHE="$(CORACLE_CACHE)" .ci/deps

run: deps build tools
	@$(RUN_ENV) $(OUT)/demo $(if $(ONCE),--once)

# Both parts, also when the first fails. A name asks for the tests of this machine alone.
test:
	@$(MAKE) --no-print-directory -k test-host $(if $(TEST),,test-vm)

# One test at a time: they share the machine's network, cgroups and mount table.
test-host: deps build tools
	$(RUN_ENV) CORACLE_FIXTURES="$$($(RUN_ENV) $(OUT)/fixtures storage)" RUST_LIB_BACKTRACE=0 \
	    $(CARGO) test --locked -p coracle-integration --no-fail-fast -- --test-threads=1 $(TEST)

# What is run in the guest: its own tests, and those of runtime and shim that say something new there.
VM_TESTS := --test 'vm_*' --test runtime_cli --test runtime_regressions --test cgroup_kernel \
    --test lifecycle --test service

test-vm: deps build tools
	$(CARGO) test --locked --no-run --message-format=json -p coracle -p coracle-shim -p coracle-integration \
	    $(VM_TESTS) > $(OUT)/vm-tests.json
	$(RUN_ENV) $(OUT)/vm test --tests $(OUT)/vm-tests.json $(if $(TEST),--filter $(TEST))

# The table alone; `make test` has it among the others. TEST=name: those cells whose name holds it.
matrix: deps build tools
	@$(RUN_ENV) CORACLE_FIXTURES="$$($(RUN_ENV) $(OUT)/fixtures storage)" \
	    $(CARGO) test --locked --quiet -p coracle-integration --test containerd_matrix -- $(TEST)

bench: deps build tools
	@$(RUN_ENV) $(OUT)/bench --out $(CARGO_TARGET_DIR)/bench $(BENCH_ARGS)

# Exit code 1 when the runtime is vulnerable to any of it.
cve-replay: deps build tools
	@$(RUN_ENV) $(OUT)/cve-replay $(or $(RUNTIME),$(BIN_DIR)/coracle) $(CVE_ARGS)

# All of what `make test` samples: hours. RUNTIME=path for another runtime.
sweep: deps build tools
	@$(RUN_ENV) $(OUT)/sweep $(if $(RUNTIME),--runtime $(RUNTIME)) $(SWEEP)

# Apart, so that `make -k check` says all that is wrong at once.
check: check-format check-lints check-units check-architecture check-dependencies

check-format:
	$(CARGO) fmt --all -- --check

check-lints:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

check-units:
	$(CARGO) test --locked --workspace --exclude coracle-integration --no-fail-fast

check-architecture:
	$(CARGO) test --locked -p coracle-integration --lib --test architecture

check-dependencies:
	@CORACLE_CACHE="$(CORACLE_CACHE)" .ci/deny

# Every fuzz target of runtime/fuzz, FUZZ_SECONDS each.
fuzz:
	@CORACLE_CACHE="$(CORACLE_CACHE)" FUZZ_SECONDS="$(FUZZ_SECONDS)" .ci/fuzz

install: build man completions
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	for b in $(BINARIES); do install -m 0755 $(OUT)/$$b $(DESTDIR)$(PREFIX)/bin/$$b || exit 1; done
	sed 's|@PREFIX@|$(PREFIX)|g' docs/coracled.service.in > $(DESTDIR)$(PREFIX)/lib/systemd/system/coracled.service
	chmod 0644 $(DESTDIR)$(PREFIX)/lib/systemd/system/coracled.service
	install -d $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 0644 $(OUT)/man/*.8 $(DESTDIR)$(PREFIX)/share/man/man8
	install -D -m 0644 $(OUT)/completions/bash/coracle $(DESTDIR)$(PREFIX)/share/bash-completion/completions/coracle
	install -D -m 0644 $(OUT)/completions/zsh/_coracle $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_coracle
	install -D -m 0644 $(OUT)/completions/fish/coracle.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/coracle.fish

clean:
	$(CARGO) clean
