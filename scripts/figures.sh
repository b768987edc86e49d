#!/usr/bin/env bash
# Measures the figures of docs/figures.md and prints them as a table, next to their targets and
# comparisons: the benchmark benches/labels.rs, and benches/{daemon,hotplug,cluster,targets}.rs
# with the release build of the daemon on a dedicated libvirt and Kubernetes. Takes about half an hour
# after the build. Stops everything it started at the end, also on Ctrl-C.
#
# With a file name as the argument, the table is also written to that file.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin # libvirtd, and cargo for a shell opened before rustup was installed

# The name in benches/labels.rs, followed there by the sizes.
readonly PAIR="documents to labels/like KubeVirt's"
readonly KUBEVIRT="KubeVirt's labeller"

running= # process id of the running benchmark
scratch=$(mktemp -d "${TMPDIR:-/tmp}/virtnode-figures.XXXXXX")
readonly scratch
readonly rows=$scratch/rows

note() { printf 'figures: %s\n' "$*" >&2; }

die() {
  note "$*"
  exit 1
}

clean_up() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP # once is enough
  if [[ -n $running ]]; then
    # The benchmark stops the processes it started, then exits.
    kill "$running" 2>/dev/null || true
    wait "$running" || true
  fi
  rm -rf -- "$scratch"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Runs a benchmark as a child of this shell, so that it can be stopped: cargo does not forward signals.
bench() { # name, arguments...
  local name=$1 program
  shift
  program=$(cargo bench --locked --no-run --bench "$name" --message-format json |
    sed -n '/"kind":\["bench"\]/s/.*"executable":"\([^"]*\)".*/\1/p')
  [[ -x $program ]] || die "cargo built no benchmark '$name'."
  "$program" --bench "$@" &
  running=$!
  wait "$running" || die "the benchmark '$name' failed: see above."
  running=
}

row() { # name, measured, target, reached, comparison
  local IFS=$'\t'
  printf '%s\n' "$*" >>"$rows"
}

# The median in nanoseconds that criterion printed for a schema.
median() { # schema
  sed -n "s|^test $PAIR, .*, $1 \.\.\. bench: *\([0-9,]*\) ns/iter.*|\1|p" "$scratch/labels" | tr -d ,
}

# The output of benches/labels.rs for a schema: "… kB, native: 138 labels, 2049 allocations of 179 kB".
output_of() { # schema
  sed -n "s|^${PAIR#*/}, \(.*\), $1: \(.*\)|\1: \2|p" "$scratch/labels"
}

labels_rows() {
  local schema nanoseconds output allocations reached
  for schema in native both; do
    nanoseconds=$(median "$schema")
    output=$(output_of "$schema")
    [[ -n $nanoseconds && -n $output ]] || die "benches/labels.rs printed unexpected output."
    allocations=${output#*labels, }
    reached=NO
    if ((nanoseconds <= 350000)); then
      reached=yes
    fi
    row "documents to labels, ${output%%:*}, schema $schema" \
      "$(awk -v ns="$nanoseconds" 'BEGIN { printf "%.2f ms", ns / 1e6 }')" \
      "<= 0.35 ms" "$reached" "$KUBEVIRT, 17+30 kB: 3.4-4.0 ms"
    row "  heap" "$allocations" "" "" "$KUBEVIRT: 13800 allocations of 813 kB"
  done
}

# Median and largest of whole runs of a command, in microseconds.
runs() { # command...
  local start run
  for ((run = 0; run < 100; run++)); do
    start=${EPOCHREALTIME/[.,]/}
    "$@" >/dev/null 2>&1 || true # the exit code does not matter
    echo $((${EPOCHREALTIME/[.,]/} - start))
  done | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)], all[NR] }'
}

# With the documents of Debian 13: a definition of 130 lines, and 60 kB and 180 kB of libvirt's.
check_row() {
  local documents=tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0 median largest other reached=NO
  local domain=tests/lab/captured/debian12-backports-libvirt-11.3.0-qemu-10.0/domain-q35-plugged.xml
  read -r median largest < <(runs "$scratch/virtnode" check --domain-xml "$domain" \
    --capabilities "$documents/capabilities.xml" \
    --domain-capabilities "$documents/dc-x86_64-q35-kvm.xml" \
    --domain-capabilities "$documents/dc-x86_64-q35-qemu.xml" \
    --libvirt-version 11.3.0 --qemu-version 10.0.2)
  # Both first load libvirt's client library and about fifty libraries that it depends on.
  read -r other _ < <(runs virsh --version)
  if ((median <= 20000)); then
    reached=yes
  fi
  row "virtnode check offline, whole process (100 times)" \
    "$(awk -v us="$median" -v most="$largest" 'BEGIN { printf "%.1f ms, at most %.1f ms", us / 1e3, most / 1e3 }')" \
    "<= 20 ms" "$reached" "$(awk -v us="$other" 'BEGIN { printf "virsh --version: %.1f ms", us / 1e3 }')"
}

table() {
  awk -F '\t' -v OFS='  ' '
    { for (field = 1; field <= 5; field++) {
        cell[NR, field] = $field
        if (length($field) > width[field]) width[field] = length($field)
      } }
    END {
      for (line = 1; line <= NR; line++) {
        text = ""
        for (field = 1; field <= 5; field++)
          text = text sprintf("%-*s  ", width[field], cell[line, field])
        sub(/ +$/, "", text)
        print text
        if (line == 1) {
          gsub(/./, "-", text)
          print text
        }
      }
    }' "$rows"
}

conditions() {
  date -u '+%Y-%m-%d %H:%M UTC'
  printf 'virtnode %s, %s\n' "$(git describe --always --dirty 2>/dev/null || echo '?')" "$(rustc --version)"
  sed -n 's/^# //p' "$scratch/daemon"
  printf '%s, Linux %s, %s CPUs (%s), load %s\n' \
    "$(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release)" "$(uname -r)" "$(nproc)" \
    "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)" \
    "$(cut -d ' ' -f 1 /proc/loadavg)"
}

note "building (the first time takes many minutes)"
cargo build --release --locked
target=$(cargo metadata --locked --format-version 1 --no-deps |
  sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
# Building the benchmarks replaces the program with a build that has the test dependencies' features.
cp -- "$target/release/virtnode" "$scratch/virtnode"

row "what" "measured" "target" "reached" "compared with"
note "measuring $PAIR"
bench labels --output-format bencher "^$PAIR" >"$scratch/labels"
labels_rows
note "measuring virtnode check"
check_row
note "measuring the daemon"
VIRTNODE=$scratch/virtnode bench daemon >"$scratch/daemon"
grep -v '^#' "$scratch/daemon" >>"$rows"
note "measuring hotplug"
VIRTNODE=$scratch/virtnode bench hotplug >>"$rows"
note "measuring DomainHotplug objects"
bench cluster >>"$rows"
note "measuring virtnode targets"
VIRTNODE=$scratch/virtnode bench targets >>"$rows"
size=$(stat -c %s "$scratch/virtnode")
row "the program" "$(awk -v bytes="$size" 'BEGIN { printf "%.1f MB", bytes / 1e6 }')"

{
  conditions
  printf '\n'
  table
} | tee ${1+"$1"}
