//! The log, when nobody reads it.

use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::net::TcpStream;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::world::{Pipeline, World};
use crate::support::{Process, admin, free_port, shardmill, wait_for};

/// Far above the time of an answer.
const SOON: Duration = Duration::from_secs(8);
/// Time of a drain, and after it of the process's end.
const DRAIN: Duration = Duration::from_secs(3);
const END: Duration = Duration::from_secs(5);

/// Returns a pipe that accepts no more bytes, as after its reader has stopped.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut filler = writer.try_clone().expect("a second end");
    let filled = Arc::<AtomicU64>::default();
    let count = filled.clone();
    // The thread ends when the reader is dropped.
    std::thread::spawn(move || {
        while filler.write_all(&[b'.'; 1024]).is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    wait_for("a full pipe", || {
        let before = filled.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(300));
        before > 0 && filled.load(Ordering::Relaxed) == before
    });
    (reader, writer)
}

/// Whether the process reports that it is alive.
fn is_live(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    stream.set_read_timeout(Some(SOON)).expect("set");
    let request = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let mut answer = String::new();
    stream.write_all(request).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.contains("200 OK")
}

#[test]
fn wall_09_a_reader_of_the_log_that_has_stopped_stops_nothing_else() {
    const PART: u64 = 10;
    let world = World::new(2);
    let port = free_port();
    let timing = format!("drain = \"{} s\"\n", DRAIN.as_secs());
    let pipeline = Pipeline { sink: admin(port), timing, ..Pipeline::default() };
    let file = world.pipeline(&pipeline);
    let (reader, writer) = full_pipe();
    let mut command = shardmill(&["run", &file, "-vvv"]);
    let run = command.stdout(Stdio::null()).stderr(writer).spawn();
    let mut run = Process(run.expect("the binary starts"));
    wait_for("health", || is_live(port));
    for part in 1..=5 {
        world.put((part - 1) * PART..part * PART, 3);
        world.wait_rows(part * PART);
        assert!(is_live(port), "after part {part}");
    }
    let begun = Instant::now();
    run.ask_to_end();
    let status = run.wait();
    assert!(begun.elapsed() < DRAIN + END, "the run ended after {:?}", begun.elapsed());
    assert_eq!(status.code(), Some(0));
    world.assert_each_once_in_order(5 * PART);
    drop(reader);
}

/// No line is lost if the log is read.
#[test]
fn wall_09_the_last_lines_of_the_log_are_written_before_the_process_ends() {
    let world = World::new(1);
    for _ in 0..3 {
        let started = world.start(&Pipeline::default());
        assert_eq!(started.terminate(), Some(0));
        let log = std::fs::read_to_string(world.log()).expect("a log");
        assert!(log.contains("draining; send the signal again to stop at once\n"), "{log}");
        assert!(log.ends_with('\n') && !log.contains("were dropped"), "{log}");
    }
}
