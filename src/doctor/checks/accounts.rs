//! The user that QEMU runs as, and its permissions.

use std::collections::BTreeSet;

use super::observed::{Accounts, GIVEN_SOCKET, Observed};

/// The user that libvirt runs QEMU as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    /// The number if the user has no name here.
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gids: BTreeSet<u32>,
}

/// The users that distributions configure libvirt with: Debian, Ubuntu and Arch; Fedora, RHEL, SUSE
/// and Gentoo.
const USUAL: [&str; 2] = ["libvirt-qemu", "qemu"];

/// The name of KVM's group on all distributions.
pub(super) const KVM: &str = "kvm";

/// Returns the user that libvirt runs QEMU as. Sources, in this order: libvirt's security model
/// `dac`; for a session the user that runs libvirt; qemu.conf; the distributions' defaults.
pub(super) fn qemu(observed: &Observed) -> Option<Account> {
    let host = &observed.host;
    let accounts = &host.accounts;
    let capabilities = observed.facts.capabilities.as_ref();
    if let Some(owner) = capabilities.and_then(|capabilities| capabilities.host.emulator_owner) {
        return Some(accounts.account(owner.uid, Some(owner.gid)));
    }
    if observed.libvirt.uri.contains("/session") {
        let socket = host.sockets.get(GIVEN_SOCKET);
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

/// In qemu.conf `+0` is the user ID 0, even if a user is named 0.
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
            // As in libvirt's virGetGroupList: the configured group is added to the user's own.
            gids: member.chain(gid).chain(own).collect(),
            name,
        }
    }

    pub(super) fn group(&self, name: &str) -> Option<u32> {
        self.groups.get(name).map(|(gid, _)| *gid)
    }

    /// The number if the group has no name here.
    pub(super) fn group_name(&self, gid: u32) -> String {
        let named = self.groups.iter().find(|(_, (number, _))| *number == gid);
        named.map_or_else(|| gid.to_string(), |(name, _)| name.clone())
    }

    /// The number if the user has no name here.
    pub(super) fn user_name(&self, uid: u32) -> String {
        self.account(uid, None).name
    }
}

impl Account {
    /// True if `access(2)` would grant reading and writing. Access control lists are not considered.
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

/// Formats permission bits as `ls` does, without the type letter.
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
    fn permissions_are_formatted_like_ls() {
        assert_eq!(permissions(0o660), "rw-rw----");
        assert_eq!(permissions(0o751), "rwxr-x--x");
    }

    #[test]
    fn first_matching_class_decides_as_in_the_kernel() {
        let account = Account {
            name: "libvirt-qemu".to_owned(),
            uid: 64055,
            gids: [64055, 107].into(),
        };
        assert!(account.may_open(0o660, 0, 107));
        assert!(account.may_open(0o666, 0, 0));
        assert!(!account.may_open(0o600, 0, 0));
        assert!(!account.may_open(0o660, 0, 0));
        // The owner's bits decide for the owner, even if the group's bits would grant access.
        assert!(!account.may_open(0o060, 64055, 107));
        let root = Account { uid: 0, ..account };
        assert!(root.may_open(0o000, 1, 1));
    }
}
