//! Trials of candidates repeat nothing that others would notice.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::asking::{Asking, FAIL_IF_FAILED, SEND};
use crate::support::run;
use crate::support::world::{Pipeline, World};

/// Starts a server that answers every request; returns its address and the counter of requests.
fn counting() -> (String, Arc<AtomicUsize>) {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = server.local_addr().expect("an address").to_string();
    let requests = Arc::<AtomicUsize>::default();
    let count = requests.clone();
    std::thread::spawn(move || {
        for mut stream in server.incoming().flatten() {
            // Each request arrives as one small packet.
            if stream.read(&mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {
                count.fetch_add(1, Ordering::SeqCst);
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                let _ = stream.write_all(answer);
            }
        }
    });
    (address, requests)
}

/// Without protection, the trial would repeat the requests of the running version and send those of the candidate.
#[test]
fn wall_06_a_trial_sends_no_request_of_either_version_again() {
    let (address, requests) = counting();
    let url = format!("http://{address}/");
    let data = [b"GET", url.as_bytes()].concat();
    let process = format!(
        "(call $send (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const {})
          (i32.const 4) (i32.const 0) (i32.const 4) (i32.const 0) (i32.const 8192))
        {FAIL_IF_FAILED}",
        url.len()
    );
    let plain = Asking { route: "all", format: "application/json", ..Asking::default() };
    let asking = Asking { imports: &[SEND], data: &data, process: &process, ..plain };
    let (incumbent, plain) =
        (asking.build(), Asking { imports: &[], process: "", ..asking }.build());
    let world = World::new(1);
    world.put(0..10, 3);
    let pipeline = Pipeline {
        stage: Some(format!(
            "plugin = \"{}\"\ngrant = {{ http = [{{ host = \"{address}\", private = true }}] }}",
            incumbent.path().display()
        )),
        ..Pipeline::default()
    };
    let started = world.start(&pipeline);
    world.wait_rows(10);
    let sent = || requests.load(Ordering::SeqCst);
    let before = sent();
    assert!(before > 0);
    let again = Asking { name: "again", ..asking }.build();
    let file = world.folder.path().join("pipeline.toml").display().to_string();
    for (candidate, who) in [(&plain, "the incumbent imports http"), (&again, "it imports http")] {
        let candidate = candidate.path().display().to_string();
        let tried = run(&["plugin", "swap", "route", &candidate, "--dry-run", "--pipeline", &file]);
        let both = [&tried.stdout[..], &tried.stderr].concat();
        let said = String::from_utf8_lossy(&both).into_owned();
        assert!(tried.status.success(), "{said}");
        assert!(said.contains(who), "{said}");
        assert_eq!(sent(), before, "{said}");
    }
    assert_eq!(started.terminate(), Some(0));
}
