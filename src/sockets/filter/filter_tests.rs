//! Rules of the filter, and properties: whatever is received in whatever parts, the bytes that pass are
//! a prefix of it, and every message in them is allowed.

use proptest::prelude::*;

use super::*;
use crate::capability::eim::dry_run_domain;

/// A message with these words of its header after the length.
fn message(words: [u32; 6], body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap();
    let mut message = length.to_be_bytes().to_vec();
    message.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    message.extend_from_slice(body);
    message
}

fn call(procedure: u32, body: &[u8]) -> Vec<u8> {
    message([REMOTE, VERSION, procedure, CALL, 7, OK], body)
}

fn ping() -> Vec<u8> {
    message([KEEPALIVE, VERSION, 1, MESSAGE, 0, OK], &[])
}

fn text(text: &str) -> Vec<u8> {
    let mut xdr = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    xdr.extend_from_slice(text.as_bytes());
    xdr.resize(xdr.len().next_multiple_of(4), 0);
    xdr
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The arguments of a procedure about a domain.
fn of_domain(rest: &[u32]) -> Vec<u8> {
    [text("tenant-a_web"), vec![7; 16], words(&[1]), words(rest)].concat()
}

fn open(uri: &str, flags: u32) -> Vec<u8> {
    call(1, &[words(&[1]), text(uri), words(&[flags])].concat())
}

fn to_native(domain: &str) -> Vec<u8> {
    call(
        136,
        &[text("qemu-argv"), text(domain), words(&[0])].concat(),
    )
}

fn request(bytes: &[u8], allow_changes: bool) -> Result<(), Refusal> {
    let mut passed = Vec::new();
    Requests::new(allow_changes).push(bytes, &mut passed)?;
    assert_eq!(passed, bytes);
    Ok(())
}

fn reply(bytes: &[u8]) -> Result<(), Refusal> {
    let mut passed = Vec::new();
    Replies::new(false).push(bytes, &mut passed)?;
    assert_eq!(passed, bytes);
    Ok(())
}

#[test]
fn reads_pass_and_others_are_refused_by_number() {
    let body = of_domain(&[]);
    assert_eq!(request(&call(212, &of_domain(&[0])), false), Ok(()));
    assert_eq!(request(&ping(), false), Ok(()));
    // DOMAIN_DESTROY, DOMAIN_MIGRATE_PERFORM3_PARAMS, DOMAIN_OPEN_CONSOLE, DOMAIN_SET_GUEST_VCPUS.
    for number in [12, 305, 201, 372, 0, u32::MAX] {
        let refusal = Refusal::Procedure {
            program: REMOTE,
            number,
        };
        assert_eq!(request(&call(number, &body), true), Err(refusal));
    }
    // QEMU's monitor and the guest agent.
    for number in [1, 2, 3, 7] {
        let command = message([QEMU, VERSION, number, CALL, 1, OK], &body);
        assert!(request(&command, true).is_err(), "{number}");
    }
    // The administration of the daemon, and LXC.
    for program in [0x0690_0690, 0x2000_8088] {
        let foreign = message([program, VERSION, 1, CALL, 1, OK], &[]);
        assert_eq!(request(&foreign, true), Err(Refusal::Program(program)));
    }
}

#[test]
fn vcpu_change_passes_only_with_the_option_and_for_the_running_domain() {
    let change = |flags| call(199, &of_domain(&[2, flags]));
    let refused = request(&change(1), false).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("DOMAIN_SET_VCPUS_FLAGS, needs --allow-changes"),
        "{text}"
    );
    assert_eq!(request(&change(1), true), Ok(()));
    // The definition, the guest agent, the maximum.
    for flags in [0, 2, 3, 4, 5, 9] {
        let refusal = Refusal::Arguments("DOMAIN_SET_VCPUS_FLAGS");
        assert_eq!(request(&change(flags), true), Err(refusal), "{flags}");
    }
}

#[test]
fn arguments_that_execute_change_or_reveal_are_refused() {
    for uri in [
        "qemu+ext:///session?command=/tmp/x",
        "qemu+ssh://host/session?command=/tmp/x",
        "qemu:///system",
        "test:///default",
        "",
    ] {
        assert!(request(&open(uri, 0), false).is_err(), "{uri}");
    }
    for flags in [0, 1, 6] {
        assert_eq!(request(&open("qemu:///session", flags), false), Ok(()));
    }
    assert!(request(&open("qemu:///session", 8), false).is_err());

    let emulator = [words(&[1]), text("/tmp/x"), words(&[0, 0, 0, 0])].concat();
    for procedure in [342, 394] {
        assert!(request(&call(procedure, &emulator), false).is_err());
        assert_eq!(request(&call(procedure, &words(&[0; 6])), false), Ok(()));
        assert!(request(&call(procedure, &[]), false).is_err());
    }
    for (flags, passes) in [(0, true), (2, true), (4, true), (1, false), (8, false)] {
        let xml = call(14, &of_domain(&[flags]));
        assert_eq!(request(&xml, false).is_ok(), passes, "{flags}");
    }
    for (timeout, passes) in [(5, true), (u32::MAX - 1, true), (0, false), (61, false)] {
        let set = call(420, &of_domain(&[timeout, 0]));
        assert_eq!(request(&set, false).is_ok(), passes, "{timeout}");
    }
    for explicit in [false, true] {
        let domain = dry_run_domain("kvm", "pc-q35-10.1", explicit);
        assert_eq!(request(&to_native(&domain), false), Ok(()));
        let other = domain.replace(
            "<name>",
            "<devices><emulator>/tmp/x</emulator></devices><name>",
        );
        assert!(request(&to_native(&other), false).is_err());
        let other = domain.replace("pc-q35-10.1", "a'>");
        assert!(request(&to_native(&other), false).is_err());
    }
}

#[test]
fn lengths_and_kinds_out_of_range_are_refused() {
    let too_long = u32::try_from(MAX_REQUEST + 1).unwrap();
    for length in [0, 27, u32::MAX, too_long] {
        let mut bytes = call(4, &[]);
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        assert_eq!(request(&bytes, false), Err(Refusal::Length(length)));
    }
    for kind in [1, 2, 3, 4, 5, 6] {
        let bytes = message([REMOTE, VERSION, 4, kind, 1, OK], &[]);
        assert!(request(&bytes, false).is_err(), "{kind}");
    }
    let long = message([KEEPALIVE, VERSION, 1, MESSAGE, 0, OK], &[0; 4]);
    assert_eq!(request(&long, false), Err(Refusal::Length(32)));
}

#[test]
fn replies_and_known_events_pass_up_to_a_mebibyte() {
    let answer = |length: usize| message([REMOTE, VERSION, 14, REPLY, 1, OK], &vec![1; length]);
    assert_eq!(reply(&answer(MAX_REPLY - HEADER)), Ok(()));
    let longer = u32::try_from(MAX_REPLY + 1).unwrap();
    let refused = reply(&answer(MAX_REPLY + 1 - HEADER));
    assert_eq!(refused, Err(Refusal::Length(longer)));
    let event = |number, kind| message([REMOTE, VERSION, number, kind, 0, OK], &[0; 8]);
    assert_eq!(reply(&event(318, MESSAGE)), Ok(()));
    assert_eq!(reply(&ping()), Ok(()));
    assert!(reply(&event(318, REPLY)).is_err());
    assert!(reply(&event(14, MESSAGE)).is_err());
    // A stream, and a reply with file descriptors.
    assert!(reply(&event(14, 3)).is_err());
    assert!(reply(&event(14, 5)).is_err());
}

#[test]
fn messages_before_a_refused_one_pass_and_the_refused_one_does_not() {
    let good = call(4, &[]);
    let bad = call(12, &[1; 40]);
    let mut passed = Vec::new();
    let both = [good.clone(), bad].concat();
    assert!(Requests::new(false).push(&both, &mut passed).is_err());
    assert_eq!(passed, good);
}

#[test]
fn no_procedure_is_in_two_lists_and_no_number_twice() {
    let all: Vec<&Procedure> = [READ, CHANGE, EVENTS].into_iter().flatten().collect();
    for (at, one) in all.iter().enumerate() {
        for other in &all[at + 1..] {
            let is_same = (one.program, one.number) == (other.program, other.number);
            assert!(!is_same && one.name != other.name, "{one:?} {other:?}");
        }
    }
}

/// Bytes that are mostly messages, valid or nearly.
fn traffic() -> impl Strategy<Value = Vec<u8>> {
    let program = prop_oneof![
        6 => Just(REMOTE), 2 => Just(QEMU), 2 => Just(KEEPALIVE), 1 => any::<u32>()
    ];
    let procedure = prop_oneof![
        4 => prop::sample::select(READ).prop_map(|procedure| procedure.number),
        2 => prop::sample::select(EVENTS).prop_map(|procedure| procedure.number),
        1 => Just(199),
        1 => 0_u32..460,
    ];
    let header = (
        program,
        prop_oneof![9 => Just(VERSION), 1 => any::<u32>()],
        procedure,
        prop_oneof![4 => Just(CALL), 4 => Just(REPLY), 2 => Just(MESSAGE), 1 => 0_u32..8],
        any::<u32>(),
        prop_oneof![9 => Just(OK), 1 => 0_u32..4],
    );
    let body = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..80),
        2 => Just(of_domain(&[1, 1])),
        2 => Just(of_domain(&[0])),
        1 => Just([words(&[1]), text("qemu:///session"), words(&[0])].concat()),
    ];
    let length = prop_oneof![9 => Just(None), 1 => any::<u32>().prop_map(Some)];
    let one = (header, body, length).prop_map(|(header, body, length)| {
        let (program, version, procedure, kind, serial, status) = header;
        let words = [program, version, procedure, kind, serial, status];
        let mut bytes = message(words, &body);
        if let Some(length) = length {
            bytes[..4].copy_from_slice(&length.to_be_bytes());
        }
        bytes
    });
    prop::collection::vec(one, 0..8).prop_map(|messages| messages.concat())
}

/// Divides bytes into parts of these lengths.
fn parts<'b>(bytes: &'b [u8], lengths: &'b [usize]) -> impl Iterator<Item = &'b [u8]> {
    let mut rest = bytes;
    let mut lengths = lengths.iter().cycle();
    std::iter::from_fn(move || {
        let length = (*lengths.next()?).clamp(1, rest.len().max(1));
        let (part, after) = rest.split_at_checked(length)?;
        rest = after;
        Some(part)
    })
}

/// Returns the messages in bytes that passed to the daemon, each with its header.
fn split(mut bytes: &[u8]) -> Vec<(Header, &[u8])> {
    let mut messages = Vec::new();
    while let Some(header) = bytes.first_chunk().map(Header::parse) {
        let (message, rest) = bytes.split_at(usize::try_from(header.length).unwrap());
        messages.push((header, &message[HEADER..]));
        bytes = rest;
    }
    assert_eq!(bytes, b"", "part of a message");
    messages
}

proptest! {
    #[test]
    fn passed_requests_are_a_prefix_of_whole_allowed_messages(
        bytes in traffic(),
        lengths in prop::collection::vec(1_usize..60, 1..6),
        allow_changes in any::<bool>(),
    ) {
        let mut passed = Vec::new();
        let mut filter = Requests::new(allow_changes);
        let in_parts = parts(&bytes, &lengths).try_for_each(|part| filter.push(part, &mut passed));
        prop_assert!(bytes.starts_with(&passed));
        for (header, body) in split(&passed) {
            if header.program == KEEPALIVE {
                prop_assert!(body.is_empty());
                continue;
            }
            let list = [READ, CHANGE];
            let lists = if allow_changes { &list[..] } else { &list[..1] };
            let find = |list: &&'static [Procedure]| find(list, header.program, header.procedure);
            let procedure = lists.iter().find_map(find);
            prop_assert!(procedure.is_some());
            prop_assert_eq!((header.kind, header.version), (CALL, VERSION));
            prop_assert!(are_allowed(procedure.unwrap().arguments, body));
        }
        // The result does not depend on how the bytes arrive.
        let mut at_once = Vec::new();
        let whole = Requests::new(allow_changes).push(&bytes, &mut at_once);
        prop_assert_eq!((in_parts, passed), (whole, at_once));
    }

    #[test]
    fn passed_replies_are_a_prefix_and_never_longer_than_their_lengths(
        bytes in traffic(),
        lengths in prop::collection::vec(1_usize..60, 1..6),
    ) {
        let mut passed = Vec::new();
        let mut filter = Replies::new(false);
        let in_parts = parts(&bytes, &lengths).try_for_each(|part| filter.push(part, &mut passed));
        prop_assert!(bytes.starts_with(&passed));
        let mut rest = &passed[..];
        while let Some(header) = rest.first_chunk().map(Header::parse) {
            prop_assert_eq!(Replies::new(false).check(&header).map(|length| length >= HEADER), Ok(true));
            let length = usize::try_from(header.length).unwrap();
            rest = &rest[length.min(rest.len())..];
        }
        let mut at_once = Vec::new();
        let whole = Replies::new(false).push(&bytes, &mut at_once);
        prop_assert_eq!((in_parts, passed), (whole, at_once));
    }

    #[test]
    fn random_bytes_never_panic_and_pass_only_as_a_prefix(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut passed = Vec::new();
        let _refused = Requests::new(true).push(&bytes, &mut passed);
        prop_assert!(bytes.starts_with(&passed));
        let mut passed = Vec::new();
        let _refused = Replies::new(true).push(&bytes, &mut passed);
        prop_assert!(bytes.starts_with(&passed));
    }
}
