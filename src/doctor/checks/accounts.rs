//! Who QEMU runs as, and what that user may open.

use std::collections::BTreeSet;

use super::observed::{Accounts, Observed};

/// The user that libvirt runs QEMU as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    /// Its name; the number if it has none here.
    pub(super) name: String,
    /// Its number.
    pub(super) uid: u32,
    /// All its groups.
    pub(super) gids: BTreeSet<u32>,
}

/// The users that distributions build libvirt with: Debian, Ubuntu and Arch; Fedora, RHEL, SUSE
/// and Gentoo.
const USUAL: [&str; 2] = ["libvirt-qemu", "qemu"];

/// The name of KVM's group, everywhere.
pub(super) const KVM: &str = "kvm";

/// Who QEMU runs as: by libvirt's own word (the security model `dac`), for a session by who runs
/// libvirt, else by qemu.conf, else by what distributions do. `None` where nothing tells.
pub(super) fn qemu(observed: &Observed) -> Option<Account> {
    let host = &observed.host;
    let accounts = &host.accounts;
    let told = observed.facts.capabilities.as_ref();
    if let Some(owner) = told.and_then(|capabilities| capabilities.host.emulator_owner) {
        return Some(accounts.account(owner.uid, Some(owner.gid)));
    }
    if observed.libvirt.uri.contains("/session") {
        let socket = host.sockets.get(super::GIVEN_SOCKET);
        let uid = socket.map_or(accounts.own_uid, |socket| socket.uid);
        return Some(accounts.account(uid, None));
    }
    let (user, group) = accounts.configured.clone().unwrap_or_default();
    let uid = |name: &str| accounts.users.get(name).map(|(uid, _)| *uid);
    let usual = || USUAL.iter().find_map(|name| uid(name));
    let uid = match user {
        Some(user) => uid(&user).or_else(|| number(&user))?,
        None => usual()?,
    };
    let gid = group.and_then(|group| {
        let named = accounts.groups.get(&group).map(|(gid, _)| *gid);
        named.or_else(|| number(&group))
    });
    Some(accounts.account(uid, gid))
}

/// qemu.conf has `+0` for the user 0 whatever its name is.
fn number(text: &str) -> Option<u32> {
    text.trim_start_matches('+').parse().ok()
}

impl Accounts {
    fn account(&self, uid: u32, gid: Option<u32>) -> Account {
        let named = self.users.iter().find(|(_, (number, _))| *number == uid);
        let name = named.map_or_else(|| uid.to_string(), |(name, _)| name.clone());
        let own = named.map(|(_, (_, gid))| *gid);
        let member = self
            .groups
            .values()
            .filter(|(_, members)| members.contains(&name))
            .map(|(gid, _)| *gid);
        Account {
            uid,
            // As libvirt gives them to QEMU (virGetGroupList): the one that is set comes on top.
            gids: member.chain(gid).chain(own).collect(),
            name,
        }
    }

    /// A group's number.
    pub(super) fn group(&self, name: &str) -> Option<u32> {
        self.groups.get(name).map(|(gid, _)| *gid)
    }

    /// A group's name, or its number where it has none.
    pub(super) fn group_name(&self, gid: u32) -> String {
        let named = self.groups.iter().find(|(_, (number, _))| *number == gid);
        named.map_or_else(|| gid.to_string(), |(name, _)| name.clone())
    }

    /// A user's name, or its number where it has none.
    pub(super) fn user_name(&self, uid: u32) -> String {
        self.account(uid, None).name
    }
}

impl Account {
    /// Whether it may read and write what has these permissions, as `access(2)` decides; access
    /// control lists do not show here.
    pub(super) fn may_open(&self, mode: u32, uid: u32, gid: u32) -> bool {
        let bits = if self.uid == 0 {
            return true;
        } else if self.uid == uid {
            mode >> 6
        } else if self.gids.contains(&gid) {
            mode >> 3
        } else {
            mode
        };
        bits & 0o6 == 0o6
    }
}

/// `crw-rw----` without its first letter.
pub(super) fn permissions(mode: u32) -> String {
    (0..9)
        .rev()
        .map(|bit| match (mode >> bit) & 1 {
            1 => ['x', 'w', 'r'][bit % 3],
            _ => '-',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_written_as_ls_does() {
        assert_eq!(permissions(0o660), "rw-rw----");
        assert_eq!(permissions(0o751), "rwxr-x--x");
    }

    #[test]
    fn the_first_that_fits_decides_as_in_the_kernel() {
        let account = Account {
            name: "libvirt-qemu".to_owned(),
            uid: 64055,
            gids: [64055, 107].into(),
        };
        assert!(account.may_open(0o660, 0, 107));
        assert!(account.may_open(0o666, 0, 0));
        assert!(!account.may_open(0o600, 0, 0));
        assert!(!account.may_open(0o660, 0, 0));
        // The owner's bits count for the owner, even where the group's would let it in.
        assert!(!account.may_open(0o060, 64055, 107));
        let root = Account { uid: 0, ..account };
        assert!(root.may_open(0o000, 1, 1));
    }
}
