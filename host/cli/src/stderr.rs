//! Standard error, written by a thread of its own.
//!
//! The reader of standard error may stop reading, as a pager or a stuck log driver does, and a write then
//! blocks. On an async thread that would stop ports and lanes. Therefore texts wait in a bounded queue. Texts
//! that do not fit are dropped and counted, and the count is written when there is room again.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Maximum bytes of texts that wait for the reader: thousands of log lines.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// Longest time that [`say`] waits for its text to be written. It is long enough for a reader that reads, and
/// short enough for an async thread: it happens only once while the reader does not read.
const SAY_WAIT_MAX: Duration = Duration::from_millis(200);

static QUEUE: Queue = Queue::new();
/// Whether the writer thread runs. Without it, callers write their texts themselves.
static HAS_WRITER: LazyLock<bool> = LazyLock::new(|| {
    let write = || QUEUE.write_all_to(io::stderr());
    thread::Builder::new().name("stderr".into()).spawn(write).is_ok()
});

/// Queues a text of whole lines for writing. Never waits for the reader.
pub(crate) fn queue(text: String) {
    let text = shardmill_core::masking::hide(text);
    if *HAS_WRITER {
        QUEUE.push(text);
    } else {
        // A closed reader is not an error.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// Writes a text of whole lines and waits until it is written, so that it comes before the next output on
/// standard output or of a child process, and before the end of the process. If the reader does not read, the
/// text stays in the queue.
pub(crate) fn say(text: String) {
    queue(text);
    QUEUE.wait_unless_stuck(SAY_WAIT_MAX);
}

/// Waits at most `wait_max` until everything is written. For the end of the process, which loses the rest.
pub(crate) fn flush(wait_max: Duration) {
    QUEUE.wait(wait_max);
}

/// Texts that wait to be written to one output.
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

struct Waiting {
    texts: VecDeque<String>,
    bytes: usize,
    /// Number of texts dropped since the last one that fitted.
    dropped: u64,
    /// Number of texts queued, and number of texts written, since the start.
    pushed: u64,
    written: u64,
    /// Whether a wait has timed out since the last write.
    is_stuck: bool,
}

impl Queue {
    const fn new() -> Self {
        let waiting = Waiting {
            texts: VecDeque::new(),
            bytes: 0,
            dropped: 0,
            pushed: 0,
            written: 0,
            is_stuck: false,
        };
        Self { waiting: Mutex::new(waiting), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, text: String) {
        let mut waiting = self.lock();
        if !waiting.has_room(text.len()) {
            waiting.dropped += 1;
            return;
        }
        waiting.add_dropped();
        waiting.add(text);
        drop(waiting);
        self.changed.notify_all();
    }

    /// Writes all texts, forever. A text that cannot be written is lost: nobody reads it.
    fn write_all_to(&self, mut output: impl Write) {
        loop {
            let text = self.next();
            let _ = output.write_all(text.as_bytes());
            self.wrote();
        }
    }

    /// Takes the next text, and waits for one if the queue is empty.
    fn next(&self) -> String {
        let mut waiting = self.lock();
        loop {
            if let Some(text) = waiting.take() {
                return text;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Records that the last text taken was written.
    fn wrote(&self) {
        let mut waiting = self.lock();
        waiting.written += 1;
        waiting.is_stuck = false;
        drop(waiting);
        self.changed.notify_all();
    }

    /// Waits until everything that is in the queue now is written.
    fn wait(&self, wait_max: Duration) {
        let waiting = self.lock();
        let last = waiting.pushed + u64::from(waiting.dropped > 0);
        let is_on_its_way = |waiting: &mut Waiting| waiting.written < last;
        let waited = self.changed.wait_timeout_while(waiting, wait_max, is_on_its_way);
        let (mut waiting, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        waiting.is_stuck |= waited.timed_out();
    }

    fn wait_unless_stuck(&self, wait_max: Duration) {
        let is_stuck = self.lock().is_stuck;
        if !is_stuck {
            self.wait(wait_max);
        }
    }
}

impl Waiting {
    /// Whether a text fits. After texts were dropped, half of the queue must be free first. Otherwise each line
    /// that fits would be followed by a line with the number of dropped ones.
    fn has_room(&self, bytes: usize) -> bool {
        let bytes_max = if self.dropped > 0 { WAITING_BYTES_MAX / 2 } else { WAITING_BYTES_MAX };
        self.bytes == 0 || self.bytes.saturating_add(bytes) <= bytes_max
    }

    fn add(&mut self, text: String) {
        self.bytes += text.len();
        self.pushed += 1;
        self.texts.push_back(text);
    }

    /// Adds a line with the number of dropped texts, at the place where they are missing.
    fn add_dropped(&mut self) {
        match std::mem::take(&mut self.dropped) {
            0 => {}
            count => self.add(format!(
                "warning: {count} lines of this log were dropped: standard error was not read fast enough\n"
            )),
        }
    }

    fn take(&mut self) -> Option<String> {
        if self.texts.is_empty() {
            self.add_dropped();
        }
        let text = self.texts.pop_front()?;
        self.bytes -= text.len();
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::time::Instant;

    use super::*;

    const LINE: &str = "a line of the log, which has its number at the end: ";

    /// An output whose reader has stopped until the sender sends.
    struct Stalled {
        go_on: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // When the sender is dropped, `recv` fails and nothing waits any more.
            let _ = self.go_on.recv();
            self.written.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Returns a queue, what was written, and the sender that lets the reader continue.
    fn stalled() -> (&'static Queue, Arc<Mutex<Vec<u8>>>, mpsc::Sender<()>) {
        let queue: &'static Queue = Box::leak(Box::new(Queue::new()));
        let (reads, go_on) = mpsc::channel();
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let output = Stalled { go_on, written: written.clone() };
        thread::spawn(move || queue.write_all_to(output));
        (queue, written, reads)
    }

    #[test]
    fn wall_09_a_log_that_nobody_reads_is_bounded_and_says_what_it_dropped() {
        const LINES: u64 = 100_000;
        let (queue, written, reads) = stalled();
        let begun = Instant::now();
        for number in 0..LINES {
            queue.push(format!("{LINE}{number}\n"));
            assert!(queue.lock().bytes <= WAITING_BYTES_MAX);
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "it waited for its reader");
        drop(reads);
        queue.wait(Duration::from_secs(60));
        queue.push(format!("{LINE}{LINES}\n"));
        queue.wait(Duration::from_secs(60));
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        assert!(text.ends_with('\n'));
        let (mut next, mut all_dropped) = (0, 0);
        for line in text.lines() {
            if let Some(number) = line.strip_prefix(LINE) {
                assert_eq!(number.parse::<u64>().unwrap(), next, "in their order");
                next += 1;
            } else {
                let count = line.strip_prefix("warning: ").unwrap().split(' ').next().unwrap();
                let dropped: u64 = count.parse().unwrap();
                all_dropped += dropped;
                next += dropped;
            }
        }
        assert_eq!(next, LINES + 1, "each line was written or counted");
        assert!(all_dropped > LINES / 2, "{all_dropped}");
    }

    #[test]
    fn wall_09_only_the_first_note_waits_for_a_reader_that_does_not_read() {
        let (queue, written, reads) = stalled();
        queue.push("one\n".into());
        let begun = Instant::now();
        queue.wait_unless_stuck(Duration::from_millis(50));
        assert!(begun.elapsed() >= Duration::from_millis(50));
        queue.push("two\n".into());
        // This would wait forever if the queue were not known to be stuck.
        queue.wait_unless_stuck(Duration::MAX);
        drop(reads);
        queue.wait(Duration::from_secs(60));
        assert_eq!(*written.lock().unwrap(), b"one\ntwo\n");
        assert!(!queue.lock().is_stuck);
        queue.push("three\n".into());
        queue.wait_unless_stuck(Duration::from_secs(60));
        assert!(written.lock().unwrap().ends_with(b"three\n"));
    }
}
