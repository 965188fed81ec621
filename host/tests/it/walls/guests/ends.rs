//! Calls to the host that are in progress when the pipeline stops.

use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::asking::{Asking, FAIL_IF_FAILED, Place, SEND};
use crate::support::{Process, shardmill, wait_for};

const DRAIN: Duration = Duration::from_secs(1);
/// Less than the time for which the process waits for threads that do not end, after the drain.
const END: Duration = Duration::from_millis(2_500);

#[test]
fn wall_10_a_call_to_the_host_ends_with_the_drain_and_blames_nobody() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = server.local_addr().expect("an address");
    let url = format!("http://{address}/");
    let data = [b"GET", url.as_bytes()].concat();
    let process = format!(
        "(call $send (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const {})
          (i32.const 4) (i32.const 0) (i32.const 4) (i32.const 0) (i32.const 8192))
        {FAIL_IF_FAILED}",
        url.len()
    );
    let asking = Asking { imports: &[SEND], data: &data, process: &process, ..Asking::default() };
    let stage = format!(
        "grant = {{ http = [{{ host = \"{address}\", private = true }}] }}\n\
         [stage.limits]\nhost_time = \"60 s\""
    );
    let place = Place::new(&asking, 1, &stage, "");
    let text = std::fs::read_to_string(place.pipeline()).expect("a file");
    let timing = format!("[timing]\ndrain = \"{} s\"\n", DRAIN.as_secs());
    std::fs::write(place.pipeline(), text.replacen("[timing]\n", &timing, 1)).expect("written");
    let log = place.folder.path().join("run.log");
    let to = std::fs::File::create(&log).expect("a log");
    let run = shardmill(&["run", &place.pipeline()]).stdout(Stdio::null()).stderr(to).spawn();
    let mut run = Process(run.expect("the binary starts"));
    server.set_nonblocking(true).expect("set");
    let mut asked = None;
    wait_for("the request", || {
        asked = server.accept().ok();
        asked.is_some()
    });
    let begun = Instant::now();
    run.ask_to_end();
    let status = run.wait();
    let took = begun.elapsed();
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(took < DRAIN + END, "the run ended after {took:?}: {log}");
    assert!(status.code().is_some_and(|code| code != 101), "{status}: {log}");
    assert!(!log.contains("panicked") && !log.contains("shutdown"), "{log}");
    assert_eq!(place.dead_letters(), Vec::<String>::new(), "{log}");
}
