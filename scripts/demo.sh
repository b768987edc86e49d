#!/usr/bin/env bash
# Shows virtnode's main job on this machine: builds it, runs the daemon against the local libvirt
# without any cluster, prints the labels it found and some of its metrics, and stops everything it
# started, also on Ctrl-C or when something fails. libvirt is started if none answers. As root, or
# as a user whom libvirt lets in, or through sudo.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin # libvirtd, and cargo for a shell opened before rustup ran

readonly URI=qemu:///system
readonly PROBE_SECONDS=90 # a libvirt that probes every QEMU binary again takes 4 s for each
readonly READY_SECONDS=180
readonly STOP_SECONDS=20

as=()           # what libvirt needs to let us in: nothing, or sudo
started=()      # what to stop at the end, in the order in which it was started
daemon_pid=     # virtnode's
networks=       # network interfaces from before
scratch=$(mktemp -d "${TMPDIR:-/tmp}/virtnode-demo.XXXXXX")
readonly scratch
readonly log=$scratch/virtnode.log

say() { printf '\n== %s\n' "$*"; }

note() { printf '   %s\n' "$*"; }

die() {
  printf '\ndemo: %s\n' "$*" >&2
  exit 1
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  else
    sudo "$@"
  fi
}

# A zombie that nobody collects has ended, too.
alive() { grep -q '^State:[[:space:]]*[^ZX]' "/proc/$1/status" 2>/dev/null; }

# Waits until a command succeeds; fails when the time is over or a process it depends on is gone.
wait_until() { # seconds, process id or nothing, command...
  local deadline=$((SECONDS + $1)) process=$2
  shift 2
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    [[ -z $process ]] || alive "$process" || return 1
    sleep 0.1
  done
}

gone() { ! alive "$1"; }

runs() { # name of a program; those of containers, with a root directory of their own, do not count
  local comm
  for comm in /proc/[0-9]*/comm; do
    if [[ $(cat "$comm" 2>/dev/null) == "$1" ]] && as_root test "${comm%comm}root/" -ef /; then
      return 0
    fi
  done
  return 1
}

signal() { # name of a signal, process id
  # shellcheck disable=SC2016 # for the inner shell, whose own kill needs no package
  kill "-$1" "$2" 2>/dev/null || as_root sh -c 'kill "-$1" "$2"' sh "$1" "$2" 2>/dev/null || true
}

stop() { # name, process id; sets clean_up's status when it cannot
  alive "$2" || return 0
  signal TERM "$2"
  if ! wait_until "$STOP_SECONDS" '' gone "$2"; then
    note "$1 (process $2) did not stop within $STOP_SECONDS s of SIGTERM: killing it."
    signal KILL "$2"
    if ! wait_until "$STOP_SECONDS" '' gone "$2"; then
      note "$1 (process $2) is still there: stop it by hand."
      status=1
    fi
  fi
}

# libvirt's networks outlive it. One whose bridge was not there before came with the libvirt that
# was started here (Ubuntu's "default" starts by itself), and goes with it.
stop_networks() {
  local network bridge
  while read -r network; do
    [[ -n $network ]] || continue
    bridge=$("${as[@]}" timeout 20 virsh -q -c "$URI" net-info "$network" 2>/dev/null | sed -n 's/^Bridge: *//p')
    if [[ -n $bridge && " $networks " != *" $bridge "* ]]; then
      "${as[@]}" timeout 20 virsh -q -c "$URI" net-destroy "$network" >/dev/null 2>&1 ||
        note "libvirt's network $network could not be stopped: virsh net-destroy $network does it."
    fi
  done < <("${as[@]}" timeout 20 virsh -q -c "$URI" net-list --name 2>/dev/null || true)
}

clean_up() {
  local status=$? index name process
  trap - EXIT
  trap '' INT TERM # once is enough
  set +e
  if ((status != 0)) && [[ -s $log ]]; then
    printf '\n-- the end of the daemon'\''s log --\n' >&2
    tail -n 60 "$log" >&2
  fi
  if [[ -n $daemon_pid ]]; then
    stop virtnode "$daemon_pid"
  fi
  if ((${#started[@]} > 0)); then
    stop_networks
  fi
  for ((index = ${#started[@]} - 1; index >= 0; index--)); do
    name=${started[index]%:*}
    process=${started[index]##*:}
    stop "$name" "$process"
  done
  rm -rf -- "$scratch" 2>/dev/null || as_root rm -rf -- "$scratch"
  if ((status == 0)); then
    say "Stopped what this demo started${started[*]:+, libvirt included}; nothing is left running or published."
  fi
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# 0: it answers · 1: nobody is there, or not for us · 2: it does not answer in time
libvirt_answers() {
  local status=0
  "$@" timeout "$PROBE_SECONDS" virsh -q -c "$URI" version >"$scratch/version" 2>"$scratch/refusal" ||
    status=$?
  ((status != 124)) || return 2
  ((status == 0)) || return 1
}

find_libvirt() {
  local status=0
  libvirt_answers || status=$?
  if ((status == 1 && EUID != 0)); then
    status=0
    libvirt_answers sudo || status=$?
    as=(sudo)
  fi
  ((status != 2)) ||
    die "libvirt is running but did not answer within $PROBE_SECONDS s (virsh -c $URI version)."
  return "$status"
}

# By hand, so that it works without systemd and so that it can be stopped again. virtlogd is
# where libvirt sends a domain's output; there is nobody to start it but us.
start_libvirt() {
  local name
  if runs libvirtd || runs virtqemud; then # a second one would take the first one's socket away
    die "libvirt is running, but refuses $URI: $(tail -n 1 "$scratch/refusal")"
  fi
  networks=$(cd /sys/class/net && echo *)
  for name in virtlogd libvirtd; do
    ! runs "$name" || continue
    as_root "$name" -d -p "$scratch/$name.pid" ||
      die "$name does not start; its reasons are above or in /var/log/libvirt/$name.log."
    started+=("$name:$(as_root cat "$scratch/$name.pid")")
  done
  if ((EUID != 0)); then
    as=(sudo)
  fi
  wait_until "$PROBE_SECONDS" "${started[-1]##*:}" libvirt_answers "${as[@]}" ||
    die "the libvirtd started here does not answer: $(tail -n 1 "$scratch/refusal")" \
      "Its log is /var/log/libvirt/libvirtd.log."
}

# /dev/kvm that QEMU's user may not open makes libvirt probe all QEMU binaries at every question.
explain_kvm() {
  if [[ ! -e /dev/kvm ]]; then
    note "There is no /dev/kvm here: the labels are those of QEMU's software emulation."
  elif [[ $(stat -c '%G %A' /dev/kvm) != "kvm crw-rw"* && $(stat -c %A /dev/kvm) != *rw-? ]]; then
    note "/dev/kvm is closed to QEMU's user ($(stat -c '%U:%G %A' /dev/kvm)): libvirt then probes every"
    note "QEMU binary again at each question, about 4 s for each binary. This takes a while."
  fi
}

free_port() {
  local port
  for ((tries = 0; tries < 50; tries++)); do
    port=$((20000 + RANDOM % 12000))
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "found no free TCP port on 127.0.0.1."
}

ready() { curl -fsS --max-time 5 -o "$scratch/ready" "$address/readyz" 2>/dev/null; }

sample() { # pattern
  grep -E "^($1)([{ ]|\$)" "$scratch/metrics" | sed 's/^/   /' || note "(none)"
}

scripts/install-deps.sh demo

say "Building virtnode (the first time takes a few minutes)"
cargo build --release --locked
target=$(cargo metadata --locked --format-version 1 --no-deps |
  sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
readonly virtnode=$target/release/virtnode

say "Looking for libvirt at $URI"
explain_kvm
if find_libvirt; then
  note "It is running:"
else
  note "Nobody answers, so it is started for the time of this demo:"
  start_libvirt
fi
sed -n '/[^[:space:]]/s/^/   /p' "$scratch/version"

address=http://127.0.0.1:$(free_port)
readonly address
say "Running the daemon without any cluster: labels go to a file, metrics to $address"
command=("$virtnode" run --publish file --state-directory "$scratch/state"
  --socket "$scratch/virtnode.sock" --connect "$URI" --listen "${address#http://}")
note "${command[*]}"
# The shell writes its process id and becomes the daemon: with sudo, \$! would be sudo's.
# shellcheck disable=SC2016 # for the inner shell
"${as[@]}" sh -c 'echo $$ >"$0" && exec "$@"' "$scratch/virtnode.pid" "${command[@]}" \
  </dev/null >"$log" 2>&1 &
wait_until 10 "$!" test -s "$scratch/virtnode.pid" || die "the daemon did not start."
daemon_pid=$(<"$scratch/virtnode.pid")
begin=$SECONDS
if ! wait_until "$READY_SECONDS" "$daemon_pid" ready; then
  alive "$daemon_pid" || die "the daemon ended before it was ready."
  curl -sS --max-time 5 "$address/readyz" >&2 || true
  die "the daemon was not ready within $READY_SECONDS s; what it still waits for is above."
fi
note "Ready after $((SECONDS - begin)) s: libvirt was read and the labels are in the file."

say "The labels of this node (virtnode labels)"
"${as[@]}" "$virtnode" labels --connect "$URI"

curl -fsS --max-time 5 -o "$scratch/metrics" "$address/metrics" ||
  die "the daemon does not answer at $address/metrics."
say "Is libvirt connected (1), and the most vCPUs one domain can have here (0: not known)"
sample 'virtnode_hypervisor_connected|virtnode_max_vcpus'
say "Published labels by family, and machine types of this architecture"
sample 'virtnode_labels|virtnode_machine_types|virtnode_machine_types_deprecated'
say "What libvirt offered but no label can be made of, by reason"
sample 'virtnode_labels_rejected'
say "How long libvirt took to answer, by call: number of calls, mean in milliseconds"
awk -F '[{}" ]+' '
  /^virtnode_hypervisor_call_duration_seconds_sum/ { sum[$3] = $NF }
  /^virtnode_hypervisor_call_duration_seconds_count/ { count[$3] = $NF }
  END {
    for (call in count)
      if (count[call] > 0)
        printf "   %-22s %3d %10.1f\n", call, count[call], 1000 * sum[call] / count[call]
  }' "$scratch/metrics" | sort
