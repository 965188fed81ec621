//! The stdout sink through the contract of all sinks, printing into memory.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{
    Batch, Entry, Position, PositionRange, Record, Row, SequenceNumber, ShardKey, StreamIdentity,
};
use shardmill_core::sink::{Commit, Refusal, RefusalLog, Sink, SinkError};
use shardmill_sink_stdout::StdoutSink;

fn shard() -> ShardKey {
    let stream = StreamIdentity { name: "test".into(), arn: "arn".into(), created_ms: 0 };
    ShardKey {
        pipeline: "cars".into(),
        stream: Arc::new(stream),
        shard: "shardId-000000000003".into(),
    }
}

fn commit(payloads: &[&'static str]) -> Commit {
    let position = |index: usize| Position {
        sequence: SequenceNumber::parse(&(index + 1).to_string()).expect("digits"),
        sub_sequence: 0,
    };
    let range = PositionRange { from_exclusive: None, to_inclusive: position(payloads.len() - 1) };
    let records = payloads.iter().enumerate().map(|(index, payload)| Record {
        position: position(index),
        partition_key: "partitionKey-7".into(),
        payload: (*payload).into(),
        arrived_ms: 0,
    });
    let batch = Arc::new(Batch {
        shard: shard(),
        records: records.collect(),
        range: range.clone(),
        entry: Entry::Source,
    });
    let rows = payloads.iter().zip(0..).map(|(payload, record)| Row {
        batch: Arc::clone(&batch),
        record,
        ordinal: 0,
        route: "cars".into(),
        key: "partitionKey-7".into(),
        payload: (*payload).into(),
    });
    Commit { range, rows: Arc::new(rows.collect()), encoded: None, revision: "generation-1".into() }
}

#[derive(Default)]
struct Refusals(Mutex<Vec<String>>);

#[async_trait]
impl RefusalLog for Refusals {
    async fn record(&self, _commit: &Commit, refusals: &[Refusal]) -> Result<(), SinkError> {
        let reasons = refusals.iter().map(|refusal| refusal.reason.clone());
        self.0.lock().expect("a lock").extend(reasons);
        Ok(())
    }
}

/// Returns what a sink with this template prints of the payloads, and the reasons of the refused ones.
async fn printed(template: Option<&str>, payloads: &[&'static str]) -> (String, Vec<String>) {
    let output = Arc::new(Mutex::new(Vec::new()));
    let sink = StdoutSink::to("lines".into(), template, output.clone()).expect("a template");
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    assert!(!owner.keeps_position && owner.position.is_none());
    let refusals = Refusals::default();
    let done = owner.writer.commit(&commit(payloads), &refusals).await.expect("printed");
    let text = String::from_utf8(output.lock().expect("a lock").clone()).expect("UTF-8");
    let reasons = refusals.0.into_inner().expect("a lock");
    assert_eq!(done.rows_written as usize + reasons.len(), payloads.len());
    assert_eq!(done.bytes_written as usize, text.len());
    (text, reasons)
}

#[tokio::test]
async fn the_line_of_the_article() {
    let template = Some("getRecords [{shard}]: {make} [# {id}]");
    let (text, reasons) = printed(template, &[r#"{"id":7,"make":"Honda"}"#]).await;
    assert_eq!(text, "getRecords [shardId-000000000003]: Honda [# 7]\n");
    assert!(reasons.is_empty());
}

#[tokio::test]
async fn paths_places_and_braces() {
    let template = Some("{{{key}}} {route} {sequence} {a.b} {.key} {list.1} {none}");
    let payload =
        r#"{"a":{"b":12345678901234567890.10},"key":"k\n\u001b[1m","list":[1,true],"none":null}"#;
    let (text, _) = printed(template, &[payload]).await;
    let expected = "{partitionKey-7} cars 1 12345678901234567890.10 k\\n\\u{1b}[1m true null\n";
    assert_eq!(text, expected);
}

#[tokio::test]
async fn without_a_template_a_payload_is_a_line() {
    let (text, reasons) = printed(None, &["plain", "{\n\"a\":1}", "a\nb"]).await;
    assert_eq!(text, "plain\n{\"a\":1}\n");
    assert_eq!(reasons.len(), 1);
}

#[tokio::test]
async fn rows_that_the_template_does_not_fit_are_refused_alone() {
    let payloads = [r#"{"id":1}"#, "no json", r#"{"it":2}"#, r#"{"id":3}"#];
    let (text, reasons) = printed(Some("# {id}"), &payloads).await;
    assert_eq!(text, "# 1\n# 3\n");
    assert!(
        reasons[0].contains("not valid JSON") && reasons[1].contains("no field id"),
        "{reasons:?}"
    );
}

/// If the last field of a row is missing, nothing of the row is written, however large the fields before it are.
#[tokio::test]
async fn nothing_is_written_of_a_row_that_lacks_a_field() {
    let payload: &'static str = format!(r#"{{"a":"{}"}}"#, "x".repeat(200_000)).leak();
    let template = format!("{}{{b}}", "{a}".repeat(10));
    let (text, reasons) = printed(Some(&template), &[payload, r#"{"a":1,"b":2}"#]).await;
    assert_eq!(text, format!("{}2\n", "1".repeat(10)));
    assert_eq!(reasons, ["payload has no field b"]);
}

/// A line that is longer than the pieces it is written in stays whole while others write.
#[tokio::test]
async fn lines_of_two_writers_are_not_mixed() {
    let output = Arc::new(Mutex::new(Vec::new()));
    let template = "{a}".repeat(10);
    let sink = StdoutSink::to("lines".into(), Some(&template), output.clone()).expect("a template");
    let print = async |c: &str| {
        let payload: &'static str = format!(r#"{{"a":"{}"}}"#, c.repeat(50_000)).leak();
        let mut owner = sink.acquire(&shard()).await.expect("acquired");
        owner.writer.commit(&commit(&[payload; 5]), &Refusals::default()).await.expect("printed");
    };
    tokio::join!(print("x"), print("y"));
    let text = String::from_utf8(output.lock().expect("a lock").clone()).expect("UTF-8");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 10);
    for line in lines {
        assert_eq!(line, line[..1].repeat(500_000));
    }
}

#[tokio::test]
async fn formats_are_checked_against_the_template() {
    let bound = |format: &str| {
        [BoundRoute { name: "cars".into(), format: format.into(), columns: Vec::new() }]
    };
    let sink = |template| StdoutSink::new("lines".into(), template).expect("a template");
    sink(None).prepare(&bound("text/plain")).await.expect("lines");
    sink(Some("{shard}")).prepare(&bound("text/plain")).await.expect("lines");
    for (template, format) in [(None, "application/x-bincode"), (Some("{id}"), "text/plain")] {
        let error = sink(template).prepare(&bound(format)).await.expect_err("refused");
        let text = error.to_string();
        assert!(text.contains(format) && text.contains("application/json"), "{text}");
    }
}

#[test]
fn a_malformed_template_names_its_place() {
    let output = Arc::new(Mutex::new(Vec::new()));
    let error = StdoutSink::to("lines".into(), Some("a {make"), output).err().expect("refused");
    assert_eq!(
        error.to_string(),
        "a { without its } (write {{ for a brace) at character 3 of template \"a {make\""
    );
}

struct Closed;

impl Write for Closed {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_broken_pipe_is_the_sinks_failure() {
    let sink = StdoutSink::to("lines".into(), None, Arc::new(Mutex::new(Closed))).expect("a sink");
    let mut owner = sink.acquire(&shard()).await.expect("acquired");
    let error = owner.writer.commit(&commit(&["a"]), &Refusals::default()).await;
    let text = error.expect_err("broken").to_string();
    assert!(text.contains("sink lines") && text.contains("broken pipe"), "{text}");
}
