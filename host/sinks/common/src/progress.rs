//! Progress of a commit whose rows are sent in several requests, for sinks without transactions. When the commit is
//! retried, rows with an outcome are not sent again.

use shardmill_core::record::Position;
use shardmill_core::sink::{Commit, Committed, Refusal};

/// Outcome of each row of the current commit.
#[derive(Debug, Default)]
pub struct CommitProgress {
    /// End of the commit. A commit with another end is another commit.
    to_inclusive: Option<Position>,
    rows: Vec<State>,
    /// Index of the first row that may have no outcome.
    first_waiting: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Done,
    Refused(String),
}

impl CommitProgress {
    /// Begins a commit, or continues it if it is a retry. Returns true if it is new.
    pub fn enter(&mut self, commit: &Commit) -> bool {
        let is_new = self.to_inclusive.as_ref() != Some(&commit.range.to_inclusive);
        if is_new {
            self.to_inclusive = Some(commit.range.to_inclusive.clone());
            self.rows = vec![State::Waiting; commit.rows.len()];
            self.first_waiting = 0;
        }
        is_new
    }

    /// Returns the indexes of the rows without an outcome, ascending.
    pub fn waiting(&mut self) -> Vec<usize> {
        while self.rows.get(self.first_waiting).is_some_and(|state| *state != State::Waiting) {
            self.first_waiting += 1;
        }
        (self.first_waiting..self.rows.len())
            .filter(|place| self.rows[*place] == State::Waiting)
            .collect()
    }

    /// Notes that the destination has the row.
    pub fn done(&mut self, place: usize) {
        self.rows[place] = State::Done;
    }

    /// Notes that the destination refuses the row for good.
    pub fn refuse(&mut self, place: usize, reason: String) {
        self.rows[place] = State::Refused(reason);
    }

    /// Returns the refused rows, ascending.
    pub fn refusals(&self) -> Vec<Refusal> {
        let refused = |(row, state): (usize, &State)| match state {
            State::Refused(reason) => Some(Refusal { row, reason: reason.clone() }),
            State::Waiting | State::Done => None,
        };
        self.rows.iter().enumerate().filter_map(refused).collect()
    }

    /// Returns the counts of the commit.
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
