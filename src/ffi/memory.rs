//! What glibc's allocator keeps for later.

/// Has the allocator keep little, for a process that lives long and is mostly at rest.
///
/// One arena for all threads: those of libvirt's calls wait far more than they allocate, and an
/// arena each is memory that only they can use again. And what a probe needed for a moment goes
/// back to the system, which with glibc's own, growing thresholds it would not (`mallopt(3)`).
/// Without glibc nothing is done.
pub fn keep_little_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (nix::libc::M_ARENA_MAX, 1),
        (nix::libc::M_MMAP_THRESHOLD, 64 * 1024),
        (nix::libc::M_TRIM_THRESHOLD, 64 * 1024),
    ] {
        // SAFETY: it only sets a number, before there are other threads. If glibc does not know
        // the parameter, it changes nothing.
        unsafe { nix::libc::mallopt(parameter, value) };
    }
}
