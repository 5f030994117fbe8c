//! Who is logged in. The only state that the site keeps, and bounded.

use std::collections::{BTreeMap, HashMap};

use crate::draw::hash;

/// Logins kept at a time; the oldest goes first. Far above what concurrent rollouts of one site need.
const SESSIONS_MAX: usize = 1024;

/// Open sessions of one running site.
#[derive(Debug)]
pub struct Sessions {
    seed: u64,
    made: u64,
    users: HashMap<String, (u64, String)>,
    by_age: BTreeMap<u64, String>,
}

impl Sessions {
    /// No session yet; `seed` decides the names of those to come.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            made: 0,
            users: HashMap::new(),
            by_age: BTreeMap::new(),
        }
    }

    /// Opens a session for `user` and returns its name, which the browser keeps in a cookie.
    pub fn open(&mut self, user: &str) -> String {
        self.made += 1;
        let id = format!(
            "{:016x}",
            hash(self.seed, &format!("session {}", self.made))
        );
        self.users.insert(id.clone(), (self.made, user.to_owned()));
        self.by_age.insert(self.made, id.clone());
        while self.by_age.len() > SESSIONS_MAX {
            if let Some((_, oldest)) = self.by_age.pop_first() {
                self.users.remove(&oldest);
            }
        }
        id
    }

    /// The user of session `id`.
    pub fn user(&self, id: &str) -> Option<&str> {
        self.users.get(id).map(|(_, user)| user.as_str())
    }

    /// Ends session `id`.
    pub fn close(&mut self, id: &str) {
        if let Some((number, _)) = self.users.remove(id) {
            self.by_age.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_lives_until_it_is_closed() {
        let mut sessions = Sessions::new(7);
        let (first, second) = (sessions.open("ada"), sessions.open("ben"));
        assert_eq!(sessions.user(&first), Some("ada"));
        sessions.close(&first);
        assert_eq!(sessions.user(&first), None);
        assert_eq!(sessions.user(&second), Some("ben"));
    }

    #[test]
    fn the_oldest_session_makes_room() {
        let mut sessions = Sessions::new(7);
        let ids: Vec<String> = (0..=SESSIONS_MAX).map(|_| sessions.open("ada")).collect();
        assert_eq!(sessions.user(&ids[0]), None);
        assert_eq!(sessions.user(&ids[1]), Some("ada"));
        assert_eq!(sessions.users.len(), SESSIONS_MAX);
        assert_eq!(sessions.by_age.len(), SESSIONS_MAX);
    }
}
