#!/usr/bin/env bash
# Builds the release files in dist/ or the named directory: a Debian package and a tarball with
# program, unit, man pages, completions and configuration, and SHA256SUMS. The build is reproducible:
# the same commit, toolchain and libraries yield identical bytes.
#
#   scripts/dist.sh [DIRECTORY]
#
# For tests: VIRTNODE names a program to package instead of building one; LEVEL is gzip's level.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022
export LC_ALL=C TZ=UTC

output=${1:-dist}
level=${LEVEL:-9}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# The time of the commit, not the current time.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT

# Removes this machine's paths, which would otherwise appear in panic messages. A separate target
# directory, since changed flags would invalidate the ordinary build.
build() {
  local target=${CARGO_TARGET_DIR:-$PWD/target}/dist
  RUSTFLAGS="--remap-path-prefix=$PWD=virtnode --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo" \
    CARGO_TARGET_DIR=$target cargo build --release --locked >&2
  program=$target/release/virtnode
}

# The newest symbol version that the program requires is the minimum version of the library. Packed
# relocations (build.rs) are required without a number: glibc has them since 2.36.
needs() { # prefix of the versions' names
  objdump -p "$program" | sed 's/ GLIBC_ABI_DT_RELR$/ GLIBC_2.36/' |
    sed -n "s/.* $1_\([0-9.]*\)\$/\1/p" | sort -Vu | tail -n 1
}

stage() { # root
  local root=$1 page shell
  install -D -m 755 "$program" "$root/usr/bin/virtnode"
  install -D -m 644 systemd/virtnode.service "$root/usr/lib/systemd/system/virtnode.service"
  install -D -m 644 systemd/virtnode.sysusers "$root/usr/lib/sysusers.d/virtnode.conf"
  install -D -m 644 systemd/config.yaml "$root/etc/virtnode/config.yaml"
  mkdir -p "$scratch/man" "$root/usr/share/man/man1"
  "$program" man --directory "$scratch/man"
  for page in "$scratch"/man/*.1; do
    gzip -9n <"$page" >"$root/usr/share/man/man1/${page##*/}.gz"
  done
  mkdir -p "$root"/usr/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d}
  for shell in bash:bash-completion/completions/virtnode zsh:zsh/vendor-completions/_virtnode \
    fish:fish/vendor_completions.d/virtnode.fish; do
    "$program" completions "${shell%%:*}" >"$root/usr/share/${shell#*:}"
  done
  install -D -m 644 NOTICE "$root/usr/share/doc/virtnode/copyright"
  install -m 644 README.md CHANGELOG.md docs/*.md docs/*.json LICENSE "$root/usr/share/doc/virtnode/"
  find "$root" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
}

package() { # root
  local root=$1 architecture
  architecture=$(dpkg --print-architecture)
  mkdir "$root/DEBIAN"
  cat >"$root/DEBIAN/control" <<CONTROL
Package: virtnode
Version: $version
Architecture: $architecture
Maintainer: virtnode <https://virtnode.io>
Installed-Size: $(du -sk --apparent-size --exclude=DEBIAN "$root" | cut -f 1)
Depends: libc6 (>= $(needs GLIBC)), libgcc-s1, libvirt0 (>= $(needs LIBVIRT))
Recommends: libvirt-daemon-system | libvirt-daemon
Section: admin
Priority: optional
Homepage: https://virtnode.io
Description: publishes what a libvirt node can run, and hotplugs with proof
 A daemon for machines that run virtual machines under libvirt. It publishes what
 the machine can run as labels, in a file or on its Kubernetes Node, hotplugs
 vCPUs and memory of running domains with proof that the guest uses them, and
 serves metrics to Prometheus.
CONTROL
  echo /etc/virtnode/config.yaml >"$root/DEBIAN/conffiles"
  cat >"$root/DEBIAN/postinst" <<'POSTINST'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
  if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers virtnode.conf
  fi
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    # Only on upgrade: after the first installation, the administrator checks the configuration first.
    if [ -n "$2" ]; then
      systemctl try-restart virtnode.service
    fi
  fi
fi
POSTINST
  cat >"$root/DEBIAN/prerm" <<'PRERM'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
  systemctl disable --now virtnode.service
fi
PRERM
  cat >"$root/DEBIAN/postrm" <<'POSTRM'
#!/bin/sh
set -e
if [ "$1" = purge ]; then
  rm -rf /var/lib/virtnode
fi
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload
fi
POSTRM
  chmod 755 "$root"/DEBIAN/{postinst,prerm,postrm}
  dpkg-deb -Zgzip "-z$level" --root-owner-group --build "$root" "$output/virtnode_${version}_$architecture.deb" >&2
}

program=${VIRTNODE:-}
[[ -n $program ]] || build
mkdir -p "$output"
name=virtnode-$version-$(uname -m)-linux
stage "$scratch/$name"
tar -C "$scratch" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
  --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -c "$name" |
  gzip -n "-$level" >"$output/$name.tar.gz"
if command -v dpkg-deb >/dev/null; then
  package "$scratch/$name"
fi
(cd "$output" && sha256sum virtnode[_-]*.deb virtnode-*.tar.gz >SHA256SUMS)
ls -l "$output" >&2
