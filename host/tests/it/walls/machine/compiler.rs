//! The process that compiles ends with the process that started it, and has limits of its own.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{COMPILED_DIR, said};
use crate::hostile::binary::heavy;
use crate::support::{Process, output, run, shardmill, wait_for};

/// Time limit for the end of a process after a signal: many times what the kernel takes, and much less than the
/// compilation takes.
const END_MAX: Duration = Duration::from_secs(10);

/// Returns the id of the compiler process that a process has started.
fn compiler_of(parent: u32) -> Option<u32> {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.into_iter().find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let found = after_name.split_whitespace().nth(1).and_then(|it| it.parse().ok());
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        found == Some(parent) && command.contains("compile-component")
    })
}

/// Whether a process runs. A zombie, which nobody in this container may wait for, does not count.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim().chars().next());
    state.is_some_and(|state| !"ZX".contains(state))
}

#[test]
fn wall_13_the_compiler_ends_with_its_parent_and_has_limits() {
    let heavy = heavy();
    let file = heavy.path().display().to_string();
    let mut command = shardmill(&["plugin", "inspect", &file]);
    command.env_remove(COMPILED_DIR).env_remove("XDG_CACHE_HOME");
    let parent = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut parent = Process(parent.expect("the binary starts"));
    let mut found = None;
    wait_for("the compiler", || {
        found = compiler_of(parent.0.id());
        found.is_some()
    });
    let compiler = found.expect("found");
    let about =
        |file: &str| fs::read_to_string(format!("/proc/{compiler}/{file}")).expect("it runs");
    // The compiler sets its limits after it has started.
    wait_for("its limits", || {
        about("limits")
            .lines()
            .any(|line| line.starts_with("Max cpu time") && !line.contains("unlimited"))
    });
    assert!(about("status").contains("NoNewPrivs:\t1"), "{}", about("status"));
    let no_files = |line: &str| line.starts_with("Max file size") && line.contains(" 0 ");
    assert!(about("limits").lines().any(no_files), "{}", about("limits"));
    parent.0.kill().expect("killed");
    parent.wait();
    let killed = Instant::now();
    while runs(compiler) {
        assert!(killed.elapsed() < END_MAX, "the compiler outlives its parent");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn wall_13_a_compiler_whose_parent_is_gone_does_not_begin() {
    let limits = ["--memory-bytes", "1000000000", "--cpu-seconds", "10", "--parent", "1"];
    let printed = said(&run(&[&["compile-component"][..], &limits].concat()), false);
    assert!(printed.contains("expected parent process 1, found"), "{printed}");
}

#[test]
fn wall_13_cpu_time_over_its_limit_ends_the_compiler() {
    let heavy = heavy();
    let own = std::process::id().to_string();
    let limits = ["--memory-bytes", "4000000000", "--cpu-seconds", "1", "--parent", &own];
    let mut command = shardmill(&[&["compile-component"][..], &limits].concat());
    let ended = output(command.stdin(fs::File::open(heavy.path()).expect("a file")));
    assert_eq!(ended.status.signal(), Some(libc::SIGXCPU), "{:?}", ended.status);
}
