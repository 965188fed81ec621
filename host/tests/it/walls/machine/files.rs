//! State, locks, exports and compiled code belong to this user alone.

use std::fs;
use std::os::unix::fs::{chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{COMPILED_DIR, chmod, is_root, mode, said, tree};
use crate::support::pipeline::PipelineToml;
use crate::support::{output, plugin, run, shardmill};

/// Name of the pipelines.
const NAME: &str = "alone";
/// Another user.
const STRANGER: u32 = 65_534;

/// Writes a pipeline of a few rows in a folder, one of which becomes a dead letter.
fn pipeline(folder: &Path) -> String {
    let rows = folder.join("rows.ndjson");
    fs::write(&rows, "{\"id\":1}\nnot JSON\n{\"id\":2}\n").expect("written");
    PipelineToml::new(folder, NAME)
        .file(&rows, "")
        .stage(
            "first",
            "hostile",
            "config = { trap_on = \"not JSON\" }\nroutes = { out = [\"nowhere\"] }",
        )
        .sink("nowhere", "type = \"discard\"")
        .write()
}

/// Runs a command with its compiled plugins in the state.
fn in_state(arguments: &[&str]) -> Output {
    output(shardmill(arguments).env_remove(COMPILED_DIR).env_remove("XDG_CACHE_HOME"))
}

#[test]
fn wall_14_state_is_made_for_its_owner_alone_and_tightened_where_it_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = pipeline(folder.path());
    said(&in_state(&["run", &pipeline]), true);
    let state = folder.path().join("state");
    let is_tight = || {
        for path in tree(&state) {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode(&path), expected, "{}", path.display());
        }
    };
    is_tight();
    // File modes as earlier versions set them.
    let (own, database) = (state.join(NAME), state.join(NAME).join("state.db"));
    chmod(&own, 0o755);
    chmod(&database, 0o644);
    let printed = said(&in_state(&["run", &pipeline]), true);
    for path in [&own, &database] {
        let named = format!("{} was open to other users", path.display());
        assert_eq!(printed.matches(&named).count(), 1, "{printed}");
    }
    is_tight();
    let printed = said(&in_state(&["run", &pipeline]), true);
    assert!(!printed.contains("open to other users"), "{printed}");
}

/// Asserts that every command refuses the state of a pipeline, with the error `way`.
fn refused_by_all(pipeline: &str, way: &str) {
    let commands: [&[&str]; 6] = [
        &["run", pipeline],
        &["check", "--offline", pipeline],
        &["dlq", "list", "--pipeline", pipeline],
        &["dlq", "redrive", "--all", "--pipeline", pipeline],
        &["plugin", "history", "--pipeline", pipeline],
        &["reload", pipeline],
    ];
    for command in commands {
        let printed = said(&in_state(command), false);
        assert!(printed.contains(way), "{command:?} {way}: {printed}");
        assert!(printed.contains("--trust-state-dir"), "{printed}");
    }
}

#[test]
fn wall_14_state_that_others_can_replace_is_refused_by_every_command() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = folder.path().join("open");
    fs::create_dir(&open).expect("a folder");
    let pipeline = pipeline(&open);
    let all_refuse = |way: &str| refused_by_all(&pipeline, way);
    chmod(&open, 0o777);
    let way = format!("every user may replace what lies in {}", open.display());
    all_refuse(&way);
    assert!(!open.join("state").exists(), "nothing is created");
    // With the sticky bit, other users cannot replace this user's entries.
    chmod(&open, 0o1777);
    said(&in_state(&["run", &pipeline]), true);
    // Existing state is refused as well.
    chmod(&open, 0o777);
    all_refuse(&way);
    said(&in_state(&["run", "--trust-state-dir", &pipeline]), true);
    said(&in_state(&["--trust-state-dir", "dlq", "list", "--pipeline", &pipeline]), true);
    chmod(&open, 0o755);
    said(&in_state(&["run", &pipeline]), true);
    // Only root can give files away. Without root, only the unit tests of the decision cover this.
    if !is_root() {
        return;
    }
    let own = open.join("state").join(NAME);
    for foreign in [&own, &own.join("state.db"), &open] {
        chown(foreign, Some(STRANGER), None).expect("owner changed");
        all_refuse(&format!("{} belongs to user {STRANGER}", foreign.display()));
        said(&in_state(&["run", "--trust-state-dir", &pipeline]), true);
        chown(foreign, Some(0), None).expect("owner restored");
    }
    // A link to a folder of this user, which another user has made and can change.
    let (real, link) = (folder.path().join("real"), open.join("state"));
    fs::rename(&link, &real).expect("moved");
    symlink(&real, &link).expect("a link");
    said(&in_state(&["run", &pipeline]), true);
    lchown(&link, Some(STRANGER), None).expect("owner changed");
    all_refuse(&format!("{} belongs to user {STRANGER}", link.display()));
}

#[test]
fn wall_14_a_folder_that_links_lead_to_is_tightened_or_refused_as_one_without_links() {
    let place = tempfile::tempdir().expect("a folder");
    let folder = place.path().canonicalize().expect("a path");
    let pipeline = pipeline(&folder);
    let (elsewhere, own, hop) =
        (folder.join("elsewhere"), folder.join("state").join(NAME), folder.join("hop"));
    let real = elsewhere.join("deep/real");
    for made in [&folder.join("state"), &real] {
        fs::create_dir_all(made).expect("a folder");
    }
    symlink("elsewhere/deep/real", &hop).expect("a link");
    let targets = [real.clone(), "../elsewhere/deep/real".into(), "../hop".into(), hop.clone()];
    for target in &targets {
        symlink(target, &own).expect("a link");
        chmod(&real, 0o777);
        let named = format!("{} was open to other users", real.display());
        let printed = said(&in_state(&["run", &pipeline]), true);
        assert_eq!(printed.matches(&named).count(), 1, "{}: {printed}", target.display());
        assert_eq!(mode(&real), 0o700, "{}", target.display());
        let printed = said(&in_state(&["run", &pipeline]), true);
        assert!(!printed.contains("open to other users"), "{printed}");
        for above in [&elsewhere, &elsewhere.join("deep")] {
            chmod(above, 0o777);
            let way = format!("every user may replace what lies in {}", above.display());
            let printed = said(&in_state(&["check", "--offline", &pipeline]), false);
            assert!(printed.contains(&way), "{}: {printed}", target.display());
            chmod(above, 0o755);
        }
        fs::remove_file(&own).expect("removed");
    }
    symlink(&hop, &own).expect("a link");
    chmod(&elsewhere, 0o777);
    refused_by_all(
        &pipeline,
        &format!("every user may replace what lies in {}", elsewhere.display()),
    );
    chmod(&elsewhere, 0o1777);
    said(&in_state(&["run", &pipeline]), true);
    for open in [&elsewhere, &real] {
        chmod(open, 0o777);
    }
    said(&in_state(&["run", "--trust-state-dir", &pipeline]), true);
    assert_eq!(mode(&real), 0o777, "the option leaves the mode");
    chmod(&elsewhere, 0o755);
    if is_root() {
        for foreign in [&real, &hop] {
            lchown(foreign, Some(STRANGER), None).expect("owner changed");
            let way = format!("{} belongs to user {STRANGER}", foreign.display());
            refused_by_all(&pipeline, &way);
            lchown(foreign, Some(0), None).expect("owner restored");
        }
    }
    if is_root() {
        // Nothing is created where another user's link leads.
        let away = folder.join("away");
        fs::create_dir(&away).expect("a folder");
        fs::rename(folder.join("state"), folder.join("state.own")).expect("moved");
        let state = folder.join("state");
        symlink(&away, &state).expect("a link");
        lchown(&state, Some(STRANGER), None).expect("owner changed");
        let way = format!("{} belongs to user {STRANGER}", state.display());
        refused_by_all(&pipeline, &way);
        let at = state.display().to_string();
        let printed =
            said(&in_state(&["stream", "serve", "--port", "0", "--state-dir", &at]), false);
        assert!(printed.contains(&way), "{printed}");
        assert_eq!(fs::read_dir(&away).expect("a folder").count(), 0);
        fs::remove_file(&state).expect("removed");
        fs::rename(folder.join("state.own"), &state).expect("moved");
    }
    // A link to a missing folder: no command creates the folder, and all report it.
    fs::remove_file(&hop).expect("removed");
    symlink("nowhere", &hop).expect("a link");
    let missing = folder.join("nowhere");
    let way = format!("{}: it is missing, and a symbolic link leads to it", missing.display());
    for command in [&["run", pipeline.as_str()][..], &["check", "--offline", pipeline.as_str()]] {
        let printed = said(&in_state(command), false);
        assert!(printed.contains(&way), "{command:?}: {printed}");
    }
    assert!(!missing.exists());
}

#[test]
fn wall_14_a_database_that_a_link_leads_to_is_tightened_or_refused() {
    let place = tempfile::tempdir().expect("a folder");
    let folder = place.path().canonicalize().expect("a path");
    let pipeline = pipeline(&folder);
    let (own, elsewhere) = (folder.join("state").join(NAME), folder.join("elsewhere"));
    fs::create_dir_all(&elsewhere).expect("a folder");
    said(&in_state(&["run", &pipeline]), true);
    let (database, moved) = (own.join("state.db"), elsewhere.join("moved.db"));
    fs::rename(&database, &moved).expect("moved");
    symlink("../../elsewhere/moved.db", &database).expect("a link");
    chmod(&moved, 0o644);
    // The modes of files behind a link are tightened as they are without a link.
    chmod(&own, 0o777);
    let printed = said(&in_state(&["run", &pipeline]), true);
    assert!(printed.contains(&format!("{} was open to other users", moved.display())), "{printed}");
    assert_eq!((mode(&moved), mode(&own)), (0o600, 0o700));
    for (open, tight) in [(&elsewhere, 0o755), (&moved, 0o600)] {
        chmod(open, 0o777);
        let way = format!("every user may replace what lies in {}", open.display());
        refused_by_all(&pipeline, &way);
        chmod(open, tight);
    }
    said(&in_state(&["run", &pipeline]), true);
}

#[test]
fn wall_14_a_lock_does_not_follow_a_link() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = pipeline(folder.path());
    let precious = folder.path().join("precious");
    fs::write(&precious, "precious\n").expect("written");
    let state = folder.path().join("state");
    let state_dir = state.display().to_string();
    let serve = ["stream", "serve", "--state-dir", &state_dir];
    for (lock, command) in
        [(state.join(NAME), &["run", pipeline.as_str()][..]), (state.join("stream"), &serve[..])]
    {
        fs::create_dir_all(&lock).expect("a folder");
        let lock = lock.join("lock");
        symlink(&precious, &lock).expect("a link");
        let printed = said(&in_state(command), false);
        assert!(printed.contains("expected a file, found a symbolic link"), "{printed}");
        fs::remove_file(&lock).expect("removed");
        // A hard link is not a symbolic link.
        fs::hard_link(&precious, &lock).expect("linked");
        let printed = said(&in_state(command), false);
        assert!(printed.contains("expected a lock"), "{printed}");
        assert_eq!(fs::read_to_string(&precious).expect("read"), "precious\n");
    }
}

#[test]
fn wall_14_check_refuses_a_lock_that_a_start_refuses() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = pipeline(folder.path());
    let own = folder.path().join("state").join(NAME);
    fs::create_dir_all(&own).expect("a folder");
    let (lock, precious) = (own.join("lock"), folder.path().join("precious"));
    fs::write(&precious, "precious\n").expect("written");
    let is_refused = |expected: &str| {
        for command in ["check", "run"] {
            let printed = said(&in_state(&[command, &pipeline]), false);
            assert!(printed.contains(expected), "{command}: {printed}");
        }
        said(&in_state(&["check", &pipeline, "--offline"]), true);
        fs::remove_file(&lock).expect("removed");
    };
    symlink(&precious, &lock).expect("a link");
    is_refused("expected a file, found a symbolic link");
    fs::hard_link(&precious, &lock).expect("linked");
    is_refused("expected a lock");
    assert!(Command::new("mkfifo").arg(&lock).status().expect("it runs").success());
    is_refused("expected a file, found something else");
    assert_eq!(fs::read_to_string(&precious).expect("read"), "precious\n");
    said(&in_state(&["check", &pipeline]), true);
    assert!(!lock.exists(), "check created the lock");
    said(&in_state(&["run", &pipeline]), true);
    said(&in_state(&["check", &pipeline]), true);
}

#[test]
fn wall_14_exported_dead_letters_are_their_owners_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = pipeline(folder.path());
    said(&run(&["run", &pipeline]), true);
    let (new, old, link) = (
        folder.path().join("new.ndjson"),
        folder.path().join("old.ndjson"),
        folder.path().join("link.ndjson"),
    );
    fs::write(&old, "x".repeat(1 << 20)).expect("written");
    chmod(&old, 0o644);
    symlink(&old, &link).expect("a link");
    let export = |to: &Path| {
        let to = to.display().to_string();
        run(&["dlq", "export", "--pipeline", &pipeline, "--out", &to])
    };
    for path in [&new, &old] {
        said(&export(path), true);
        assert_eq!(mode(path), 0o600, "{}", path.display());
        let text = fs::read_to_string(path).expect("dead letters");
        assert!(text.starts_with('{') && text.lines().count() == 1, "{text}");
    }
    said(&export(Path::new("/dev/null")), true);
    if is_root() {
        lchown(&link, Some(STRANGER), None).expect("owner changed");
        let printed = said(&export(&link), false);
        assert!(printed.contains("symbolic link of user"), "{printed}");
        chown(&old, Some(STRANGER), None).expect("owner changed");
        let printed = said(&export(&old), false);
        assert!(printed.contains("who could read it"), "{printed}");
    }
}

/// Returns the files of compiled plugins in a folder.
fn compiled(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "cwasm")).collect()
}

fn inspect(plugin_name: &str, with: impl Fn(&mut Command)) -> String {
    let file = plugin(plugin_name);
    let mut command = shardmill(&["plugin", "inspect", "--json", &file]);
    with(command.env_remove(COMPILED_DIR).env_remove("XDG_CACHE_HOME"));
    let inspected = output(&mut command);
    said(&inspected, true);
    String::from_utf8_lossy(&inspected.stdout).into_owned()
}

#[test]
fn wall_14_compiled_code_of_one_plugin_does_not_run_as_another() {
    let folder = tempfile::tempdir().expect("a folder");
    for variable in [COMPILED_DIR, "XDG_CACHE_HOME"] {
        let place = folder.path().join(variable);
        let inspect = |name: &str| inspect(name, |command| _ = command.env(variable, &place));
        let cache = match variable {
            COMPILED_DIR => place.clone(),
            _ => place.join("shardmill"),
        };
        let honest = inspect("car-decode");
        assert!(honest.contains("\"car-decode\""), "{honest}");
        let [of_honest] = &compiled(&cache)[..] else { panic!("one file") };
        inspect("stamp");
        let all = compiled(&cache);
        let forged = all.iter().find(|path| *path != of_honest).expect("two files");
        fs::copy(forged, of_honest).expect("copied");
        assert_eq!(inspect("car-decode"), honest, "{variable}");
        // Changed bytes do not run either.
        let mut bytes = fs::read(of_honest).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(of_honest, bytes).expect("changed");
        assert_eq!(inspect("car-decode"), honest, "{variable}");
    }
}

#[test]
fn wall_14_all_commands_share_what_was_compiled() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = pipeline(folder.path());
    let caches = folder.path().join("caches");
    inspect("hostile", |command| _ = command.env("XDG_CACHE_HOME", &caches));
    let cache = caches.join("shardmill");
    let [file] = &compiled(&cache)[..] else { panic!("one file") };
    for path in tree(&cache) {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(&path), expected, "{}", path.display());
    }
    let made = fs::metadata(file).expect("metadata").modified().expect("a time");
    let run = |caches: &Path| {
        let mut command = shardmill(&["run", &pipeline]);
        let ran = output(command.env_remove(COMPILED_DIR).env("XDG_CACHE_HOME", caches));
        said(&ran, true)
    };
    run(&caches);
    assert_eq!(compiled(&cache).len(), 1);
    assert_eq!(fs::metadata(file).expect("metadata").modified().expect("a time"), made);
    let in_state = folder.path().join("state/compiled");
    assert!(!in_state.exists());
    // If that folder cannot be created, it lies in the state; if that fails too, each start compiles.
    let no_folder = folder.path().join("rows.ndjson");
    run(&no_folder);
    assert_eq!(compiled(&in_state).len(), 1);
    fs::remove_dir_all(&in_state).expect("removed");
    fs::write(&in_state, "").expect("written");
    run(&no_folder);
    assert!(in_state.is_file());
}

#[test]
fn wall_14_a_folder_of_compiled_code_that_a_link_leads_to_is_tightened() {
    let folder = tempfile::tempdir().expect("a folder");
    let (caches, real) = (folder.path().join("caches"), folder.path().join("real"));
    for made in [&caches, &real] {
        fs::create_dir(made).expect("a folder");
    }
    chmod(&real, 0o777);
    symlink("../real", caches.join("shardmill")).expect("a link");
    inspect("stamp", |command| _ = command.env("XDG_CACHE_HOME", &caches));
    assert_eq!(mode(&real), 0o700);
    assert_eq!(compiled(&real).len(), 1);
}
