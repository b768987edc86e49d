#!/bin/bash
# Builds the lab's guest, a kernel and an initramfs, out of the distribution's own packages, and
# prints the directory that holds them:
#
#   vmlinuz  initramfs.gz  kernel-version
#
# Nothing is installed: the packages are downloaded and unpacked. The result lies in a cache outside
# the checkout, so it is built once per recipe; whoever comes while it is being built waits for it.
# What the guest does is chosen at boot by words on its kernel command line: see guest-init.
#
# Debian 12 and 13, Ubuntu 24.04. Needs apt, dpkg-deb, flock, gzip, sha256sum; xz and zstd where the
# distribution's kernel modules are compressed with them.
set -euo pipefail
shopt -s nullglob
umask 022
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
init=$here/guest-init
cache=${XDG_CACHE_HOME:-$HOME/.cache}/virtnode-test

# The version is the recipe itself: whoever changes it gets a new guest, and an old checkout its old.
version=$(cat "${BASH_SOURCE[0]}" "$init" | sha256sum | cut -c1-12)
result=$cache/guest-$version
if [ -d "$result" ]; then
    echo "$result"
    exit 0
fi

say() { echo "build-guest: $*" >&2; }
die() {
    say "$*"
    exit 1
}

mkdir -p "$cache"
exec 9>"$cache/guest.lock"
flock 9
if [ -d "$result" ]; then # built while we waited
    echo "$result"
    exit 0
fi

rm -rf "$cache"/building-* # of builds that were killed: we hold the lock
work=$(mktemp -d "$cache/building-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work"/{debs,root,initramfs,done}

# The names that a package needs at least, alternatives by their first.
needs() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "$1" 2>/dev/null | sed -n 's/^ *|\{0,1\}\(Pre\)\{0,1\}Depends: \([^<>]*\)$/\2/p'
}

fetch() {
    say "fetching $*"
    # as root apt drops to a user that cannot write here and says so: not worth a line
    (cd "$work/debs" && apt-get -qq download "$@" 2>"$work/apt.log") ||
        { cat "$work/apt.log" >&2; die "cannot download $*: is 'apt-get update' due?"; }
    local deb
    for deb in "$work"/debs/*.deb; do
        dpkg-deb -x "$deb" "$work/root"
        rm "$deb"
    done
}

known() { apt-cache show --no-all-versions "$1" >/dev/null 2>&1; }

# --- The kernel ---------------------------------------------------------------------------------
# Debian has a kernel for virtual machines under "cloud", Ubuntu's "virtual" is its generic one with
# fewer modules. Both names are empty packages that need the real one, whose name has the version.
# The image and the modules are one package on Debian and two on Ubuntu, where virtio_mem is
# among the modules that "extra" holds in some releases.
meta=
for name in linux-image-cloud-amd64 linux-image-virtual linux-image-amd64 linux-image-generic; do
    if known "$name"; then meta=$name && break; fi
done
[ -n "$meta" ] || die "no kernel package known to apt: is 'apt-get update' due?"
image=$(needs "$meta" | grep -m1 '^linux-image-[0-9]') || die "$meta names no kernel image"
release=${image#linux-image-}
packages=("$image")
for name in "linux-modules-$release" "linux-modules-extra-$release"; do
    if known "$name"; then packages+=("$name"); fi
done

# --- The programs -------------------------------------------------------------------------------
# The agent's libraries: whatever its package and theirs need that is a library.
queue=(qemu-guest-agent)
declare -A seen=()
while [ "${#queue[@]}" -gt 0 ]; do
    name=${queue[0]}
    queue=("${queue[@]:1}")
    if [ -n "${seen[$name]:-}" ] || ! known "$name"; then continue; fi
    seen[$name]=1
    while read -r dependency; do
        case $dependency in lib*) queue+=("$dependency") ;; esac
    done < <(needs "$name")
done
# util-linux for its chrt, which knows SCHED_DEADLINE; busybox' does not.
fetch "${packages[@]}" busybox-static util-linux "${!seen[@]}"

find_one() { # the first file of the unpacked packages with this name where programs or libraries are
    local file
    file=$(find "$work/root" -path '*/usr/share' -prune -o -name "$1" ! -type d -print -quit)
    [ -n "$file" ] || die "no $1 in the packages"
    echo "$file"
}

vmlinuz=$(find "$work/root/boot" -name "vmlinuz-$release" -print -quit)
[ -n "$vmlinuz" ] || die "no kernel in $image"
modules=$(find "$work/root" -type d -path "*/lib/modules/$release" -print -quit)
[ -n "$modules" ] || die "no modules in ${packages[*]}"

tree=$work/initramfs
mkdir -p "$tree"/{bin,proc,sys,dev,run,tmp,var/run,etc,modules,memory,lib,lib64}
busybox=$(find_one busybox)
install -m 755 "$busybox" "$tree/bin/busybox"
install -m 755 "$init" "$tree/init"

# Programs with the libraries that their own loader says they need. The loader's name is fixed in
# the programs; /lib it searches by itself.
loader=$(find_one 'ld-linux-x86-64.so.2')
libraries=$(find "$work/root" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
for name in qemu-ga chrt; do
    program=$(find_one "$name")
    install -m 755 "$program" "$tree/bin/$name"
    list=$("$loader" --library-path "$libraries" --list "$program") ||
        die "$name needs a library that its packages do not bring: $list"
    while read -r library; do
        install -m 755 "$library" "$tree/lib/"
    done < <(sed -n 's/.*=> \([^ ]*\) (.*/\1/p' <<<"$list")
done
install -m 755 "$loader" "$tree/lib64/ld-linux-x86-64.so.2"

# --- The modules --------------------------------------------------------------------------------
# In the order in which they can be loaded. The dependencies are in the modules themselves; what is
# built into the kernel is listed in modules.builtin and left out.
builtin=$(cat "$modules/modules.builtin" 2>/dev/null || true)

unpack_module() { # to /modules/<name>.ko; silent failure when there is no such module
    local file
    # file names have - or _ where the module's name has _
    file=$(find "$modules" -name "${1//_/[-_]}.ko*" -print -quit)
    case $file in
    '') return 1 ;;
    *.ko) cat "$file" ;;
    *.xz) xz -dc "$file" ;;
    *.zst) zstd -qdc "$file" ;;
    *.gz) gzip -dc "$file" ;;
    esac >"$tree/modules/$1.ko"
}

add_module() {
    local name=${1//-/_} dependencies dependency
    if [ -e "$work/done/$name" ]; then return; fi
    : >"$work/done/$name"
    if grep -Eq "/${name//_/[-_]}\.ko\$" <<<"$builtin"; then return; fi
    unpack_module "$name" || { say "this kernel has no $name" && return; }
    dependencies=$(tr '\0' '\n' <"$tree/modules/$name.ko" | sed -n '/^depends=./{s/^depends=//;s/,/ /g;p}')
    for dependency in $dependencies; do add_module "$dependency"; done
    echo "$name" >>"$tree/modules/order"
}

: >"$tree/modules/order"
for name in virtio_pci virtio_console virtio_balloon virtio_mem virtio_blk virtio_net; do
    add_module "$name"
done
for name in virtio_pci virtio_console virtio_balloon virtio_mem; do
    grep -qx "$name" "$tree/modules/order" || grep -Eq "/$name\.ko\$" <<<"$builtin" ||
        die "the kernel of $image lacks $name, which the lab needs"
done

# --- The result ---------------------------------------------------------------------------------
mkdir "$work/result"
(cd "$tree" && find . | sort | "$busybox" cpio -o -H newc 2>/dev/null) |
    gzip -1 >"$work/result/initramfs.gz"
cp "$vmlinuz" "$work/result/vmlinuz"
echo "$release" >"$work/result/kernel-version"
# QEMU runs as another user under a system libvirtd
chmod 755 "$work/result"
chmod 644 "$work/result"/*
mv -T "$work/result" "$result"
say "built from $image"
echo "$result"
