//! Connection strings of both forms, compared with the values that they were written from.

use std::fmt::Write as _;

use fastrand::Rng;
use tokio_postgres::config::{Host, SslMode};

use super::{place, read};
use shardmill_core::fuzzing::{Choices, FuzzTarget};

/// Hosts that a string may name.
const HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "db-1.example"];
/// White space between two parameters.
const GAPS: [&str; 3] = [" ", "  ", "\n"];

/// Checks that [`read`] returns the values that were written, whatever they contain, and that neither errors nor the
/// names of places contain the password.
pub const CONNECTION: FuzzTarget = FuzzTarget {
    name: "connection",
    run,
    grow,
    words: &[
        "postgres://",
        "postgresql://",
        "sslmode=",
        "verify-full",
        "sslrootcert=",
        "password=",
        "@",
        "?",
        "&",
        "%40",
        "'",
        "\\",
        "host=",
        "[::1]:5432",
    ],
};

/// Part of each password, which no error may show.
const SECRET: &str = "s3cr3t";

/// Pieces of values, among them each character that has a meaning in one of the forms.
const PIECES: [&str; 20] = [
    "a",
    " ",
    "'",
    "\\",
    "=",
    "&",
    "?",
    "@",
    "/",
    ":",
    "%",
    "%40",
    "+",
    "é",
    "#",
    ",",
    "\t",
    "sslmode=verify-full",
    " sslrootcert=ca.pem ",
    "postgres://",
];

const MODES: [(&str, SslMode); 6] = [
    ("", SslMode::Prefer),
    ("disable", SslMode::Disable),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::Require),
    ("verify-full", SslMode::Require),
];

/// Values that a connection string is written from.
struct Wanted {
    user: String,
    password: String,
    host: &'static str,
    port: u16,
    database: String,
    application: String,
    mode: (&'static str, SslMode),
    roots: Option<String>,
}

fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let form = choices.byte();
    if form % 4 == 3 {
        return any_text(choices.rest());
    }
    let wanted = Wanted {
        user: value(&mut choices),
        password: value(&mut choices) + SECRET + &value(&mut choices),
        host: choices.one_of::<&str>(&HOSTS),
        port: *choices.one_of(&[5432, 1, 65535]),
        database: value(&mut choices),
        application: value(&mut choices),
        mode: *choices.one_of(&MODES),
        roots: (choices.byte() % 3 == 2).then(|| value(&mut choices)),
    };
    let text = match form % 4 {
        0 => wanted.to_url(&mut choices),
        _ => wanted.to_keywords(&mut choices),
    };
    let (config, roots) = read(&text).unwrap_or_else(|why| panic!("{text}: {why}"));
    assert_eq!(config.get_user(), Some(&*wanted.user), "{text}");
    assert_eq!(config.get_password(), Some(wanted.password.as_bytes()), "{text}");
    assert_eq!(config.get_hosts(), [Host::Tcp(wanted.host.into())], "{text}");
    assert_eq!(config.get_ports(), [wanted.port], "{text}");
    assert_eq!(config.get_dbname(), Some(&*wanted.database), "{text}");
    assert_eq!(config.get_application_name(), Some(&*wanted.application), "{text}");
    assert_eq!(config.get_ssl_mode(), wanted.mode.1, "{text}");
    assert_eq!(roots, wanted.roots, "{text}");
    assert!(!place(&config).contains(SECRET), "{text}: {}", place(&config));

    // An invalid string may not show the password either.
    for spoilt in [format!("{text}&port=none"), format!("{text} port=none"), format!("{text}'")] {
        if let Err(why) = read(&spoilt) {
            assert!(!why.contains(SECRET), "{spoilt}: {why}");
        }
    }
}

/// Checks that any text is read or refused, and that places of parameters lie within it.
fn any_text(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok((config, _)) = read(&text) {
        let _named = place(&config);
    }
    for parameter in super::parameters(&text) {
        let (place, whole) = (parameter.place, parameter.whole);
        assert!(whole.start <= place.start && place.end <= whole.end, "{text}");
        assert!(text.get(whole).is_some() && text.get(place).is_some(), "{text}");
    }
}

/// Makes a value of one to four pieces. A value is never empty.
fn value(choices: &mut Choices<'_>) -> String {
    let pieces = 1 + choices.below(4);
    (0..pieces).map(|_| *choices.one_of(&PIECES)).collect()
}

impl Wanted {
    /// Lists the parameters that both forms write as `name=value`.
    fn parameters(&self) -> Vec<(&'static str, String)> {
        let mut parameters = vec![("application_name", self.application.clone())];
        if !self.mode.0.is_empty() {
            parameters.push(("sslmode", self.mode.0.into()));
        }
        parameters.extend(self.roots.clone().map(|roots| ("sslrootcert", roots)));
        parameters
    }

    fn to_url(&self, choices: &mut Choices<'_>) -> String {
        let scheme = choices.one_of(&["postgres", "postgresql"]);
        let mut url = format!(
            "{scheme}://{}:{}@{}:{}/{}",
            percent(&self.user),
            percent(&self.password),
            self.host,
            self.port,
            percent(&self.database)
        );
        let mut parameters = self.parameters();
        let turn = choices.below(parameters.len());
        parameters.rotate_left(turn);
        for (place, (name, value)) in parameters.iter().enumerate() {
            let separator = if place == 0 { '?' } else { '&' };
            let value = percent(value);
            let _infallible = write!(url, "{separator}{name}={value}");
        }
        url
    }

    fn to_keywords(&self, choices: &mut Choices<'_>) -> String {
        let mut parameters = self.parameters();
        parameters.extend([
            ("user", self.user.clone()),
            ("password", self.password.clone()),
            ("host", self.host.into()),
            ("port", self.port.to_string()),
            ("dbname", self.database.clone()),
        ]);
        let turn = choices.below(parameters.len());
        parameters.rotate_left(turn);
        let mut text = String::new();
        for (name, value) in parameters {
            let equals = choices.one_of(&["=", " = ", "= ", "\t="]);
            let quote = if choices.byte().is_multiple_of(2) { "'" } else { "" };
            let _infallible = write!(text, "{name}{equals}{quote}");
            for c in value.chars() {
                let needs_escape =
                    matches!(c, '\\' | '\'') || (quote.is_empty() && c.is_whitespace());
                if needs_escape {
                    text.push('\\');
                }
                text.push(c);
            }
            text.push_str(quote);
            text.push_str(choices.one_of::<&str>(&GAPS));
        }
        text
    }
}

/// Percent-encodes all but letters and digits.
fn percent(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        let _infallible = match byte.is_ascii_alphanumeric() {
            true => write!(encoded, "{}", char::from(byte)),
            false => write!(encoded, "%{byte:02X}"),
        };
    }
    encoded
}

fn grow(random: &mut Rng) -> Vec<u8> {
    let mut input: Vec<u8> = (0..random.usize(20..60)).map(|_| random.u8(..)).collect();
    if random.u8(..4) == 0 {
        input = vec![3];
        let pieces = [&PIECES[..], CONNECTION.words].concat();
        for _ in 0..random.usize(1..12) {
            input.extend(random.choice(&pieces).copied().unwrap_or_default().bytes());
        }
    }
    input
}
