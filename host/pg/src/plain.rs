//! Remembers which servers were already warned about, because their connection is not encrypted.
//!
//! Tables, lookups and reloads parse their connection strings separately. There is still only one warning per server.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Number of servers that are remembered. If there are more, the warning for the oldest one may be repeated.
const SERVERS_MAX: usize = 256;

static SAID: Mutex<Said> = Mutex::new(Said(VecDeque::new()));

/// Servers in the order of their warnings.
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

/// Whether there was no warning for these hosts and ports in this process yet; remembers them.
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
