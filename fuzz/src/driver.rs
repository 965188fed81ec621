//! Runs the targets on a stable compiler: their corpora, then inputs by a seed, all targets side by side.
//!
//! This driver does not measure coverage. Instead, each target makes inputs that are mostly valid; the driver
//! mutates these and the corpus. One seed makes the same inputs each time, as many as the time allows.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::TARGETS;
use shardmill_core::fuzzing::FuzzTarget;

/// Variable with the time that each target runs, in seconds.
const SECONDS: &str = "SHARDMILL_FUZZ_SECONDS";
/// Variable with the seed of the inputs.
const SEED: &str = "SHARDMILL_FUZZ_SEED";
/// Variable with the name of the only target to run.
const ONLY: &str = "SHARDMILL_FUZZ_TARGET";
/// Longest input that is made by a seed. People can read small inputs.
const INPUT_BYTES_MAX: usize = 4 << 10;
/// Longest time for one input; a longer run is a finding. Large enough for a busy machine.
const RUN_MAX: Duration = Duration::from_secs(20);

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Reads the committed inputs of a target, sorted by name.
fn corpus(target: &FuzzTarget) -> Vec<(String, Vec<u8>)> {
    let folder = folder("corpus").join(target.name);
    let files = fs::read_dir(&folder).expect("a corpus");
    let mut inputs: Vec<(String, Vec<u8>)> = files
        .map(|file| {
            let path = file.expect("an entry").path();
            (path.display().to_string(), fs::read(&path).expect("an input"))
        })
        .collect();
    inputs.sort();
    inputs
}

fn number(variable: &str, default: u64) -> u64 {
    let set = std::env::var(variable).ok();
    set.map_or(default, |text| text.parse().expect(variable))
}

/// Runs an input. A finding is stored in `fuzz/findings`, and the error names the file.
fn run(target: &FuzzTarget, input: &[u8], from: &str) -> Result<(), String> {
    let begun = Instant::now();
    let ended = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let slow = begun.elapsed() > RUN_MAX;
    if ended.is_ok() && !slow {
        return Ok(());
    }
    let findings = folder("findings");
    let path = findings.join(format!("{}-{:08x}", target.name, crc32fast::hash(input)));
    let kept = fs::create_dir_all(&findings).and_then(|()| fs::write(&path, input));
    let what = if slow { "took too long for" } else { "broke its promise for" };
    let mut finding =
        format!("{} {what} {from}: {:?}", target.name, input.escape_ascii().to_string());
    let _infallible = match kept {
        Ok(()) => write!(finding, "; kept as {}", path.display()),
        Err(error) => write!(finding, "; not kept: {error}"),
    };
    Err(finding)
}

/// Runs inputs of a seed for some time, and returns their number.
fn run_seeded(target: &FuzzTarget, seed: u64, time: Duration) -> Result<u64, String> {
    let corpus = corpus(target);
    let mut random = Rng::with_seed(seed);
    let (begun, mut executions) = (Instant::now(), 0);
    while begun.elapsed() < time {
        let mut input = match random.choice(&corpus) {
            Some((_, input)) if random.bool() => input.clone(),
            _ => (target.grow)(&mut random),
        };
        for _ in 0..*random.choice(&[0, 1, 1, 2, 3, 8]).expect("one") {
            mutate(&mut input, target, &corpus, &mut random);
        }
        input.truncate(INPUT_BYTES_MAX);
        run(target, &input, &format!("seed {seed}, input {executions}"))?;
        executions += 1;
    }
    Ok(executions)
}

/// Changes an input in one of the ways that fuzzers know.
fn mutate(
    input: &mut Vec<u8>,
    target: &FuzzTarget,
    corpus: &[(String, Vec<u8>)],
    random: &mut Rng,
) {
    let start = random.usize(..=input.len());
    let end = random.usize(start..=input.len().min(start + 32));
    match random.u8(..8) {
        0 => {
            if let Some(byte) = input.get_mut(start) {
                *byte ^= 1 << random.u8(..8);
            }
        }
        1 => {
            if let Some(byte) = input.get_mut(start) {
                *byte = *random.choice(&[0, 1, 0x7f, 0x80, 0xff, b'0', b'"', b'\\']).expect("one");
            }
        }
        2 => drop(input.drain(start..end)),
        3 => {
            let again = input[start..end].to_vec();
            input.splice(start..start, again);
        }
        4 => {
            let some: Vec<u8> = (0..random.usize(1..8)).map(|_| random.u8(..)).collect();
            input.splice(start..start, some);
        }
        5 => {
            if let Some((_, other)) = random.choice(corpus) {
                let from = random.usize(..=other.len());
                let to = random.usize(from..=other.len().min(from + 32));
                input.splice(start..end, other[from..to].iter().copied());
            }
        }
        _ => {
            if let Some(word) = random.choice(target.words) {
                let until = if random.bool() { start } else { end };
                input.splice(start..until, word.bytes());
            }
        }
    }
}

/// Prints a line although the test passes: libtest captures `eprintln!` only.
fn say(line: &str) {
    let _closed = writeln!(std::io::stderr(), "{line}");
}

fn chosen() -> Vec<&'static FuzzTarget> {
    let only = std::env::var(ONLY).ok();
    let is_chosen = |target: &&FuzzTarget| only.as_deref().is_none_or(|only| only == target.name);
    let chosen: Vec<&FuzzTarget> = TARGETS.iter().filter(is_chosen).collect();
    assert!(!chosen.is_empty(), "{ONLY}: unknown target {only:?}");
    chosen
}

#[test]
fn wall_20_committed_inputs_hold() {
    for target in chosen() {
        let inputs = corpus(target);
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        for (name, input) in inputs {
            run(target, &input, &name).unwrap_or_else(|finding| panic!("{finding}"));
        }
    }
}

#[test]
fn wall_20_inputs_of_a_seed_hold() {
    let (seed, time) = (number(SEED, 1), Duration::from_secs(number(SECONDS, 1)));
    let outcomes: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = chosen()
            .into_iter()
            .map(|target| (target, scope.spawn(move || run_seeded(target, seed, time))))
            .collect();
        running.into_iter().map(|(target, thread)| (target, thread.join())).collect()
    });
    let mut findings = Vec::new();
    for (target, outcome) in outcomes {
        match outcome.unwrap_or_else(|_| Err(format!("the driver of {} panicked", target.name))) {
            Ok(executions) => say(&format!(
                "fuzz {}: {executions} executions in {} s, seed {seed}, no finding",
                target.name,
                time.as_secs()
            )),
            Err(finding) => findings.push(finding),
        }
    }
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

#[test]
fn one_seed_makes_one_input() {
    for target in &TARGETS {
        let input = |seed| {
            let (mut random, corpus) = (Rng::with_seed(seed), corpus(target));
            let mut input = (target.grow)(&mut random);
            mutate(&mut input, target, &corpus, &mut random);
            input
        };
        assert_eq!(input(7), input(7), "{}", target.name);
    }
}
