//! Standard error, written by a thread of its own.
//!
//! Its reader may stop reading, as a pager or a stuck log driver does. A write then waits for as long. On an
//! async thread that would stop the ports and the lanes. So texts wait in a queue that is bounded; what does
//! not fit is dropped and counted, and the number is written once there is room again.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes of texts that wait for the reader: thousands of lines of the log.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// How long [`say`] waits until its text is written. Long enough for any reader that reads; short enough for
/// an async thread, as it happens once while the reader does not.
const SAY_WAIT_MAX: Duration = Duration::from_millis(200);

static QUEUE: Queue = Queue::new();
/// Whether the thread runs. Without it, texts are written by whoever has them.
static HAS_WRITER: LazyLock<bool> = LazyLock::new(|| {
    let write = || QUEUE.write_all_to(io::stderr());
    thread::Builder::new().name("stderr".into()).spawn(write).is_ok()
});

/// Writes a text of whole lines soon. Never waits for the reader.
pub(crate) fn queue(text: String) {
    let text = shardmill_core::masking::hide(text);
    if *HAS_WRITER {
        QUEUE.push(text);
    } else {
        // A reader that is gone stops nothing.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// Writes a text of whole lines, and returns when it is written: before what standard output or a child process
/// gets next, and before the process ends. Where the reader does not read, it is left in the queue.
pub(crate) fn say(text: String) {
    queue(text);
    QUEUE.wait_unless_stuck(SAY_WAIT_MAX);
}

/// Waits until all is written, for `wait_max` at most. For the end of the process, which loses the rest.
pub(crate) fn flush(wait_max: Duration) {
    QUEUE.wait(wait_max);
}

/// Texts on their way to one output.
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

struct Waiting {
    texts: VecDeque<String>,
    bytes: usize,
    /// Texts dropped since the last one that fitted.
    dropped: u64,
    /// Texts that were put into the queue, and those of them that were written, since the start.
    pushed: u64,
    written: u64,
    /// Somebody has waited in vain, and nothing was written since.
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

    /// Writes all that comes, for ever. What cannot be written is lost: nobody reads it.
    fn write_all_to(&self, mut output: impl Write) {
        loop {
            let text = self.next();
            let _ = output.write_all(text.as_bytes());
            self.wrote();
        }
    }

    /// Takes the next text; waits for one.
    fn next(&self) -> String {
        let mut waiting = self.lock();
        loop {
            if let Some(text) = waiting.take() {
                return text;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The text that was taken last is written.
    fn wrote(&self) {
        let mut waiting = self.lock();
        waiting.written += 1;
        waiting.is_stuck = false;
        drop(waiting);
        self.changed.notify_all();
    }

    /// Waits until all that is in the queue now is written.
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
    /// Whether a text fits. Once some were dropped, half of the room must be free first: otherwise each line
    /// that fits would be followed by a number of lines that did not.
    fn has_room(&self, bytes: usize) -> bool {
        let bytes_max = if self.dropped > 0 { WAITING_BYTES_MAX / 2 } else { WAITING_BYTES_MAX };
        self.bytes == 0 || self.bytes.saturating_add(bytes) <= bytes_max
    }

    fn add(&mut self, text: String) {
        self.bytes += text.len();
        self.pushed += 1;
        self.texts.push_back(text);
    }

    /// Says how many were dropped, in the place where they are missing.
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

    /// An output whose reader has stopped until the sender says so.
    struct Stalled {
        go_on: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Later, the sender is gone and nothing is waited for.
            let _ = self.go_on.recv();
            self.written.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue, what was written, and the sender that lets the reader go on.
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
        // It would wait for ever.
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
