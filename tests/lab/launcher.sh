#!/bin/bash
# Imitates a KubeVirt launcher pod: the first process of new namespaces, with a libvirtd of its own.
#
#   unshare --mount --pid --net --ipc --uts --fork --kill-child launcher.sh \
#       ROOT VOLUMES ACCOUNTS USER
#
# ROOT is the root file system ("" for this machine's), VOLUMES the directory with the pod's emptyDirs,
# ACCOUNTS a directory with passwd and group, USER the user and group of the daemon: 107, or 0 for a
# launcher that runs as root.
#
# It reads commands from standard input, one a line, and prints the exit status of each; at the end of the
# input it exits, and with it everything in the pod. Commands are shell commands; "start" starts the
# daemon, whose process ID is then in $daemon.
set -euo pipefail

root=$1 volumes=$2 accounts=$3 user=$4
private=/run/kubevirt-private
daemon=

# Nothing of this is seen outside of the namespace.
mount --make-rprivate /
mount -t proc proc "$root/proc"
# /run has the machine's own daemons.
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$root/run/libvirt" "$root$private"
chmod 1777 "$root/run"
mount --bind "$volumes/libvirt-runtime" "$root/run/libvirt"
mount --bind "$volumes/private" "$root$private"
for file in passwd group; do
    mount --bind "$accounts/$file" "$root/etc/$file"
done
for directory in etc var/lib var/cache var/log; do
    if [ -d "$root/$directory/libvirt" ]; then
        mount -t tmpfs tmpfs "$root/$directory/libvirt"
    fi
done
# A root daemon reads its configuration and keeps its cache there.
if [ "$user" = 0 ] && [ -d "$root/etc/libvirt" ]; then
    cp "$root$private/libvirt/qemu.conf" "$root/etc/libvirt/"
    mkdir -p "$root/var/cache/libvirt/qemu/cache"
    cp -r "$root$private/libvirt/qemu/cache/capabilities" "$root/var/cache/libvirt/qemu/cache/"
fi
echo "virt-launcher" >/proc/sys/kernel/hostname

program=/usr/sbin/virtqemud
if [ ! -x "$root$program" ]; then
    program=/usr/sbin/libvirtd
fi

start() {
    # The same variables as KubeVirt's.
    env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/ \
        XDG_RUNTIME_DIR=/run XDG_CONFIG_HOME=$private XDG_CACHE_HOME=$private \
        chroot --userspec="$user:$user" --groups= "${root:-/}" \
        "$program" -f $private/libvirtd.conf </dev/null >&2 &
    daemon=$!
}

# Stops the daemon with a signal and waits for its end. Emulators go on.
stop() {
    kill -s "$1" "$daemon"
    wait "$daemon" || true
    daemon=
}

while read -r line; do
    status=0
    eval "$line" >&2 || status=$?
    echo "$status"
done
