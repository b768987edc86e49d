use std::os::unix::fs::symlink;
use std::time::Duration;

use nix::sys::stat::Mode;

use super::*;
use crate::hotplug::{HotplugRequest, Require};
use crate::operation::AskedBy;

fn entry(number: u64) -> Entry {
    let order = Order {
        domain: "vm".parse().unwrap(),
        request: HotplugRequest::Vcpus {
            count: 4,
            online: false,
        },
        require: Require::Online,
        persistent: false,
        timeout: Duration::from_secs(60),
        idempotency_key: None,
        asked_by: AskedBy::Local { uid: 0 },
    };
    let id = OperationId::new(number, 7);
    let created = Timestamp::from_millis(1_795_260_166_250);
    Entry {
        record: Record::new(id, &order, created),
        order,
        history: None,
        vcpu_life: None,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn strange_files_are_skipped_and_the_others_read() {
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path()).unwrap();
    let good = entry(1);
    journal.write(&good).unwrap();
    let path = |number: u64| {
        let id = OperationId::new(number, 7);
        state.path().join(DIRECTORY).join(format!("{id}.json"))
    };
    nix::unistd::mkfifo(&path(2), Mode::S_IRWXU).unwrap();
    fs::create_dir(path(3)).unwrap();
    symlink(path(1), path(4)).unwrap();
    for name in [".x.draft/y", "directory/z"] {
        let directory = state.path().join(DIRECTORY).join(name);
        fs::create_dir_all(directory).unwrap();
    }
    fs::write(path(5), "no JSON").unwrap();
    drop(journal);
    let journal = Journal::open(state.path()).unwrap();
    assert_eq!(journal.entries().unwrap(), std::slice::from_ref(&good));
    assert_eq!(Journal::read(state.path()).unwrap(), [good]);
    assert!(!path(5).exists(), "moved aside");
    assert!(path(3).exists() && path(2).exists(), "left alone");
    // A FIFO does not hold a write up either.
    nix::unistd::mkfifo(
        &state
            .path()
            .join(DIRECTORY)
            .join(format!(".{}.draft", entry(6).record.id)),
        Mode::S_IRWXU,
    )
    .unwrap();
    journal.write(&entry(6)).unwrap();
    assert_eq!(journal.entries().unwrap().len(), 2);
}

#[test]
fn journal_is_opened_once_until_it_is_released() {
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path()).unwrap();
    let second = Journal::open(state.path()).unwrap_err();
    assert!(matches!(second, JournalError::Locked(_)), "{second}");
    assert!(Journal::read(state.path()).unwrap().is_empty());
    journal.release();
    Journal::open(state.path()).unwrap();
}

#[test]
fn reading_a_journal_changes_nothing() {
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path()).unwrap();
    let directory = state.path().join(DIRECTORY);
    let id = entry(1).record.id;
    for name in [format!(".{id}.draft"), format!("{id}.json")] {
        fs::write(directory.join(name), "half").unwrap();
    }
    assert!(Journal::read(state.path()).unwrap().is_empty());
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
    drop(journal);
}

#[test]
fn directory_that_others_may_write_to_is_restricted() {
    let state = tempfile::tempdir().unwrap();
    let directory = state.path().join(DIRECTORY);
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, Permissions::from_mode(0o777)).unwrap();
    let journal = Journal::open(state.path()).unwrap();
    assert_eq!(mode(&directory), 0o755);
    journal.write(&entry(1)).unwrap();
    assert_eq!(mode(&journal.path(&entry(1).record.id)), PRIVATE_FILE);
}

#[test]
fn kept_verdict_is_the_first_and_ends_with_a_write() {
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path()).unwrap();
    let mut entry = entry(1);
    journal.write(&entry).unwrap();
    let at = Timestamp::from_millis(1_795_260_170_000);
    entry.record.end(Verdict::Pending, "in time", at);
    journal.keep_verdict(&entry.record);
    entry
        .record
        .end(Verdict::Busy, "later", at.after(Duration::from_secs(9)));
    journal.keep_verdict(&entry.record);
    drop(journal);
    let journal = Journal::open(state.path()).unwrap();
    let kept = KeptVerdict {
        verdict: Verdict::Pending,
        at,
    };
    let id = &entry.record.id;
    assert_eq!(journal.kept_verdict(id), Some(kept));
    assert_eq!(journal.entries().unwrap().len(), 1);
    journal.write(&entry).unwrap();
    drop(journal);
    assert_eq!(Journal::open(state.path()).unwrap().kept_verdict(id), None);
}
