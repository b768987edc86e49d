//! Access control of the local API.

use nix::unistd::Uid;

use crate::daemon::socket::Peer;

/// The users and groups that may use the local API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    uids: Vec<u32>,
    gids: Vec<u32>,
}

impl Access {
    /// Allows these users, by default root and the daemon's own, and the members of these groups.
    pub fn new(uids: Option<Vec<u32>>, gids: Vec<u32>) -> Self {
        let own = || vec![0, Uid::effective().as_raw()];
        Self {
            uids: uids.unwrap_or_else(own),
            gids,
        }
    }

    /// Returns true if the client may use the API. Its groups are those of its process, not those
    /// of a user database, which a container may lack.
    pub(super) fn allows(&self, peer: &Peer) -> bool {
        let is_member = |gid| self.gids.contains(gid);
        self.uids.contains(&peer.uid) || is_member(&peer.gid) || peer.groups.iter().any(is_member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allowed_users_and_groups_have_access() {
        let peer = |uid, gid, groups: &[u32]| Peer {
            uid,
            gid,
            groups: groups.into(),
        };
        let access = Access::new(Some(vec![7]), vec![70_001]);
        assert!(access.allows(&peer(7, 1, &[])));
        assert!(access.allows(&peer(65_000, 70_001, &[])));
        assert!(access.allows(&peer(65_000, 1, &[5, 70_001])));
        assert!(!access.allows(&peer(65_000, 1, &[5])));
        assert!(!access.allows(&peer(0, 0, &[0])));
        let usual = Access::new(None, Vec::new());
        assert!(usual.allows(&peer(0, 0, &[])));
        assert!(usual.allows(&peer(Uid::effective().as_raw(), 5, &[])));
    }
}
