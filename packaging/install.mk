# The directories of `make install` and `make uninstall`. Each can be set on the command line.

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
DATADIR ?= $(PREFIX)/share
MANDIR ?= $(DATADIR)/man
DOCDIR ?= $(DATADIR)/doc/quorum-blk
UNITDIR ?= $(LIBDIR)/systemd/system
SYSUSERSDIR ?= $(LIBDIR)/sysusers.d
QEMUDIR ?= $(DATADIR)/qemu/vhost-user
BASHDIR ?= $(DATADIR)/bash-completion/completions
ZSHDIR ?= $(DATADIR)/zsh/site-functions
FISHDIR ?= $(DATADIR)/fish/vendor_completions.d

INSTALL ?= install
PROGRAMS := quorum-blkd quorum-blkctl
UNITS := $(patsubst packaging/%.in,%,$(wildcard packaging/*.socket packaging/*.service.in))
UNITS := $(notdir $(UNITS))
PAGES := $(wildcard *.md LICENSE docs/*.md docs/benchmarks/*.svg)

BUILD_DIRECTORY := $(or $(CARGO_TARGET_DIR),target)
MANUAL := $(BUILD_DIRECTORY)/manual
SOURCES := $(shell find src packaging -name '*.rs' -o -name '*.1.in' -o -path '*/completions/*')
SOURCES += Cargo.toml Cargo.lock
MAN_PAGES := $(PROGRAMS:%=$(MANUAL)/man/%.1)

# The directory of the programs to install. Programs in another directory are not built.
BUILT := $(BUILD_DIRECTORY)/release
ifeq ($(origin BUILT),file)
$(PROGRAMS:%=$(BUILT)/%) &: $(SOURCES)
	$(CARGO) $(AUDITABLE) build --release --locked
	touch -c $(PROGRAMS:%=$(BUILT)/%)
endif

$(MAN_PAGES) &: $(SOURCES)
	$(CARGO) run --locked --quiet --example manual_pages $(MANUAL)

man: $(MAN_PAGES)
	@echo "man pages and completions are in $(MANUAL)"

install: $(PROGRAMS:%=$(BUILT)/%) $(MAN_PAGES)
	$(INSTALL) -D -t $(DESTDIR)$(BINDIR) $(PROGRAMS:%=$(BUILT)/%)
	$(INSTALL) -D -m 644 -t $(DESTDIR)$(MANDIR)/man1 $(MAN_PAGES)
	for program in $(PROGRAMS); do \
		$(INSTALL) -D -m 644 $(MANUAL)/completions/$$program.bash $(DESTDIR)$(BASHDIR)/$$program && \
		$(INSTALL) -D -m 644 -t $(DESTDIR)$(ZSHDIR) $(MANUAL)/completions/_$$program && \
		$(INSTALL) -D -m 644 -t $(DESTDIR)$(FISHDIR) $(MANUAL)/completions/$$program.fish || exit; \
	done
	$(INSTALL) -D -m 644 -t $(DESTDIR)$(UNITDIR) $(wildcard packaging/*.socket)
	$(INSTALL) -D -m 644 packaging/quorum-blk.sysusers $(DESTDIR)$(SYSUSERSDIR)/quorum-blk.conf
	$(INSTALL) -d $(DESTDIR)$(QEMUDIR)
	sed 's,@BINDIR@,$(BINDIR),' packaging/quorum-blkd@.service.in \
		>$(DESTDIR)$(UNITDIR)/quorum-blkd@.service
	sed 's,@BINDIR@,$(BINDIR),' packaging/50-quorum-blkd.json.in \
		>$(DESTDIR)$(QEMUDIR)/50-quorum-blkd.json
	chmod 644 $(DESTDIR)$(UNITDIR)/quorum-blkd@.service $(DESTDIR)$(QEMUDIR)/50-quorum-blkd.json
	for page in $(PAGES); do $(INSTALL) -D -m 644 $$page $(DESTDIR)$(DOCDIR)/$$page || exit; done

uninstall:
	rm -f $(PROGRAMS:%=$(DESTDIR)$(BINDIR)/%) $(PROGRAMS:%=$(DESTDIR)$(MANDIR)/man1/%.1) \
		$(PROGRAMS:%=$(DESTDIR)$(BASHDIR)/%) $(PROGRAMS:%=$(DESTDIR)$(ZSHDIR)/_%) \
		$(PROGRAMS:%=$(DESTDIR)$(FISHDIR)/%.fish) $(UNITS:%=$(DESTDIR)$(UNITDIR)/%) \
		$(DESTDIR)$(SYSUSERSDIR)/quorum-blk.conf $(DESTDIR)$(QEMUDIR)/50-quorum-blkd.json \
		$(PAGES:%=$(DESTDIR)$(DOCDIR)/%)
	for directory in docs/benchmarks docs ''; do \
		[ ! -d "$(DESTDIR)$(DOCDIR)/$$directory" ] || \
			rmdir --ignore-fail-on-non-empty "$(DESTDIR)$(DOCDIR)/$$directory" || exit; \
	done
