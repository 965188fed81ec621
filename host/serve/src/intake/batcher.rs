//! Merges the records of many requests into shared PutRecords calls, and answers each request when the stream
//! has all of its records.
//!
//! Invariant: a request gets at most one answer, and 200 only after each of its records was acknowledged.
//!
//! One call is in flight at a time. Records that are refused temporarily go back to the front of the queue in
//! their order. A request whose records are refused for longer than [`REFUSED_MAX`] gets an error. If a whole
//! call is refused permanently and it has records of several requests, each of these requests is put alone from
//! then on, so that only the invalid one fails.
//!
//! | result of a call | records | requests |
//! | --- | --- | --- |
//! | accepted | done | answered when their last record is accepted |
//! | refused temporarily | back to the front | wait, for at most [`REFUSED_MAX`] |
//! | a record refused permanently | dropped with the other records of its request | answered with the cause |
//! | call refused, several requests in it | back to the front, put alone | wait |
//! | call refused, one request in it | dropped | answered with the cause |
//! | every call failed for [`REFUSED_MAX`] | all dropped, queued ones too | all answered with the cause |

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use shardmill_core::budget::Permit;
use shardmill_core::log_throttle::LogThrottle;
use shardmill_core::metric;
use shardmill_core::retry::RetryPolicy;
use shardmill_kinesis::put::{
    Offer, Outcomes, PutAnswer, PutOptions, PutRequest, PutWriter, Refused,
};
use shardmill_kinesis::put_call::{NewRecord, RECORDS_PER_REQUEST_MAX, StreamWriter};

/// Time for which the first record of a call waits for others. It is short compared with a call.
const LINGER: Duration = Duration::from_millis(5);
/// Longest time for which a request may be refused, or the stream be silent, before the client gets an error.
pub(super) const REFUSED_MAX: Duration = Duration::from_secs(10);
/// Retries of records that are refused temporarily, while their request is open. The limits of a shard are per
/// second.
const RETRY: RetryPolicy = RetryPolicy::every(Duration::from_millis(100));

/// Records of one HTTP request.
pub(super) struct Submission {
    /// At least one record.
    pub records: Vec<NewRecord>,
    /// Reservation of their bytes, returned when the request is answered.
    pub reserved: Permit,
    /// Receives one answer, when nothing of the request is in flight any more.
    pub answer: oneshot::Sender<Result<(), SubmissionRefusal>>,
}

/// Reason why the stream does not have all records of a request. It may have some of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SubmissionRefusal {
    /// Permanent: the same request would be refused again.
    Records(String),
    /// The stream cannot be reached, is throttled, or no longer exists.
    Stream(String),
}

/// Puts submissions until all senders are dropped and all requests are answered. `failing` has the cause while
/// calls fail, and `None` while they succeed.
pub(super) async fn run(
    stream: StreamWriter,
    mut submissions: mpsc::Receiver<Submission>,
    failing: watch::Sender<Option<String>>,
) {
    let options = PutOptions { strict_order: false, retry: RETRY, answer_max: Some(REFUSED_MAX) };
    let mut writer = PutWriter::new(stream, options);
    let mut queue = Queue::default();
    let mut failing_since: Option<Instant> = None;
    let mut lines = LogThrottle::default();
    while queue.fill(&mut submissions).await {
        let request = queue.cut(writer.request());
        let begun = Instant::now();
        let answer = writer.put(request).await;
        let failure = match &answer {
            PutAnswer::Later { cause, .. } => Some(cause.clone()),
            PutAnswer::Stream { error, .. } => Some(error.to_string()),
            PutAnswer::Each(_) | PutAnswer::Records { .. } => None,
        };
        match failure {
            Some(cause) => {
                if let Some(left_out) = lines.line(Instant::now()) {
                    tracing::warn!(%cause, left_out, "the intake failed to put records on the stream");
                }
                failing_since.get_or_insert(begun);
                failing.send_replace(Some(cause));
            }
            None => {
                failing_since = None;
                failing.send_replace(None);
            }
        }
        let is_refused = queue.apply(answer, begun);
        if let Some(since) = failing_since
            && since.elapsed() >= REFUSED_MAX
        {
            let cause = failing.borrow().clone().unwrap_or_default();
            queue.give_up(&cause);
        } else if !is_refused {
            writer.succeeded();
        } else if let Some(pause) = writer.retry_after() {
            tokio::time::sleep(pause).await;
        }
    }
}

type RequestId = u64;

/// A request that is not answered yet.
struct Open {
    answer: oneshot::Sender<Result<(), SubmissionRefusal>>,
    _reserved: Permit,
    /// Number of records that the stream does not have yet.
    left: usize,
    refused_since: Option<Instant>,
    /// Whether a call with its records was refused permanently: its records share no further call.
    is_alone: bool,
}

#[derive(Default)]
struct Queue {
    records: VecDeque<(RequestId, NewRecord)>,
    open: HashMap<RequestId, Open>,
    next_id: RequestId,
}

impl Queue {
    /// Waits for records to put, and a moment longer for others that can share the call. Returns `false` at the
    /// end.
    async fn fill(&mut self, submissions: &mut mpsc::Receiver<Submission>) -> bool {
        if self.records.is_empty() {
            let Some(first) = submissions.recv().await else { return false };
            self.add(first);
            let linger = tokio::time::sleep(LINGER);
            tokio::pin!(linger);
            while self.records.len() < RECORDS_PER_REQUEST_MAX {
                tokio::select! {
                    more = submissions.recv() => match more {
                        Some(more) => self.add(more),
                        None => break,
                    },
                    () = &mut linger => break,
                }
            }
        }
        while let Ok(more) = submissions.try_recv() {
            self.add(more);
        }
        true
    }

    fn add(&mut self, submission: Submission) {
        let Submission { records, reserved, answer } = submission;
        let id = self.next_id;
        self.next_id += 1;
        let left = records.len();
        let open = Open { answer, _reserved: reserved, left, refused_since: None, is_alone: false };
        self.open.insert(id, open);
        self.records.extend(records.into_iter().map(|record| (id, record)));
    }

    /// Fills the next call from the front, within the limits of PutRecords. A request that must be alone shares
    /// the call with no other.
    fn cut(&mut self, mut call: PutRequest<RequestId>) -> PutRequest<RequestId> {
        let is_alone = |id: RequestId| self.open.get(&id).is_some_and(|open| open.is_alone);
        let Some(first) = self.records.front().map(|(id, _)| *id) else { return call };
        while let Some((id, record)) = self.records.pop_front() {
            let is_other = id != first && (is_alone(first) || is_alone(id));
            let offer = match is_other {
                true => Offer::Full(id, record),
                false => call.offer(id, record),
            };
            if let Offer::KeyWaits(id, record) | Offer::Full(id, record) = offer {
                self.records.push_front((id, record));
                break;
            }
        }
        call
    }

    /// Answers the requests that are complete or permanently refused, and puts temporarily refused records
    /// back. Returns whether there were any of the latter.
    fn apply(&mut self, answer: PutAnswer<RequestId>, begun: Instant) -> bool {
        let refused_for_now = |records: Vec<(RequestId, NewRecord)>, cause: &str| {
            let refused = |(tag, record)| Refused { tag, record, cause: cause.to_owned() };
            records.into_iter().map(refused).collect()
        };
        let (taken, later, never) = match answer {
            PutAnswer::Each(Outcomes { taken, later, never }) => (taken, later, never),
            PutAnswer::Later { records, cause } => {
                (Vec::new(), refused_for_now(records, &cause), Vec::new())
            }
            PutAnswer::Stream { records, error } => {
                (Vec::new(), refused_for_now(records, &error.to_string()), Vec::new())
            }
            PutAnswer::Records { records, error } => {
                let ids: Vec<RequestId> = records.iter().map(|(id, _)| *id).collect();
                if ids.first() != ids.last() {
                    // One of several requests is invalid: each continues alone, so that only that one fails.
                    for id in &ids {
                        if let Some(open) = self.open.get_mut(id) {
                            open.is_alone = true;
                        }
                    }
                    self.put_back(records);
                    return false;
                }
                if let Some(id) = ids.first() {
                    self.answer(*id, Err(SubmissionRefusal::Records(error.to_string())));
                }
                (Vec::new(), Vec::new(), Vec::new())
            }
        };
        for (id, record) in taken {
            metrics::counter!(metric::INTAKE_RECORDS_TOTAL).increment(1);
            metrics::counter!(metric::INTAKE_BYTES_TOTAL).increment(record.payload.len() as u64);
            self.taken(id);
        }
        for Refused { tag: id, cause, .. } in never {
            self.answer(id, Err(SubmissionRefusal::Records(cause)));
        }
        let mut refused = Vec::new();
        for Refused { tag: id, record, cause } in later {
            let Some(open) = self.open.get_mut(&id) else { continue };
            if open.refused_since.get_or_insert(begun).elapsed() >= REFUSED_MAX {
                self.answer(id, Err(SubmissionRefusal::Stream(cause)));
            } else {
                refused.push((id, record));
            }
        }
        let is_refused = !refused.is_empty();
        self.put_back(refused);
        // Records of answered requests are not put any more.
        self.records.retain(|(id, _)| self.open.contains_key(id));
        is_refused
    }

    /// Puts records back at the front, in their order.
    fn put_back(&mut self, records: Vec<(RequestId, NewRecord)>) {
        for record in records.into_iter().rev() {
            self.records.push_front(record);
        }
    }

    fn taken(&mut self, id: RequestId) {
        let Some(open) = self.open.get_mut(&id) else { return };
        open.left -= 1;
        if open.left == 0 {
            self.answer(id, Ok(()));
        }
    }

    fn answer(&mut self, id: RequestId, answer: Result<(), SubmissionRefusal>) {
        if let Some(open) = self.open.remove(&id) {
            // The client may have disconnected; then nobody receives the answer.
            let _ = open.answer.send(answer);
        }
    }

    /// Answers all waiting requests with an error: the stream cannot be reached.
    fn give_up(&mut self, cause: &str) {
        self.records.clear();
        let ids: Vec<RequestId> = self.open.keys().copied().collect();
        for id in ids {
            self.answer(id, Err(SubmissionRefusal::Stream(cause.to_owned())));
        }
    }
}
