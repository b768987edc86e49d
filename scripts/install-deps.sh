#!/usr/bin/env bash
# Installs missing packages to build, test or demonstrate virtnode, with apt: as root, or through sudo.
# Tested on Debian 12, Debian 13 and Ubuntu 24.04. Prints nothing and runs dpkg once if nothing is
# missing.
#
#   scripts/install-deps.sh [build|lint|demo|test|image]      default: build
#
# Checks for the Rust toolchain but never installs it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  else
    sudo "$@"
  fi
}

# First, since the packages are useless without the toolchain.
check_rust() {
  local needed found
  needed=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
  if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then
    die "cargo and rustc are not on the PATH of user $(id -un). Install Rust $needed or newer, for" \
      "example with rustup (https://rustup.rs), open a new shell and run this again."
  fi
  found=$(rustc --version) || die "rustc does not run: see the error above."
  found=${found#rustc }
  found=${found%%[ -]*}
  if [[ $(printf '%s\n' "$needed" "$found" | sort -V | head -n 1) != "$needed" ]]; then
    die "Rust $found is too old: $needed or newer is needed (with rustup: rustup update stable)."
  fi
}

# The package with the emulator for this machine's architecture.
emulator_package() { # release, yes if QEMU comes from backports
  case "$(uname -m):$1:$2" in
  x86_64:* | i?86:*) echo qemu-system-x86 ;;
  aarch64:* | arm*:*) echo qemu-system-arm ;;
  ppc64*:*) echo qemu-system-ppc ;;
  s390x:bookworm:no) echo qemu-system-misc ;;
  s390x:*) echo qemu-system-s390x ;;
  riscv64:trixie:* | riscv64:bookworm:yes) echo qemu-system-riscv ;;
  *) echo qemu-system-misc ;;
  esac
}

# Up to libvirt 10.6 the package libvirt-daemon-system creates QEMU's user and libvirt's directories,
# without which the QEMU driver does not load; later libvirt-daemon-driver-qemu does.
system_package() { # release, yes if libvirt comes from backports
  case "$1:$2" in
  bookworm:no | noble:*) echo libvirt-daemon-system ;;
  esac
}

packages_for() { # purpose, release, yes if libvirt and QEMU come from backports
  local build=(gcc libc6-dev pkg-config libvirt-dev)
  # The lab's guest is built from packages with compressed kernel modules.
  local guest=(xz-utils zstd)
  local demo=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients curl "${guest[@]}")
  case $1 in
  build) printf '%s\n' "${build[@]}" ;;
  lint) printf '%s\n' "${build[@]}" shellcheck ;;
  demo | test | image)
    printf '%s\n' "${build[@]}" "${demo[@]}"
    emulator_package "$2" "$3"
    system_package "$2" "$3"
    ;;&
  test) printf '%s\n' openssl systemd libvirt-l10n ;;
  image) printf '%s\n' buildah debootstrap ;;
  esac
}

# Debian 12's QEMU 7.2 cannot be installed together with parts of QEMU from backports ("qemu-utils :
# Breaks: qemu-system-common"), and libvirt's packages must have the same version, too. So backports are
# used only if a part of either is already installed from there.
MARKERS=(qemu-utils qemu-block-extra qemu-system-common qemu-system-data libvirt0 libvirt-common)

# Prints a line with package and version for each installed package.
installed_packages() { # package...
  dpkg-query --show --showformat '${db:Status-Status} ${Package} ${Version}\n' "$@" 2>/dev/null |
    sed -n 's/^installed //p'
}

# Adds bookworm-backports to apt's sources with the address, keys, options and format (one line, or a
# deb822 stanza) of Debian's bookworm, unless apt already has it.
add_backports() {
  local fields=('Created-By: Packages' 'Component: main') entry file number target
  if [[ -n $(apt-get indextargets "${fields[@]}" 'Codename: bookworm-backports') ]]; then
    return
  fi
  # shellcheck disable=SC2016 # apt's own placeholder
  entry=$(apt-get indextargets --format '$(SOURCESENTRY)' "${fields[@]}" \
    'Origin: Debian' 'Codename: bookworm' | head -n 1)
  if [[ -z $entry ]]; then
    die "QEMU or libvirt from bookworm-backports is installed here, but apt has no source" \
      "'bookworm main' of Debian to derive the backports source from. Add bookworm-backports" \
      "to apt's sources and run this again."
  fi
  file=${entry%:*}
  number=${entry##*:} # of the stanza, or of the line
  target=/etc/apt/sources.list.d/virtnode-backports
  case $file in
  *.sources)
    target+=.sources
    awk -v number="$number" 'BEGIN { RS = ""; FS = "\n" } NR == number' "$file" |
      sed -E -e '/^#/d' -e 's/^(Suites):.*/\1: bookworm-backports/I' \
        -e 's/^(Components):.*/\1: main/I'
    ;;
  *)
    target+=.list
    sed -n -E "$number s/(\\s)bookworm(\\s).*/\\1bookworm-backports\\2main/p" "$file"
    ;;
  esac >"$scratch/backports"
  if ! grep -q 'bookworm-backports' "$scratch/backports"; then
    die "could not derive a source for bookworm-backports from $file, entry $number. Add it to" \
      "apt's sources by hand and run this again."
  fi
  say "adding bookworm-backports to apt's sources ($target), like $file:"
  sed 's/^/  /' "$scratch/backports" >&2
  as_root install -m 644 "$scratch/backports" "$target"
  update
}

# Takes only libvirt, QEMU and its firmware from backports: with "--target-release" apt would also take
# systemd, udev and more from there.
prefer_backports() {
  {
    printf 'Package: src:libvirt:any src:qemu:any src:seabios:any\n'
    printf 'Pin: release n=bookworm-backports\nPin-Priority: 600\n\n'
    cat /etc/apt/preferences 2>/dev/null || true
  } >"$scratch/preferences"
  options+=(-o "Dir::Etc::Preferences=$scratch/preferences")
}

# Keeps package scripts from starting services; scripts/demo.sh starts libvirt itself. Restarts of
# running services are allowed.
forbid_starts() {
  [[ ! -e $POLICY ]] || return 0
  cat >"$scratch/policy" <<'POLICY'
#!/bin/sh
# Written by virtnode's scripts/install-deps.sh and removed by it when apt is done: packages
# that are being installed start no service.
case " $* " in
*" start "* | *" (start) "*) exit 101 ;;
esac
exit 0
POLICY
  as_root install -m 755 "$scratch/policy" "$POLICY"
  policy_written=yes
}

clean_up() {
  [[ $policy_written == no ]] || as_root rm -f "$POLICY"
  rm -rf "$scratch"
}

update() {
  as_root apt-get -q "${options[@]}" update >&2 ||
    say "apt-get update failed (see above); trying with the package lists as they are."
}

purpose=${1:-build}
case $purpose in
build | lint | demo | test | image) ;;
*) die "'$purpose' is not one of build, lint, demo, test, image." ;;
esac

check_rust
command -v dpkg-query >/dev/null ||
  die "this is not Debian or Ubuntu (dpkg not found). Install by hand: a C compiler, pkg-config," \
    "libvirt with its headers, its QEMU driver and virsh, QEMU for this machine, openssl, curl."

# shellcheck disable=SC1091 # the system's own file
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")

# One query for both possible sets.
mapfile -t asked < <({
  packages_for "$purpose" "$release" no
  packages_for "$purpose" "$release" yes
} | sort -u)
installed=$(installed_packages "${asked[@]}" "${MARKERS[@]}" || true)

backports=no
if [[ $release == bookworm && $installed == *~bpo12* ]]; then
  for marker in "${MARKERS[@]}"; do
    if grep -q "^$marker .*~bpo12" <<<"$installed"; then
      backports=yes
    fi
  done
fi

missing=()
while read -r package; do
  grep -q "^$package " <<<"$installed" || missing+=("$package")
done < <(packages_for "$purpose" "$release" "$backports")
((${#missing[@]} > 0)) || exit 0

case $release in
bookworm | trixie | noble) ;;
*) say "tested on Debian 12, Debian 13 and Ubuntu 24.04; this is '$release': trying anyway." ;;
esac
by_hand="Install by hand, for example: apt-get install ${missing[*]}"
if ((EUID != 0)) && ! command -v sudo >/dev/null; then
  die "missing: ${missing[*]}. Neither root nor sudo is available. $by_hand"
fi

readonly POLICY=/usr/sbin/policy-rc.d
policy_written=no
scratch=$(mktemp -d)
chmod 755 "$scratch" # apt reads the preferences as another user
trap clean_up EXIT
options=(-o DPkg::Lock::Timeout=300)

say "installing packages missing for $purpose: ${missing[*]}"
update
if [[ $backports == yes ]]; then
  add_backports
  prefer_backports
fi
forbid_starts
if ! as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get -q -y --no-install-recommends "${options[@]}" install "${missing[@]}" </dev/null >&2; then
  die "apt could not install: ${missing[*]} (see above). $by_hand"
fi
