#!/bin/bash
# Builds the lab's guest, a kernel and an initramfs, from the distribution's packages, and prints the
# directory with the result:
#
#   vmlinuz  initramfs.gz  kernel-version
#
# Installs nothing: packages are downloaded and unpacked. The result is cached outside the checkout and
# built once per recipe; concurrent callers wait for it. Words on the kernel command line select the
# guest's behavior: see guest-init.
#
# Debian 12 and 13, Ubuntu 24.04. Needs apt, dpkg-deb, flock, gzip, sha256sum; xz or zstd if the
# distribution compresses kernel modules with it.
set -euo pipefail
shopt -s nullglob
umask 022
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
init=$here/guest-init
cache=${XDG_CACHE_HOME:-$HOME/.cache}/virtnode-test

# The version is the hash of the recipe, so that each checkout uses the matching guest.
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
if [ -d "$result" ]; then # built in the meantime
    echo "$result"
    exit 0
fi

rm -rf "$cache"/building-* # leftovers of killed builds, under the lock
work=$(mktemp -d "$cache/building-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work"/{debs,root,initramfs,done}

# The direct dependencies of a package; of alternatives, the first.
needs() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "$1" 2>/dev/null | sed -n 's/^ *|\{0,1\}\(Pre\)\{0,1\}Depends: \([^<>]*\)$/\2/p'
}

fetch() {
    say "fetching $*"
    # as root, apt warns that its sandbox user cannot write here
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
# Debian's "cloud" kernel is built for virtual machines; Ubuntu's "virtual" is the generic kernel with
# fewer modules. Both are metapackages that depend on the versioned package. Debian has one package for
# image and modules, Ubuntu has two, and some releases have virtio_mem in the "extra" one.
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
# The agent's libraries: all library packages among its transitive dependencies.
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
# util-linux for its chrt, which supports SCHED_DEADLINE, unlike busybox's.
fetch "${packages[@]}" busybox-static util-linux "${!seen[@]}"

find_one() { # prints the first program or library with this name in the unpacked packages
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

# Programs with the libraries that their loader reports. The loader's path is fixed in the programs; it
# searches /lib by default.
loader=$(find_one 'ld-linux-x86-64.so.2')
libraries=$(find "$work/root" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
for name in qemu-ga chrt; do
    program=$(find_one "$name")
    install -m 755 "$program" "$tree/bin/$name"
    list=$("$loader" --library-path "$libraries" --list "$program") ||
        die "$name needs a library that its packages do not contain: $list"
    while read -r library; do
        install -m 755 "$library" "$tree/lib/"
    done < <(sed -n 's/.*=> \([^ ]*\) (.*/\1/p' <<<"$list")
done
install -m 755 "$loader" "$tree/lib64/ld-linux-x86-64.so.2"

# --- The modules --------------------------------------------------------------------------------
# In loading order. The modules contain their dependencies; modules.builtin lists those built into the
# kernel, which are skipped.
builtin=$(cat "$modules/modules.builtin" 2>/dev/null || true)

unpack_module() { # to /modules/<name>.ko; fails silently if the module does not exist
    local file
    # file names have - or _ for _ in the module's name
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
for name in virtio_pci virtio_console virtio_balloon virtio_mem virtio_blk virtio_net pvpanic_mmio; do
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
