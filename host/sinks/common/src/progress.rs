//! How far a commit has come whose rows go out piece by piece, for sinks without transactions.

use shardmill_core::record::Position;
use shardmill_core::sink::{Commit, Committed, Refusal};

/// What became of each row of the commit under way.
#[derive(Debug, Default)]
pub struct CommitProgress {
    /// Where the commit ends; another end is another commit.
    to_inclusive: Option<Position>,
    rows: Vec<State>,
    /// All rows before this have their outcome.
    first_waiting: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Done,
    Refused(String),
}

impl CommitProgress {
    /// Takes a commit up: where it stood if it is tried again; true: it is new, from its beginning.
    pub fn enter(&mut self, commit: &Commit) -> bool {
        let is_new = self.to_inclusive.as_ref() != Some(&commit.range.to_inclusive);
        if is_new {
            self.to_inclusive = Some(commit.range.to_inclusive.clone());
            self.rows = vec![State::Waiting; commit.rows.len()];
            self.first_waiting = 0;
        }
        is_new
    }

    /// The rows without an outcome, ascending.
    pub fn waiting(&mut self) -> Vec<usize> {
        while self.rows.get(self.first_waiting).is_some_and(|state| *state != State::Waiting) {
            self.first_waiting += 1;
        }
        (self.first_waiting..self.rows.len())
            .filter(|place| self.rows[*place] == State::Waiting)
            .collect()
    }

    /// The destination has the row.
    pub fn done(&mut self, place: usize) {
        self.rows[place] = State::Done;
    }

    /// The destination will never take the row.
    pub fn refuse(&mut self, place: usize, reason: String) {
        self.rows[place] = State::Refused(reason);
    }

    /// The rows that were refused, ascending.
    pub fn refusals(&self) -> Vec<Refusal> {
        let refused = |(row, state): (usize, &State)| match state {
            State::Refused(reason) => Some(Refusal { row, reason: reason.clone() }),
            State::Waiting | State::Done => None,
        };
        self.rows.iter().enumerate().filter_map(refused).collect()
    }

    /// What the commit did.
    pub fn committed(&self, commit: &Commit) -> Committed {
        let mut committed = Committed::default();
        for (state, row) in self.rows.iter().zip(&*commit.rows) {
            match state {
                State::Done => {
                    committed.rows_written += 1;
                    committed.bytes_written += row.payload.len() as u64;
                }
                State::Refused(_) => committed.rows_refused += 1,
                State::Waiting => {}
            }
        }
        committed
    }
}
