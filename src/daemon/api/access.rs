//! Who may use the local API.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User, getgrouplist};

use crate::daemon::socket::Peer;

/// The users and groups that may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    uids: Vec<u32>,
    gids: Vec<u32>,
}

impl Access {
    /// These users, or root and the user of this process; and the members of these groups.
    pub fn new(uids: Option<Vec<u32>>, gids: Vec<u32>) -> Self {
        let own = || vec![0, Uid::effective().as_raw()];
        Self {
            uids: uids.unwrap_or_else(own),
            gids,
        }
    }

    /// Whether this one may. A user's further groups are those of the user database.
    pub(super) async fn allows(&self, peer: Peer) -> bool {
        if self.uids.contains(&peer.uid) || self.gids.contains(&peer.gid) {
            return true;
        }
        if self.gids.is_empty() {
            return false;
        }
        let groups = tokio::task::spawn_blocking(move || groups_of(peer)).await;
        groups
            .unwrap_or_default()
            .iter()
            .any(|gid| self.gids.contains(&gid.as_raw()))
    }
}

fn groups_of(peer: Peer) -> Vec<Gid> {
    let user = User::from_uid(Uid::from_raw(peer.uid)).ok().flatten();
    let name = user.and_then(|user| CString::new(user.name).ok());
    name.and_then(|name| getgrouplist(&name, Gid::from_raw(peer.gid)).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn users_and_groups_are_let_in_and_nobody_else() {
        let peer = |uid, gid| Peer { uid, gid };
        let access = Access::new(Some(vec![7]), vec![70_001]);
        assert!(access.allows(peer(7, 1)).await);
        assert!(access.allows(peer(65_000, 70_001)).await);
        assert!(!access.allows(peer(65_000, 1)).await);
        assert!(!access.allows(peer(0, 0)).await);
        let usual = Access::new(None, Vec::new());
        assert!(usual.allows(peer(0, 0)).await);
        assert!(usual.allows(peer(Uid::effective().as_raw(), 5)).await);
    }
}
