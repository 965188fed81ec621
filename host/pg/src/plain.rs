//! Which servers this process has said of that they are spoken to in plain text.
//!
//! Tables, lookups and reloads read their connection strings each for themselves: one server is said once
//! for all of them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Servers that are remembered at most: beyond, the one that was said first may be said again.
const SERVERS_MAX: usize = 256;

static SAID: Mutex<Said> = Mutex::new(Said(VecDeque::new()));

/// Servers in the order in which they were said.
struct Said(VecDeque<String>);

impl Said {
    fn is_first(&mut self, servers: String) -> bool {
        if self.0.contains(&servers) {
            return false;
        }
        if self.0.len() == SERVERS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(servers);
        true
    }
}

/// Whether these hosts and ports have not been said in this process; from now on they have.
pub(super) fn is_first(servers: String) -> bool {
    SAID.lock().unwrap_or_else(PoisonError::into_inner).is_first(servers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_18_a_server_is_said_once_and_few_are_remembered() {
        let mut said = Said(VecDeque::new());
        let server = |number: usize| format!("db{number}:5432");
        let first: Vec<usize> = (0..SERVERS_MAX).filter(|at| said.is_first(server(*at))).collect();
        assert_eq!(first.len(), SERVERS_MAX);
        assert!((0..SERVERS_MAX).all(|number| !said.is_first(server(number))));
        assert!(said.is_first("db0:5433".into()), "another port");
        assert_eq!(said.0.len(), SERVERS_MAX);
        assert!(said.is_first(server(0)) && !said.is_first(server(2)));
    }
}
