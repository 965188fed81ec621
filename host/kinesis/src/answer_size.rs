//! Size of a reader's requests: how many records fit into the memory that is booked, by the size of earlier records.
//!
//! A server answers with up to 10 MiB, whatever is free here. Only the requested number of records limits an answer. So
//! a reader that knows nothing of its records requests few. If an answer needs more memory than is free, it is not read
//! (`booking`), and the whole of it is booked before the next request.

use std::time::Duration;

use tokio::time::Instant;

/// Most bytes of payload in an answer.
///
/// Source: API reference, GetRecords: 10 MB.
const ANSWER_BYTES_MAX: usize = 10 << 20;
/// Assumed size of a record before the first one came: the largest that is usual. A larger one may come alone.
///
/// Source: API reference, PutRecord: 1 MiB by default.
const RECORD_BYTES_UNKNOWN: usize = 1 << 20;
/// Most records of an answer.
///
/// Source: API reference, GetRecords: Limit.
const RECORDS_MAX: u32 = 10_000;
/// Bytes of memory that a record uses in an answer in addition to its payload.
const RECORD_OVERHEAD_BYTES: usize = 512;
/// Least bytes that a reader books: less than every lane's part of the budget, so that it never waits for them.
const BOOKED_BYTES_MIN: usize = 64 << 10;
/// Time for which a shard that had nothing more is expected to have little. After that it may have anything.
const QUIET_FOR: Duration = Duration::from_secs(2);
/// Growth of a request where memory is scarce: at most this many times the records that ever came at once. The new ones
/// may be larger than those that came.
const GROWTH: u64 = 8;
/// Records that may always be requested, even if never as many came at once.
const RECORDS_ALWAYS: u64 = 128;

/// Knowledge of a shard's answers.
#[derive(Debug, Default)]
pub(super) struct AnswerSize {
    /// Expected bytes of a record; `None`: none came yet.
    record_bytes: Option<usize>,
    /// Most records that came at once.
    records_most: u64,
    /// Bytes of memory that the last answer used while it was read.
    last_bytes: usize,
    /// Time at which the shard had nothing more.
    quiet_at: Option<Instant>,
    /// An answer that was not read for lack of memory: the bytes that it needs, and the records that were requested.
    outgrown: Option<(usize, u32)>,
    /// Most records to request, after an answer that was longer than any may be.
    few: Option<u32>,
}

impl AnswerSize {
    /// Returns the least and the most bytes to book for the next answer. `part_bytes` is the lane's own part of the
    /// budget.
    pub(super) fn booking(&self, part_bytes: usize, now: Instant) -> (usize, usize) {
        let one = self.record_bytes.map_or(BOOKED_BYTES_MIN, |bytes| in_flight(bytes, 1));
        let outgrown = self.outgrown.map_or(0, |(needed, _)| needed);
        let least = one.max(BOOKED_BYTES_MIN).max(outgrown);
        let is_quiet = self.quiet_at.is_some_and(|at| now.duration_since(at) < QUIET_FOR);
        let most = match is_quiet {
            // A shard that is likely to have little does not take memory that others may need.
            true => (2 * self.last_bytes).max(part_bytes),
            false => usize::MAX,
        };
        (least, most.min(in_flight(ANSWER_BYTES_MAX, 10_000)).max(least))
    }

    /// Returns the number of records to request with these bytes booked, at most `records_max`.
    pub(super) fn records(&self, booked_bytes: usize, records_max: u32) -> u32 {
        // The same number as for the answer that was not read: what is booked is enough for that answer only.
        let asked = self.outgrown.map_or(u32::MAX, |(_, records)| records);
        let records_max = records_max.min(asked).min(self.few.unwrap_or(u32::MAX)).max(1);
        if booked_bytes >= in_flight(ANSWER_BYTES_MAX, records_max as usize) {
            return records_max;
        }
        let each = in_flight(self.record_bytes.unwrap_or(RECORD_BYTES_UNKNOWN), 1);
        let fitting = (booked_bytes / each) as u64;
        let grown = match self.records_most {
            0 => fitting,
            most => fitting.min((most * GROWTH).max(RECORDS_ALWAYS)),
        };
        u32::try_from(grown.max(1)).unwrap_or(records_max).min(records_max)
    }

    /// Learns from an answer with this number of records and bytes of payload; `has_more`: the shard has more.
    pub(super) fn learn(&mut self, records: usize, bytes: usize, has_more: bool, now: Instant) {
        self.quiet_at = (!has_more).then_some(now);
        self.last_bytes = in_flight(bytes, records);
        self.outgrown = None;
        self.few = self.few.map(|few| few.saturating_mul(2)).filter(|few| *few < RECORDS_MAX);
        if records == 0 {
            return;
        }
        self.records_most = self.records_most.max(records as u64);
        // A quarter more than the mean. A larger estimate falls slowly.
        let mean = bytes / records;
        let before = self.record_bytes.unwrap_or_default();
        self.record_bytes = Some((mean + mean / 4).max(before - before / 4));
    }

    /// Notes that an answer to a call for `records` needs `needed` bytes of memory, and was not read.
    pub(super) fn outgrew(&mut self, needed: usize, records: u32) {
        self.outgrown = Some((needed, records));
    }

    /// Notes that an answer to a call for `records` was longer than any may be: fewer are requested.
    pub(super) fn was_too_long(&mut self, records: u32) {
        self.few = Some((records / GROWTH as u32).max(1));
    }

    /// Notes that a call failed: until the next answer, the shard may have anything.
    pub(super) fn forget_quiet(&mut self) {
        self.quiet_at = None;
    }
}

/// Returns the bytes of payload for which [`in_flight`] gives at least `occupied_bytes`. The result is based on memory
/// that was really used, so long keys are included.
pub(super) fn payload_of(occupied_bytes: usize, records: usize) -> usize {
    occupied_bytes.saturating_sub(records.saturating_mul(RECORD_OVERHEAD_BYTES)).div_ceil(5) * 2
}

/// Returns the memory that an answer uses while it is read: its text, in which payloads are base64, and the records
/// that are parsed from it.
fn in_flight(payload_bytes: usize, records: usize) -> usize {
    payload_bytes / 2 * 5 + records * RECORD_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn fault_02_a_first_answer_is_booked_before_it_comes() {
        let size = AnswerSize::default();
        let (least, most) = size.booking(256 << 10, Instant::now());
        assert!(least <= 256 << 10, "it never waits for {least}");
        assert!(most >= 25 * MIB, "it may hold 10 MiB: {most}");
        // One record of 1 MiB fits into a lane's part of the budget, five into more.
        assert_eq!(size.records(256 << 10, 10_000), 1);
        assert_eq!(size.records(13 * MIB, 10_000), 5);
        // If a whole answer fits, all records are requested.
        assert_eq!(size.records(most, 10_000), 10_000);
    }

    #[test]
    fn fault_02_the_size_of_records_says_how_many_are_asked_for() {
        let now = Instant::now();
        let mut size = AnswerSize::default();
        size.learn(1, 1_000, true, now);
        let fits = |size: &AnswerSize, booked| size.records(booked, 10_000);
        assert_eq!(fits(&size, MIB), RECORDS_ALWAYS as u32, "not many more than came");
        size.learn(100, 100_000, true, now);
        let asked = fits(&size, MIB);
        assert!((200..400).contains(&asked), "{asked}");
        size.learn(2, 8 * MIB, true, now);
        assert_eq!(fits(&size, MIB), 1);
        let (least, _) = size.booking(256 << 10, now);
        assert!(least > 10 * MIB, "one of them alone");
    }

    #[test]
    fn wall_02_an_answer_that_was_not_read_is_booked_as_it_is() {
        let now = Instant::now();
        let mut size = AnswerSize::default();
        size.learn(100, 100_000, true, now);
        size.outgrew(24 * MIB, 300);
        let (least, most) = size.booking(256 << 10, now);
        assert_eq!(least, 24 * MIB);
        assert!(most >= least, "{most}");
        assert_eq!(size.records(least, 10_000), 300, "as many as then, although more have room");
        size.outgrew(40 * MIB, 300);
        assert_eq!(size.booking(256 << 10, now), (40 * MIB, 40 * MIB), "above the largest of AWS");
        size.learn(100, 100_000, true, now);
        let (least, _) = size.booking(256 << 10, now);
        assert_eq!(least, BOOKED_BYTES_MIN, "it was read");
    }

    #[test]
    fn wall_02_of_answers_that_are_too_long_fewer_records_are_asked_for_until_one_fits() {
        let now = Instant::now();
        let mut size = AnswerSize::default();
        let mut asked = vec![];
        for _ in 0..7 {
            let records = size.records(usize::MAX, 10_000);
            asked.push(records);
            size.was_too_long(records);
        }
        assert_eq!(asked, [10_000, 1_250, 156, 19, 2, 1, 1]);
        for expected in [2, 4, 8] {
            size.learn(1, 1_000, true, now);
            assert_eq!(size.records(usize::MAX, 10_000), expected);
        }
        (0..11).for_each(|_| size.learn(1, 1_000, true, now));
        assert_eq!(size.records(usize::MAX, 10_000), 10_000);
    }

    #[test]
    fn wall_02_what_an_answer_occupied_is_learned_as_what_is_booked() {
        for (occupied, records) in [(5_120, 10), (1_000_000, 10), (30 * MIB, 10_000), (100, 1)] {
            let booked = in_flight(payload_of(occupied, records), records);
            assert!(booked >= occupied, "{occupied} bytes of {records} records: {booked}");
        }
        // For records of a mebibyte, the size of the payload is learned, which books more.
        assert!(payload_of(shardmill_core::budget::occupied_while_read(1_398_200, 6), 1) < MIB);
    }

    #[test]
    fn fault_02_a_quiet_shard_books_little_until_it_may_have_filled() {
        let now = Instant::now();
        let mut size = AnswerSize::default();
        size.learn(10, 1_000, false, now);
        let booking = |size: &AnswerSize, now| size.booking(256 << 10, now);
        assert_eq!(booking(&size, now + Duration::from_millis(200)), (64 << 10, 256 << 10));
        let (_, most) = booking(&size, now + Duration::from_secs(60));
        assert!(most > 25 * MIB, "{most}");
        size.forget_quiet();
        let (_, most) = booking(&size, now);
        assert!(most > 25 * MIB, "{most}");
    }
}
