//! Hundreds of domain definitions: every property that `virtnode check` judges, in combinations
//! chosen by a seed.

use fastrand::Rng;

/// The machine types, the most common first.
const MACHINES: [&str; 10] = [
    "q35",
    "q35",
    "q35",
    "pc",
    "pc-q35-8.0",
    "pc-i440fx-7.2",
    "microvm",
    "isapc",
    "pc-q35-99.0",
    "nonsense",
];
/// Numbers of vCPUs around every limit.
const VCPUS: [u32; 22] = [
    1, 1, 2, 2, 4, 4, 6, 8, 12, 16, 64, 165, 254, 255, 256, 257, 288, 289, 300, 1024, 4096, 4097,
];
const FEATURES: [&str; 8] = [
    "x2apic",
    "sse4.2",
    "sse2",
    "avx512f",
    "la57",
    "pcid",
    "hypervisor",
    "nonsense",
];
const MODELS: [&str; 7] = [
    "qemu64",
    "Nehalem",
    "EPYC-Genoa",
    "Skylake-Server",
    "SandyBridge",
    "486",
    "nonsense",
];

/// Returns a definition. The same seed yields the same one.
pub(crate) fn generate(seed: u64) -> String {
    let rng = &mut Rng::with_seed(seed);
    let machine = one(rng, &MACHINES);
    // These have no PCI, which most devices require.
    let bare = matches!(machine, "microvm" | "isapc");
    let maximum = match rng.u8(..4) {
        0 => 4,
        _ => one(rng, &VCPUS),
    };
    let current = match rng.u8(..8) {
        0..3 => maximum,
        3..7 => rng.u32(1..=maximum.min(4)),
        _ => maximum + rng.u32(0..2),
    };
    let (memory, devices) = if bare {
        ("<memory unit='MiB'>64</memory>".to_owned(), String::new())
    } else {
        memory(rng)
    };
    let mut features = String::new();
    if rng.u8(..3) > 0 {
        features.push_str("<acpi/>");
    }
    features.push_str(one(
        rng,
        &[
            "",
            "",
            "",
            "<ioapic driver='qemu'/>",
            "<ioapic driver='kvm'/>",
        ],
    ));
    let (usb, balloon) = (
        "<controller type='usb' model='none'/>",
        "<memballoon model='none'/>",
    );
    let declined = match rng.u8(..8) {
        0..5 if bare => format!("{usb}{balloon}"),
        5 if bare => usb.to_owned(),
        6 if bare => balloon.to_owned(),
        _ => String::new(),
    };
    format!(
        "<domain type='qemu'><name>generated-{seed}</name>{memory}\
         <vcpu current='{current}'>{maximum}</vcpu>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type></os>\
         <features>{features}</features>{cpu}<devices>{declined}{iommu}{devices}</devices></domain>",
        cpu = cpu(rng, maximum),
        iommu = iommu(rng),
    )
}

fn one<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.usize(..choices.len())]
}

fn iommu(rng: &mut Rng) -> String {
    let model = match rng.u8(..12) {
        0..6 => return String::new(),
        6..10 => "intel",
        10 => "virtio",
        _ => one(rng, &["amd", "smmuv3"]),
    };
    let switch = |rng: &mut Rng, name: &str| {
        one(rng, &["", "on", "on", "off"])
            .split_terminator(' ')
            .map(|value| format!(" {name}='{value}'"))
            .collect::<String>()
    };
    let driver = match model {
        "intel" => format!("<driver{}{}/>", switch(rng, "intremap"), switch(rng, "eim")),
        _ => String::new(),
    };
    format!("<iommu model='{model}'>{driver}</iommu>")
}

fn topology(rng: &mut Rng, maximum: u32) -> String {
    let mut rest = maximum;
    let mut take = |rng: &mut Rng| {
        let divisors: Vec<u32> = (1..=rest.min(64))
            .filter(|d| rest.is_multiple_of(*d))
            .collect();
        let part = one(rng, &divisors);
        rest /= part;
        part
    };
    let (threads, cores) = (take(rng), take(rng));
    let (dies, clusters) = match rng.u8(..6) {
        0 => (take(rng), 1),
        1 => (1, take(rng)),
        _ => (1, 1),
    };
    let sockets = match rng.u8(..6) {
        0 => rest + 1,
        _ => rest,
    };
    match rng.u8(..30) {
        0 => format!("<topology sockets='{sockets}' cores='{cores}'/>"),
        1 => format!("<topology sockets='0' cores='{cores}' threads='{threads}'/>"),
        _ => format!(
            "<topology sockets='{sockets}' dies='{dies}' clusters='{clusters}' cores='{cores}' \
             threads='{threads}'/>"
        ),
    }
}

fn cpu(rng: &mut Rng, maximum: u32) -> String {
    let topology = match rng.u8(..3) {
        0 => topology(rng, maximum),
        _ => String::new(),
    };
    let check = one(
        rng,
        &[
            "",
            "",
            " check='none'",
            " check='partial'",
            " check='partial'",
            " check='full'",
        ],
    );
    let mut features = String::new();
    let mut named = Vec::new();
    for _ in 0..rng.u8(..4).saturating_sub(1) {
        let name = one(rng, &FEATURES);
        let policy = one(
            rng,
            &[
                "require", "require", "optional", "disable", "forbid", "force", "nonsense",
            ],
        );
        // A duplicate is an error of its own, and rare.
        if policy == "nonsense" && rng.u8(..4) > 0 || named.contains(&name) && rng.u8(..4) > 0 {
            continue;
        }
        named.push(name);
        features.push_str(&format!("<feature policy='{policy}' name='{name}'/>"));
    }
    match rng.u8(..10) {
        0..3 => format!("<cpu>{topology}</cpu>"),
        3 => format!("<cpu mode='host-model'{check}>{topology}{features}</cpu>"),
        4 => format!("<cpu mode='maximum'{check}>{topology}{features}</cpu>"),
        5 => format!(
            "<cpu mode='{}'>{topology}</cpu>",
            one(rng, &["host-passthrough", "nonsense"])
        ),
        _ => {
            let matching = one(
                rng,
                &[
                    "",
                    "",
                    "",
                    " match='exact'",
                    " match='strict'",
                    " match='minimum'",
                ],
            );
            let fallback = one(rng, &["", "", " fallback='allow'", " fallback='forbid'"]);
            let model = one(rng, &MODELS);
            format!(
                "<cpu mode='custom'{matching}{check}><model{fallback}>{model}</model>{topology}\
                 {features}</cpu>"
            )
        }
    }
}

/// Elements of the domain, and devices.
fn memory(rng: &mut Rng) -> (String, String) {
    let mut devices = String::new();
    let mut total = 64;
    if rng.u8(..3) == 0 {
        for _ in 0..=rng.u8(..2) {
            let node = match rng.u8(..8) {
                0 => 3,
                _ => 0,
            };
            let (size, device) = if rng.bool() {
                (
                    64,
                    format!(
                        "<memory model='dimm'><target><size unit='MiB'>64</size><node>{node}</node></target></memory>"
                    ),
                )
            } else {
                (128, virtio_mem(rng, node))
            };
            total += size;
            devices.push_str(&device);
        }
    }
    let maximum = match rng.u8(..6) {
        0 | 1 if devices.is_empty() => String::new(),
        0 => String::new(),
        2 => format!("<maxMemory{} unit='MiB'>{total}</maxMemory>", slots(rng)),
        3 => format!(
            "<maxMemory{} unit='MiB'>{}</maxMemory>",
            slots(rng),
            total - 32
        ),
        _ => format!("<maxMemory{} unit='MiB'>1024</maxMemory>", slots(rng)),
    };
    (
        format!("{maximum}<memory unit='MiB'>{total}</memory>"),
        devices,
    )
}

fn slots(rng: &mut Rng) -> &'static str {
    one(
        rng,
        &[
            "",
            " slots='0'",
            " slots='1'",
            " slots='2'",
            " slots='16'",
            " slots='16'",
            " slots='300'",
        ],
    )
}

fn virtio_mem(rng: &mut Rng, node: u32) -> String {
    let block = one(rng, &[2048, 2048, 2048, 4096, 3072, 1024]);
    let requested = one(rng, &[0, 0, 64, 128, 127, 130]);
    format!(
        "<memory model='virtio-mem'><target><size unit='MiB'>128</size><node>{node}</node>\
         <block unit='KiB'>{block}</block><requested unit='MiB'>{requested}</requested></target>\
         </memory>"
    )
}
