//! `shardmill completions SHELL`: the script is valid in the shell and contains every command.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{output, run, run_ok, shardmill};

/// The shells, each with the command that checks a script without running it; `{}` is the script's path.
const SHELLS: [(&str, &[&str]); 5] = [
    ("bash", &["bash", "-n", "{}"]),
    ("elvish", &["elvish", "-compileonly", "{}"]),
    ("fish", &["fish", "--no-execute", "{}"]),
    (
        "powershell",
        &[
            "pwsh",
            "-NoProfile",
            "-Command",
            "[ScriptBlock]::Create((Get-Content -Raw '{}')) > $null",
        ],
    ),
    ("zsh", &["zsh", "-n", "{}"]),
];

/// Returns the names of a command's subcommands, as its help lists them.
fn subcommands(of: &[&str]) -> Vec<String> {
    let help = run_ok(&[of, &["--help"]].concat());
    let Some((_, list)) = help.split_once("Commands:\n") else { return Vec::new() };
    // Wrapped descriptions are indented further than the names.
    let names = list.lines().take_while(|line| !line.is_empty()).filter_map(|line| {
        let line = line.strip_prefix("  ")?;
        (!line.starts_with(' ')).then(|| line.split(' ').next().unwrap_or_default().to_owned())
    });
    names.filter(|name| name != "help").collect()
}

/// Whether a text contains a word (or option) that is not part of a longer name.
fn has_word(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.split(|c| !is_part(c)).any(|found| found.trim_start_matches('-') == word)
}

/// Returns the long options of a command, as its help lists them.
fn long_options(of: &[&str]) -> Vec<String> {
    let help = run_ok(&[of, &["--help"]].concat());
    let options = help.lines().filter_map(|line| line.trim_start().split("--").nth(1));
    let is_end = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    let names = options.filter_map(|rest| rest.split(is_end).next());
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Returns the shells that the binary lists as possible values.
fn known_shells() -> Vec<String> {
    let refused = run(&["completions", "ksh"]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("'ksh'"), "{said}");
    let (_, values) = said.split_once("[possible values: ").expect("the possible values");
    let (values, _) = values.split_once(']').expect("their end");
    values.split(", ").map(str::to_owned).collect()
}

#[test]
fn each_shell_has_a_script_with_every_command() {
    assert_eq!(known_shells(), SHELLS.map(|(shell, _)| shell), "each known shell is in SHELLS");
    let folder = tempfile::tempdir().expect("a folder");
    let commands = subcommands(&[]);
    assert!(commands.len() > 10 && commands.contains(&"completions".to_owned()), "{commands:?}");
    assert!(!commands.contains(&"compile-component".to_owned()), "an internal command is listed");
    let mut words = commands.clone();
    for command in &commands {
        words.extend(subcommands(&[command]));
    }
    assert!(words.contains(&"redrive".to_owned()) && words.len() > 25, "{words:?}");
    words.extend(long_options(&["run"]));
    assert!(words.contains(&"until-caught-up".to_owned()), "{words:?}");
    let (mut validated, mut left_out) = (Vec::new(), Vec::new());
    for (shell, validate) in SHELLS {
        let script = run_ok(&["completions", shell]);
        assert!(script.lines().count() > 100, "{shell}: {} lines", script.lines().count());
        let missing: Vec<_> = words.iter().filter(|word| !has_word(&script, word)).collect();
        assert!(missing.is_empty(), "{shell}: {missing:?} are missing");
        let path = folder.path().join(shell);
        std::fs::write(&path, &script).expect("written");
        match is_taken(validate, &path) {
            true => validated.push(shell),
            false => left_out.push(shell),
        }
    }
    // Bash is installed on every machine that runs these tests. The other shells are checked where they are
    // installed.
    assert!(validated.contains(&"bash"), "{validated:?}");
    println!("scripts that their shell took: {validated:?}; not installed: {left_out:?}");
}

/// Whether the shell is installed. If it is, it must accept the script.
fn is_taken(validate: &[&str], script: &Path) -> bool {
    let [shell, arguments @ ..] = validate else { panic!("a command") };
    if Command::new(shell).arg("--version").stdin(Stdio::null()).output().is_err() {
        return false;
    }
    let arguments = arguments.iter().map(|one| one.replace("{}", &script.display().to_string()));
    let done = output(Command::new(shell).args(arguments).stdin(Stdio::null()));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.is_empty(), "{shell}: {said}");
    true
}

/// Bash accepts the script, and offers the commands that begin with the typed letters.
#[test]
fn bash_completes_a_command() {
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("script");
    std::fs::write(&script, run_ok(&["completions", "bash"])).expect("written");
    for (typed, place, expected) in [
        ("shardmill rep", 1, "replay"),
        ("shardmill dlq red", 2, "redrive"),
        ("shardmill run --until-c", 2, "--until-caught-up"),
        ("shardmill completions ela", 2, ""),
        ("shardmill completions elv", 2, "elvish"),
    ] {
        let complete = format!(
            "source '{}'; COMP_WORDS=({typed}); COMP_CWORD={place}; \
             _shardmill shardmill \"${{COMP_WORDS[{place}]}}\" \"${{COMP_WORDS[{place}-1]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            script.display()
        );
        let done =
            output(Command::new("bash").args(["--norc", "-c", &complete]).stdin(Stdio::null()));
        let said = String::from_utf8_lossy(&done.stdout);
        assert_eq!(said.trim(), expected, "{typed}: {}", String::from_utf8_lossy(&done.stderr));
    }
}

/// A reader that closes the pipe early is not an error: the command prints no message and does not panic.
#[test]
fn a_closed_pipe_ends_every_script_without_a_word() {
    for (shell, _) in SHELLS {
        let mut command = shardmill(&["completions", shell]);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
        drop(child.stdout.take());
        let done = crate::support::output_of(child, &command);
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && said.is_empty(), "{shell}: {} {said}", done.status);
    }
}

#[test]
fn a_shell_that_is_unknown_or_missing_is_named_with_those_that_are_known() {
    for (arguments, parts) in [
        (
            &["completions", "ksh"][..],
            &["invalid value 'ksh'", "bash", "elvish", "fish", "zsh"][..],
        ),
        (&["completions", "fsh"], &["invalid value 'fsh'", "similar value exists: 'fish'"]),
        (&["completions", "Bash"], &["invalid value 'Bash'", "'bash'"]),
        (&["completions", ""], &["bash", "elvish", "fish", "powershell", "zsh"]),
        (&["completions"], &["required", "<SHELL>", "--help"]),
        (&["completions", "bash", "zsh"], &["unexpected argument 'zsh'"]),
    ] {
        let refused = run(arguments);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(refused.stdout.is_empty(), "{arguments:?}");
        for part in parts {
            assert!(said.contains(part), "{arguments:?}: {part:?} is missing in {said}");
        }
    }
}
