//! CPU time from libvirt's documents to labels, and of the periodic work of an idle daemon.
//!
//! The pair of 17 and 30 KB has the size of the documents that KubeVirt's labeller was measured with
//! (3.4 to 4.0 ms and 13,800 allocations to parse them and prepare labels). It is made from captured
//! documents by removing whole elements. The complete documents are measured too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use virtnode::capability::{Capabilities, DomainCapabilities, NodeFacts, Version};
use virtnode::daemon::Metrics;
use virtnode::label::{
    CapabilitiesInUse, Derivation, Policy, ProbeResult, PublishedLabels, Schema, derive,
};

/// Guests to keep of the capabilities, for about 17 KB.
const GUESTS: [&str; 4] = ["x86_64", "i686", "ppc64", "riscv64"];
/// Length of the domain capabilities after removing models of the custom mode.
const DOMAIN_CAPABILITIES_BYTES: usize = 30_000;

const DEBIAN_12: Pair<&str> = Pair {
    capabilities: include_str!(
        "../tests/fixtures/debian12-libvirt-9.0.0-qemu-7.2/capabilities.xml"
    ),
    domain_capabilities: include_str!(
        "../tests/fixtures/debian12-libvirt-9.0.0-qemu-7.2/dc-x86_64-q35-kvm.xml"
    ),
};
const DEBIAN_13: Pair<&str> = Pair {
    capabilities: include_str!(
        "../tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0/capabilities.xml"
    ),
    domain_capabilities: include_str!(
        "../tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0/dc-x86_64-q35-kvm.xml"
    ),
};

/// The capability documents of a node.
struct Pair<T> {
    capabilities: T,
    domain_capabilities: T,
}

impl<T: AsRef<str>> Pair<T> {
    fn facts(&self) -> NodeFacts {
        let capabilities = self.capabilities.as_ref().as_bytes();
        let domain_capabilities = self.domain_capabilities.as_ref().as_bytes();
        let domain = DomainCapabilities::parse("domain capabilities", domain_capabilities);
        NodeFacts {
            libvirt_version: Some(Version::new(11, 3, 0)),
            hypervisor_version: Some(Version::new(10, 0, 2)),
            capabilities: Some(
                Capabilities::parse("capabilities", capabilities).expect("captured"),
            ),
            domain_capabilities: vec![domain.expect("captured")],
            ..NodeFacts::default()
        }
    }

    fn labels(&self, schema: Schema) -> Derivation {
        let policy = Policy {
            schema,
            ..Policy::default()
        };
        derive(&self.facts(), &policy)
    }

    fn bytes(&self) -> [usize; 2] {
        [&self.capabilities, &self.domain_capabilities].map(|text| text.as_ref().len())
    }

    /// Returns the real sizes, for the names of the benchmarks.
    fn sizes(&self) -> String {
        let [capabilities, domain] = self.bytes().map(|bytes| bytes as f64 / 1000.0);
        format!("{capabilities:.1}+{domain:.1} kB")
    }
}

/// Returns Debian 13's documents, reduced to the size of KubeVirt's.
fn cut() -> Pair<String> {
    let kept = |guest: &str| {
        GUESTS
            .iter()
            .any(|arch| guest.contains(&format!("<arch name='{arch}'>")))
    };
    let (host, guests) = DEBIAN_13
        .capabilities
        .split_once("  <guest>")
        .expect("it has guests");
    let (guests, end) = guests.split_at(guests.rfind("</capabilities>").expect("it ends"));
    let guests = guests.split("  <guest>").filter(|guest| kept(guest));
    let mut capabilities: String = host.to_owned();
    capabilities.extend(guests.map(|guest| format!("  <guest>{guest}")));
    capabilities.push_str(end);

    let document = DEBIAN_13.domain_capabilities;
    let models = document.find("<mode name='custom'").expect("it has models");
    let end = models + document[models..].find("    </mode>").expect("it ends");
    let tail = &document[end..];
    // The blockers of a model follow it and must be removed with it.
    let cut = document[models..end]
        .match_indices("      <model ")
        .map(|(at, _)| models + at)
        .find(|at| at + tail.len() >= DOMAIN_CAPABILITIES_BYTES)
        .expect("it is long enough");
    Pair {
        capabilities,
        domain_capabilities: format!("{}{tail}", &document[..cut]),
    }
}

fn documents(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("documents to labels");
    measure(&mut group, "like KubeVirt's", &cut());
    measure(&mut group, "Debian 12", &DEBIAN_12);
    measure(&mut group, "Debian 13", &DEBIAN_13);
    group.finish();
}

fn measure<T: AsRef<str>>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, pair: &Pair<T>) {
    let bytes: usize = pair.bytes().iter().sum();
    group.throughput(Throughput::Bytes(bytes as u64));
    for schema in [Schema::Native, Schema::Both] {
        let id = format!("{name}, {}, {schema}", pair.sizes());
        let (derivation, cost) = allocations(|| pair.labels(schema));
        let labels = derivation.labels.len();
        #[expect(clippy::print_stdout, reason = "supplements the output of criterion")]
        {
            println!("{id}: {labels} labels, {cost}");
        }
        group.bench_function(id, |bencher| bencher.iter(|| pair.labels(schema)));
    }
}

fn idle(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("idle");
    let derived = DEBIAN_13.labels(Schema::Both).labels;
    let mut published = PublishedLabels::starting_from(derived.clone());
    let in_use = CapabilitiesInUse::default();
    let id = format!("{} unchanged labels", derived.len());
    group.bench_function(id, |bencher| {
        bencher.iter(|| {
            published.update(ProbeResult {
                labels: black_box(&derived),
                failed: &[],
                unread: &[],
                in_use: &in_use,
            })
        });
    });
    let metrics = Metrics::new();
    let bytes = metrics.registry.encode().expect("it encodes").len();
    group.bench_function(format!("metrics as text, {bytes} B"), |bencher| {
        bencher.iter(|| metrics.registry.encode());
    });
    group.finish();
}

/// Heap allocations of one run.
struct Cost {
    allocations: u64,
    bytes: u64,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kilobytes = self.bytes as f64 / 1000.0;
        write!(f, "{} allocations of {kilobytes:.0} kB", self.allocations)
    }
}

fn allocations<T>(run: impl FnOnce() -> T) -> (T, Cost) {
    let before = (ALLOCATIONS.get(), BYTES.get());
    let outcome = run();
    let cost = Cost {
        allocations: ALLOCATIONS.get() - before.0,
        bytes: BYTES.get() - before.1,
    };
    (outcome, cost)
}

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<u64> = const { Cell::new(0) };
}

/// The system allocator, with counters per thread.
struct Counting;

impl Counting {
    fn count(bytes: usize) {
        // The counters are constant-initialized and have no destructor, so access does not allocate.
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + bytes as u64);
    }
}

#[allow(
    unsafe_code,
    reason = "an allocator is the only way to count allocations"
)]
// SAFETY: every call is forwarded to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size());
        // SAFETY: the caller upholds the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the same contract, and `pointer` is from the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count(size);
        // SAFETY: the caller upholds the same contract, and `pointer` is from the system allocator.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

criterion_group!(benches, documents, idle);
criterion_main!(benches);
