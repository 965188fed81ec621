//! Remembers which values the environment variables of a revision had, without storing the values.
//!
//! A revision is stored with `${NAME}` in its configurations. It runs with today's values, also when it runs old
//! records again. So a keyed hash of each value is stored, and a warning names the variables that had other values
//! before. The key lies in a file beside the database: a copy of the database alone is not enough to try out
//! values.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;

use hmac::{Hmac, KeyInit as _, Mac as _};
use rusqlite::OptionalExtension as _;
use sha2::{Digest as _, Sha256};

use super::revisions;
use super::store::{StateError, StateStore};
use crate::RevisionSpec;
use shardmill_config::StageText;
use shardmill_core::private;
use shardmill_core::record::StageName;

/// File of the key, beside the database.
const KEY_FILE: &str = "variables.key";
/// Hex digits of a stored hash, and of the key's own digest before them.
const HASH_DIGITS: usize = 32;
const KEY_DIGITS: usize = 8;
/// A database larger than this is not rewritten to remove deleted values from its free pages.
const VACUUM_BYTES_MAX: i64 = 256 << 20;

/// Returns today's value of a variable.
type Environment<'a> = &'a (dyn Fn(&str) -> Option<String> + Sync);

/// How the variables of a revision are set today, compared with when it ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangedVariables {
    /// Variables that had other values.
    pub names: Vec<String>,
    /// Variables for which this is unknown: the key of their hashes is gone.
    pub unknown: Vec<String>,
}

impl ChangedVariables {
    /// Logs a warning for each kind of difference.
    pub fn warn(&self, revision: &str) {
        let Self { names, unknown } = self;
        if !names.is_empty() {
            tracing::warn!(
                revision,
                variables = names.join(", "),
                "these environment variables had other values when the revision ran before: records \
                 that it runs again use today's values"
            );
        }
        if !unknown.is_empty() {
            tracing::warn!(
                revision,
                variables = unknown.join(", "),
                "cannot tell whether these environment variables had other values when the revision ran \
                 before: {KEY_FILE} is missing or was replaced; records that it runs again use today's values"
            );
        }
    }
}

/// The variables of a pipeline's revisions.
#[derive(Clone)]
pub struct Variables {
    store: StateStore,
}

impl Variables {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// Compares today's values of a revision's variables with those that it last ran with, and stores the hashes of
    /// today's.
    ///
    /// # Errors
    /// [`StateError`]; nothing was stored.
    pub async fn note(
        &self,
        spec: &RevisionSpec,
        lookup: Environment<'_>,
    ) -> Result<ChangedVariables, StateError> {
        self.compare(spec, lookup, true).await
    }

    /// Compares today's values of a revision's variables with those that it last ran with. Changes nothing.
    ///
    /// # Errors
    /// [`StateError`] when the database or the key cannot be read.
    pub async fn changed_variables(
        &self,
        spec: &RevisionSpec,
        lookup: Environment<'_>,
    ) -> Result<ChangedVariables, StateError> {
        self.compare(spec, lookup, false).await
    }

    async fn compare(
        &self,
        spec: &RevisionSpec,
        lookup: Environment<'_>,
        is_noted: bool,
    ) -> Result<ChangedVariables, StateError> {
        let action = "compare the variables of a revision";
        let mut names = BTreeSet::new();
        for stage in spec.stages.iter().filter(|stage| stage.has_variables) {
            let own = stage.text().names().map_err(|cause| self.store.error(action, cause))?;
            names.extend(own);
        }
        if names.is_empty() {
            return Ok(ChangedVariables::default());
        }
        let key = Key::open(self.store.folder(), is_noted)
            .map_err(|cause| self.store.error(action, format!("{KEY_FILE}: {cause}")))?;
        let today = names.into_iter().map(|name| {
            let value = lookup(&name);
            let hash = key.as_ref().map(|key| key.hash(&name, value.as_deref()));
            (name, hash)
        });
        let today: Vec<(String, Option<String>)> = today.collect();
        let id = spec.id().to_string();
        let work = move |state: &rusqlite::Transaction<'_>| {
            let mut found = ChangedVariables::default();
            for (name, today) in today {
                let noted = "SELECT hash FROM variable WHERE generation = ?1 AND name = ?2";
                let noted: Option<String> =
                    state.query_row(noted, (&id, &name), |row| row.get(0)).optional()?;
                match compared(noted.as_deref(), today.as_deref()) {
                    Compared::Same => continue,
                    Compared::First => {}
                    Compared::Other => found.names.push(name.clone()),
                    Compared::Unknown => found.unknown.push(name.clone()),
                }
                if let Some(hash) = today.filter(|_| is_noted) {
                    let note = "INSERT OR REPLACE INTO variable VALUES (?1, ?2, ?3)";
                    state.execute(note, (&id, &name, hash))?;
                }
            }
            Ok(found)
        };
        self.store.transact(action, work).await
    }

    /// Replaces configurations that an earlier version stored with the values of their variables: the file's text
    /// with `${NAME}` takes their place, in stages that are otherwise the same.
    ///
    /// # Errors
    /// [`StateError`]; nothing was changed.
    pub async fn forget_values(
        &self,
        stages: Vec<(StageName, StageText)>,
    ) -> Result<(), StateError> {
        if stages.iter().all(|(_, text)| !text.has_variables) {
            return Ok(());
        }
        let rewritten = self
            .store
            .transact("remove the values of variables", move |state| {
                // Deleted content is overwritten.
                state.pragma_update(None, "secure_delete", true)?;
                let rewritten = revisions::rewrite(state, |spec| forget(spec, &stages));
                state.pragma_update(None, "secure_delete", false)?;
                rewritten
            })
            .await?;
        if rewritten > 0 {
            tracing::info!(
                rewritten,
                "stored configurations now contain ${{NAME}} instead of the values"
            );
            if let Err(error) = self.store.vacuum(VACUUM_BYTES_MAX).await {
                tracing::warn!(%error, "values of variables may remain in free pages of the file");
            }
        }
        Ok(())
    }
}

/// Replaces resolved configurations by their texts with variables. Returns true if any matched.
fn forget(spec: &mut RevisionSpec, stages: &[(StageName, StageText)]) -> bool {
    let mut has_changed = false;
    for (name, text) in stages.iter().filter(|(_, text)| text.has_variables) {
        let own = spec.stages.iter_mut().filter(|own| own.name == *name && !own.has_variables);
        for own in own.filter(|own| text.may_become(&own.config_json)) {
            (own.config_json, own.has_variables) = (text.json.clone(), true);
            has_changed = true;
        }
    }
    has_changed
}

/// The outcome of comparing two hashes.
#[derive(Debug, PartialEq, Eq)]
enum Compared {
    First,
    Same,
    Other,
    Unknown,
}

/// Compares a stored hash with today's. Hashes under another key say nothing about the value.
fn compared(noted: Option<&str>, today: Option<&str>) -> Compared {
    let key = |hash: &str| hash.get(..KEY_DIGITS).map(str::to_owned);
    match (noted, today) {
        (None, _) => Compared::First,
        (Some(noted), Some(today)) if noted == today => Compared::Same,
        (Some(noted), Some(today)) if key(noted) == key(today) => Compared::Other,
        (Some(_), _) => Compared::Unknown,
    }
}

/// The secret key of the hashes.
struct Key([u8; 32]);

impl Key {
    /// Reads the key. If `make`, creates one where none can be used.
    ///
    /// With `--trust-state-dir`, a start accepts files of the uid that it had before. A key that another user owns
    /// is not used even then: whoever knows the key could try out values. It is replaced, as a missing one is.
    fn open(folder: &Path, make: bool) -> std::io::Result<Option<Self>> {
        let path = folder.join(KEY_FILE);
        // Kubernetes gives a volume's files to a group at each start (fsGroup), which may then write them.
        private::tighten(&path);
        let is_foreign = match found(private::read_own(&path))? {
            Found::Own(key) => return Ok(Some(Self(key))),
            Found::None => false,
            Found::Foreign(cause) => {
                tracing::warn!(
                    "{} is not used: {cause}; cannot tell whether environment variables had other values when \
                     revisions ran before",
                    path.display()
                );
                true
            }
        };
        if !make {
            return Ok(None);
        }
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(std::io::Error::other)?;
        match private::write_own(&path, hex::encode(key).as_bytes()) {
            Ok(()) => Ok(Some(Self(key))),
            // Nothing is stored then: that must not keep records from flowing.
            Err(error) if is_foreign => {
                tracing::warn!("{} cannot be replaced: {error}; remove it", path.display());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the hash of a value; an unset variable has one too.
    fn hash(&self, name: &str, value: Option<&str>) -> String {
        // HMAC accepts a key of 32 bytes: this cannot fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return String::new() };
        mac.update(&(name.len() as u64).to_le_bytes());
        mac.update(name.as_bytes());
        mac.update(&[u8::from(value.is_some())]);
        mac.update(value.unwrap_or_default().as_bytes());
        let hash = hex::encode(mac.finalize().into_bytes());
        let key = hex::encode(Sha256::digest(self.0));
        format!("{}{}", &key[..KEY_DIGITS], &hash[..HASH_DIGITS])
    }
}

/// Content found at the path of the key.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Own([u8; 32]),
    /// Nothing, or not a key.
    None,
    /// Something that another user may have written, or that this one cannot read; with the reason.
    Foreign(String),
}

/// Judges the result of reading the key's path.
///
/// # Errors
/// The system's, if a retry may help.
fn found(read: std::io::Result<Vec<u8>>) -> std::io::Result<Found> {
    match read {
        Ok(text) => {
            let mut key = [0; 32];
            let is_key = hex::decode_to_slice(text.trim_ascii(), &mut key).is_ok();
            Ok(if is_key { Found::Own(key) } else { Found::None })
        }
        Err(error) => match error.kind() {
            ErrorKind::NotFound => Ok(Found::None),
            // `Other` comes from `read_own` itself, never from the system.
            ErrorKind::PermissionDenied | ErrorKind::Other => Ok(Found::Foreign(error.to_string())),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(config: &str, has_variables: bool) -> RevisionSpec {
        let json = serde_json::json!({
            "source_format": null,
            "stages": [{
                "name": "decode", "digest": "d".repeat(64), "config_json": config,
                "has_variables": has_variables,
                "limits": shardmill_config::StageLimits::default(), "routes": {}
            }]
        });
        serde_json::from_value(json).expect("a specification")
    }

    #[tokio::test]
    async fn wall_17_a_value_that_was_set_otherwise_is_named_by_its_hash() {
        let folder = tempfile::tempdir().expect("a folder");
        let variables = Variables::new(StateStore::open(folder.path()).expect("opened"));
        let spec = spec(r#"{"a":"${TOKEN}","b":"x${PLACE:-here}"}"#, true);
        let value =
            |token: &'static str| move |name: &str| (name == "TOKEN").then(|| token.to_owned());
        let same = ChangedVariables::default();
        let other = ChangedVariables { names: vec!["TOKEN".into()], unknown: Vec::new() };
        let noted = async |token| {
            let lookup = value(token);
            variables.note(&spec, &lookup).await.expect("noted")
        };
        let asked = async |token| {
            let lookup = value(token);
            variables.changed_variables(&spec, &lookup).await.expect("asked")
        };
        assert_eq!(asked("hunter2-one").await, same, "it has not run yet");
        assert_eq!(noted("hunter2-one").await, same);
        assert_eq!(noted("hunter2-one").await, same);
        assert_eq!(asked("hunter2-two").await, other);
        assert_eq!(noted("hunter2-two").await, other);
        assert_eq!(noted("hunter2-two").await, same);
        let key = folder.path().join(KEY_FILE);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&key).expect("a key").permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        std::fs::remove_file(&key).expect("removed");
        let unknown = vec!["PLACE".to_owned(), "TOKEN".to_owned()];
        assert_eq!(asked("hunter2-two").await.unknown, unknown);
        assert_eq!(noted("hunter2-two").await.unknown, unknown);
        assert_eq!(noted("hunter2-two").await, same);
    }

    #[tokio::test]
    async fn wall_14_a_key_that_a_volume_gives_to_a_group_is_used_and_tightened() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let variables = Variables::new(StateStore::open(folder.path()).expect("opened"));
        let spec = spec(r#"{"a":"${TOKEN}"}"#, true);
        let lookup = |_: &str| Some("hunter2".to_owned());
        variables.note(&spec, &lookup).await.expect("noted");
        let key = folder.path().join(KEY_FILE);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o660)).expect("set");
        let found = variables.changed_variables(&spec, &lookup).await.expect("asked");
        assert_eq!(found, ChangedVariables::default());
        let mode = std::fs::metadata(&key).expect("a key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn wall_14_a_key_of_another_user_counts_as_missing() {
        use std::io::Error;
        let foreign = |cause: &str| Found::Foreign(cause.into());
        for (name, read, expected) in [
            ("ours", Ok(b"ab".repeat(32)), Some(Found::Own([0xab; 32]))),
            (
                "with a line end",
                Ok([&b"ab".repeat(32)[..], b"\n"].concat()),
                Some(Found::Own([0xab; 32])),
            ),
            ("cut", Ok(b"abab".to_vec()), Some(Found::None)),
            ("missing", Err(Error::from(ErrorKind::NotFound)), Some(Found::None)),
            ("another user's", Err(Error::other("user 7")), Some(foreign("user 7"))),
            (
                "unreadable",
                Err(Error::new(ErrorKind::PermissionDenied, "denied")),
                Some(foreign("denied")),
            ),
            ("a fault of the disk", Err(Error::from_raw_os_error(libc::EIO)), None),
        ] {
            assert_eq!(found(read).ok(), expected, "{name}");
        }
    }

    #[tokio::test]
    async fn wall_14_what_is_no_file_of_ours_is_replaced_by_a_new_key() {
        let folder = tempfile::tempdir().expect("a folder");
        let variables = Variables::new(StateStore::open(folder.path()).expect("opened"));
        let spec = spec(r#"{"a":"${TOKEN}"}"#, true);
        let lookup = |_: &str| Some("hunter2".to_owned());
        variables.note(&spec, &lookup).await.expect("noted");
        // Stands for a file of another user: only root could give one away.
        let (key, other) = (folder.path().join(KEY_FILE), folder.path().join("other"));
        std::fs::rename(&key, &other).expect("moved");
        std::os::unix::fs::symlink(&other, &key).expect("a link");
        let before = std::fs::read(&other).expect("read");
        let unknown = vec!["TOKEN".to_owned()];
        let asked = variables.changed_variables(&spec, &lookup).await.expect("asked");
        assert_eq!(asked.unknown, unknown);
        assert!(key.is_symlink(), "a question changes nothing");
        assert_eq!(variables.note(&spec, &lookup).await.expect("noted").unknown, unknown);
        assert!(!key.is_symlink());
        assert_eq!(std::fs::read(&other).expect("read"), before);
        let now = variables.note(&spec, &lookup).await.expect("noted");
        assert_eq!(now, ChangedVariables::default());
    }

    #[tokio::test]
    async fn wall_17_values_that_an_earlier_version_stored_are_replaced_by_their_variables() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let old = spec(r#"{"a":"hunter2"}"#, false);
        let (id, json) = (old.id().to_string(), old.to_json());
        let work = move |state: &rusqlite::Transaction<'_>| {
            state.execute("INSERT INTO generation VALUES (?1, ?2)", (&id, &json))?;
            state.execute("INSERT INTO running VALUES (?1, ?1)", [&json])?;
            state.execute("INSERT INTO ledger VALUES ('s', 'shard', '', 0, ?1, 0)", [&id])
        };
        store.transact("write as before", work).await.expect("written");
        let variables = Variables::new(store.clone());
        let text = StageText { json: r#"{"a":"${TOKEN}"}"#.into(), has_variables: true };
        variables.forget_values(vec![("decode".into(), text)]).await.expect("forgotten");
        let new = spec(r#"{"a":"${TOKEN}"}"#, true);
        let read = |state: &rusqlite::Transaction<'_>| {
            let text = |sql: &str| state.query_row(sql, [], |row| row.get::<_, String>(0));
            Ok((
                text("SELECT spec FROM generation")?,
                text("SELECT generation FROM ledger")?,
                text("SELECT running FROM running")?,
            ))
        };
        let found = store.transact("read", read).await.expect("read");
        assert_eq!(found, (new.to_json(), new.id().to_string(), new.to_json()));
        for file in ["state.db", "state.db-wal"] {
            let bytes = std::fs::read(folder.path().join(file)).unwrap_or_default();
            assert!(!bytes.windows(7).any(|part| part == b"hunter2"), "{file}");
        }
    }
}
