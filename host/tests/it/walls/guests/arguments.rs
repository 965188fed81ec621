//! Arguments of host calls: bounded before they are copied, and never copied while lanes wait.

use std::net::TcpListener;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use shardmill_config::{Located, LookupCacheLimits, LookupConfig, LookupSource};
use shardmill_plugin::capability::lookup::Lookup;
use tokio::runtime::Handle;

use super::asking::{Asking, FAIL_IF_FAILED, GET, Place, SEND};

/// A lookup that returns each key's length.
const TABLE: &str = "[[lookup]]\nname = \"t\"\nurl = \"sqlite:table.db\"\n\
    query = \"SELECT value, length(value) AS n FROM json_each(?1)\"\n[lookup.cache]\nttl = \"0 s\"";

/// Returns a call with this number of keys of this length, all of which overlap in memory.
fn overlapping(keys: usize, bytes: usize) -> String {
    format!(
        "(local.set $i (call $room (i32.const 0) (i32.const 0) (i32.const 4) (i32.const {words_bytes})))
        (loop $fill
          (i32.store (i32.add (local.get $i) (i32.mul (local.get $index) (i32.const 8)))
            (i32.and (local.get $index) (i32.const 32767)))
          (i32.store offset=4 (i32.add (local.get $i) (i32.mul (local.get $index) (i32.const 8)))
            (i32.const {bytes}))
          (local.set $index (i32.add (local.get $index) (i32.const 1)))
          (br_if $fill (i32.lt_u (local.get $index) (i32.const {keys}))))
        (local.set $index (i32.const 0))
        (call $get (i32.const 1024) (i32.const 1) (i32.const 32768) (i32.const 65536)
          (local.get $i) (i32.const {words}) (i32.const 8192))
        {FAIL_IF_FAILED}",
        words = 2 * keys,
        words_bytes = 8 * keys,
    )
}

/// A key may have up to 8 KiB, and all keys of a call 8 MiB together, even if overlapping keys take little of the
/// plugin's memory.
#[test]
fn wall_06_a_lookup_of_overlapping_keys_is_bounded_before_it_is_copied() {
    let within = "memory = \"16 MiB\"\nbatch_time = \"20 s\"\nrecord_time = \"10 s\"";
    let stage = format!("grant = {{ lookup = [\"t\"] }}\n[stage.limits]\n{within}");
    for (keys, bytes, reason) in [
        (100_000, 8_192, Some("the keys of a call have more than 8388608 bytes together")),
        (1, 8_193, Some("key 0 has 8193 bytes, over the limit of 8192")),
        (100_001, 1, Some("a call asked for 100001 keys, over the limit of 100000")),
        (100_000, 80, None),
    ] {
        let process = overlapping(keys, bytes);
        let asking = Asking { imports: &[GET], data: b"t", process: &process, ..Asking::default() };
        let place = Place::new(&asking, 1, &stage, TABLE);
        rusqlite::Connection::open(place.folder.path().join("table.db"))
            .and_then(|table| table.execute_batch("CREATE TABLE t (id)"))
            .expect("a file");
        let ran = place.run();
        assert_eq!(ran.code, Some(0), "{}", ran.log);
        let dead_letters = place.dead_letters();
        match reason {
            Some(reason) => {
                assert!(
                    dead_letters.len() == 1 && dead_letters[0].contains(reason),
                    "{dead_letters:?}"
                );
            }
            None => assert_eq!(dead_letters, Vec::<String>::new(), "{keys} keys of {bytes} bytes"),
        }
        ran.assert_memory(&format!("{keys} keys of {bytes} bytes"));
        assert!(ran.took < Duration::from_secs(60), "{keys} of {bytes}: {:?}", ran.took);
    }
}

/// A request is refused by its lengths alone: the host neither copies it nor connects.
#[test]
fn wall_06_a_request_that_is_too_large_is_refused_before_it_is_copied() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    server.set_nonblocking(true).expect("set");
    let address = server.local_addr().expect("an address");
    let url = format!("http://{address}/");
    let data = [b"GET", url.as_bytes()].concat();
    let request = |url_length: usize, headers: usize, header_length: usize| {
        // Each header is four words: address and length of its name and of its value. All headers share the same
        // ones.
        format!(
            "(local.set $i (call $room (i32.const 0) (i32.const 0) (i32.const 4) (i32.const {})))
            (loop $fill
              (i32.store (i32.add (local.get $i) (i32.mul (local.get $index) (i32.const 16)))
                (i32.const 1024))
              (i32.store offset=4 (i32.add (local.get $i) (i32.mul (local.get $index) (i32.const 16)))
                (i32.const 3))
              (i32.store offset=8 (i32.add (local.get $i) (i32.mul (local.get $index) (i32.const 16)))
                (i32.const 32768))
              (i32.store offset=12 (i32.add (local.get $i) (i32.mul (local.get $index) (i32.const 16)))
                (i32.const {header_length}))
              (local.set $index (i32.add (local.get $index) (i32.const 1)))
              (br_if $fill (i32.lt_u (local.get $index) (i32.const {headers}))))
            (local.set $index (i32.const 0))
            (call $send (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const {url_length})
              (local.get $i) (i32.const {headers}) (i32.const 0) (i32.const 0) (i32.const 8192))
            {FAIL_IF_FAILED}",
            headers * 16,
        )
    };
    let stage = format!(
        "grant = {{ http = [{{ host = \"{address}\", private = true }}] }}\n\
         [stage.limits]\nmemory = \"16 MiB\"\nbatch_time = \"20 s\"\nrecord_time = \"10 s\""
    );
    for (process, reason) in [
        (request(url.len(), 500_000, 1), "the request has more than 100 headers"),
        (request(url.len(), 100, 1_000), "the request has more than 65536 bytes of headers"),
        (request(60_000, 1, 1), "the URL has more than 16384 bytes"),
    ] {
        let asking =
            Asking { imports: &[SEND], data: &data, process: &process, ..Asking::default() };
        let place = Place::new(&asking, 1, &stage, "");
        let ran = place.run();
        assert_eq!(ran.code, Some(0), "{}", ran.log);
        let dead_letters = place.dead_letters();
        assert!(
            dead_letters.len() == 1 && dead_letters[0].contains(reason),
            "{reason}: {dead_letters:?}"
        );
        ran.assert_memory(reason);
        let connected = server.accept().expect_err("nobody connects");
        assert_eq!(connected.kind(), std::io::ErrorKind::WouldBlock, "{reason}");
    }
}

/// The query runs on a connection that no other lane waits for.
#[tokio::test(flavor = "multi_thread")]
async fn wall_06_a_slow_query_on_sqlite_stops_no_other_lane() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("table.db");
    rusqlite::Connection::open(&path)
        .and_then(|table| table.execute_batch("CREATE TABLE t (id)"))
        .expect("a file");
    // For one of the keys, the query counts to a billion.
    let query = "SELECT value, (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n \
        WHERE i < CASE value WHEN 'slow' THEN 1000000000 ELSE 1 END) SELECT max(i) FROM n) AS m \
        FROM json_each(?1)";
    let config = LookupConfig {
        name: Located { value: "t".into(), span: 0..0 },
        source: LookupSource::Sqlite(path),
        query: Located { value: query.into(), span: 0..0 },
        timeout: Duration::from_secs(60),
        cache: LookupCacheLimits::default(),
        span: 0..0,
    };
    let lookup = Arc::new(Lookup::new(&config, Handle::current()).expect("a lookup"));
    let (begins, begun) = mpsc::channel();
    let slow = std::thread::spawn({
        let lookup = lookup.clone();
        move || {
            begins.send(()).expect("a test");
            lookup.get(&["slow"], Instant::now() + Duration::from_secs(5)).expect_err("too slow")
        }
    });
    let quick = std::thread::spawn(move || {
        begun.recv().expect("the slow one");
        for key in 0..20 {
            let rows = lookup.get(&[&format!("{key}")], Instant::now() + Duration::from_secs(60));
            assert_eq!(rows.expect("rows"), [Some("{\"m\":1}".into())]);
        }
    });
    quick.join().expect("no panic");
    assert!(!slow.is_finished(), "the others waited for the slow query");
    let error = slow.join().expect("no panic");
    assert!(error.retryable && error.message.contains("took too long"), "{error}");
}
