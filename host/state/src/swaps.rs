//! What runs in place of what the configuration says, and every change that was tried.
//!
//! A swap lasts: after a restart with the same files, the swapped-in plugin runs on. Where the files
//! have changed since, they count. So what the files said at the time of the last change is kept beside
//! what runs.

use std::collections::BTreeMap;

use rusqlite::OptionalExtension as _;
use serde::Serialize;

use super::store::{StateError, StateStore, now_ms};
use crate::RevisionSpec;
use shardmill_core::record::SinkName;

/// What the files described, and what runs instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// As the configuration and the plugins' files had it.
    pub declared: RevisionSpec,
    /// What runs.
    pub running: RevisionSpec,
}

impl Running {
    /// The same with sinks as they are called now: by their old and new names.
    pub fn with_renamed<'n>(
        &self,
        names: impl IntoIterator<Item = (&'n SinkName, &'n SinkName)>,
    ) -> Self {
        let mut renamed = self.clone();
        for (old, new) in names {
            renamed.declared.rename_sink(old, new);
            renamed.running.rename_sink(old, new);
        }
        renamed
    }

    /// What is to run now that the files describe `declared`: a stage that they describe as they did
    /// before runs on as it ran, all others as described.
    pub fn carried_over(&self, declared: &RevisionSpec) -> RevisionSpec {
        let mut carried = declared.clone();
        for stage in &mut carried.stages {
            let before = self.declared.stage(&stage.name);
            let running = self.running.stage(&stage.name);
            if let (Some(before), Some(running)) = (before, running)
                && before == stage
            {
                *stage = running.clone();
            }
        }
        carried
    }
}

/// What brought a change about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// Another plugin for one stage.
    Swap,
    /// Another plugin for a share of the partition keys.
    Canary,
    /// Back to what ran before the last change of a stage.
    Rollback,
    /// Other files.
    Reload,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeOutcome {
    /// It runs, or ran.
    Promoted,
    /// What ran before runs on.
    Refused,
    /// It was promoted, and undone since: what ran before it runs again.
    RolledBack,
    /// It was promoted; the files have changed since, and count more.
    Superseded,
}

macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal),+ }) => {
        impl $name {
            /// The word that stands for it in the database and in reports.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            fn from_str(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}
words!(ChangeKind { Swap = "swap", Canary = "canary", Rollback = "rollback", Reload = "reload" });
words!(ChangeOutcome {
    Promoted = "promoted",
    Refused = "refused",
    RolledBack = "rolled-back",
    Superseded = "superseded"
});

/// A change that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// Its number: later ones have greater numbers.
    pub number: i64,
    /// When, in milliseconds since 1970.
    pub at_ms: i64,
    /// What it was.
    pub kind: ChangeKind,
    /// The stage that it was about; empty for a reload.
    pub stage: String,
    /// The revision that ran before.
    pub before: String,
    /// The revision that was to run; empty where it did not come so far.
    pub after: String,
    /// How it ended.
    pub outcome: ChangeOutcome,
    /// Why it was refused or rolled back; empty otherwise.
    pub reason: String,
}

/// A change before it has a number.
#[derive(Clone, Debug)]
pub struct NewChange {
    /// What it is.
    pub kind: ChangeKind,
    /// The stage that it is about; empty for a reload.
    pub stage: String,
    /// The revision that ran before.
    pub before: String,
    /// The revision that is to run, if it came so far.
    pub after: String,
}

/// The action of [`Changes::running`], for errors.
const READ_RUNNING: &str = "read what runs";
/// The way out where the note of what runs cannot be read.
const FILES_COUNT: &str = "run the version of shardmill that wrote it, or start once with \
                           `run --files-count`: what the files say runs then, and what was swapped \
                           in is given up";

/// The changes of a pipeline.
#[derive(Clone)]
pub struct Changes {
    store: StateStore,
}

impl Changes {
    /// Over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// What runs in place of what the files describe, as last noted.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read, or the note in it: a note that is passed over
    /// would take back in silence what was swapped in.
    pub async fn running(&self) -> Result<Option<Running>, StateError> {
        let found = self
            .store
            .transact(READ_RUNNING, |state| {
                let mut query = state.prepare("SELECT declared, running FROM running")?;
                let found = query
                    .query_row([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
                found.optional()
            })
            .await?;
        let Some((declared, running)) = found else { return Ok(None) };
        let read = |json: &str| {
            serde_json::from_str(json).map_err(|error| {
                let cause = format!("the record of what runs cannot be read: {error}");
                self.store.unreadable(READ_RUNNING, cause, FILES_COUNT)
            })
        };
        Ok(Some(Running { declared: read(&declared)?, running: read(&running)? }))
    }

    /// Notes what runs, and the change that brought it about, as one step. `undoes` is a change that is
    /// undone by it, with the reason. Gives the new change's number.
    ///
    /// # Errors
    /// [`StateError`]; what ran before must run on then.
    pub async fn record_running(
        &self,
        running: &Running,
        change: Option<NewChange>,
        undoes: Option<(i64, String)>,
    ) -> Result<Option<i64>, StateError> {
        let (declared, running) = (running.declared.to_json(), running.running.to_json());
        self.store
            .transact("note what runs", move |state| {
                state.execute("DELETE FROM running", [])?;
                state.execute("INSERT INTO running VALUES (?1, ?2)", (declared, running))?;
                if let Some((number, reason)) = undoes {
                    state.execute(
                        "UPDATE change SET outcome = ?2, reason = ?3 WHERE number = ?1",
                        (number, ChangeOutcome::RolledBack.as_str(), reason),
                    )?;
                }
                let Some(change) = change else { return Ok(None) };
                insert(state, &change, ChangeOutcome::Promoted, "").map(Some)
            })
            .await
    }

    /// Notes the sinks that run, each as the files describe it: a redrive beside the pipeline must not run
    /// with others.
    ///
    /// # Errors
    /// [`StateError`]; the note of before stands.
    pub async fn note_sinks(&self, sinks: Vec<(SinkName, String)>) -> Result<(), StateError> {
        self.store
            .transact("note the sinks that run", move |state| {
                state.execute("DELETE FROM running_sink", [])?;
                let mut insert = state.prepare("INSERT INTO running_sink VALUES (?1, ?2)")?;
                let mut sinks = sinks.iter();
                sinks.try_for_each(|(sink, text)| insert.execute((sink.as_str(), text)).map(drop))
            })
            .await
    }

    /// The sinks that run, as noted last; empty: nothing was noted.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn running_sinks(&self) -> Result<BTreeMap<SinkName, String>, StateError> {
        self.store
            .transact("read the sinks that run", |state| {
                let mut query = state.prepare("SELECT sink, fingerprint FROM running_sink")?;
                let sinks = query.query_map([], |row| {
                    Ok((SinkName::from(row.get::<_, String>(0)?), row.get(1)?))
                })?;
                sinks.collect()
            })
            .await
    }

    /// Notes that what the files say of these stages counts more than earlier changes of them, which
    /// cannot be undone any more.
    ///
    /// # Errors
    /// [`StateError`]; only the note is missing then.
    pub async fn supersede(&self, stages: Vec<String>) -> Result<(), StateError> {
        self.store
            .transact("note changes that do not count any more", move |state| {
                for stage in &stages {
                    state.execute(
                        "UPDATE change SET outcome = ?2 WHERE stage = ?1 AND outcome = ?3",
                        (
                            stage,
                            ChangeOutcome::Superseded.as_str(),
                            ChangeOutcome::Promoted.as_str(),
                        ),
                    )?;
                }
                Ok(())
            })
            .await
    }

    /// Notes a change that was refused.
    ///
    /// # Errors
    /// [`StateError`]; only the note is missing then.
    pub async fn record_refused(
        &self,
        change: NewChange,
        reason: String,
    ) -> Result<(), StateError> {
        self.store
            .transact("note a refused change", move |state| {
                insert(state, &change, ChangeOutcome::Refused, &reason)
            })
            .await
            .map(drop)
    }

    /// The last changes, the newest first; of one stage if that is said.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn list(&self, stage: Option<String>, limit: u32) -> Result<Vec<Change>, StateError> {
        self.store
            .transact("read the changes", move |state| {
                let mut query = state.prepare(
                    "SELECT number, at_ms, kind, stage, before, after, outcome, reason FROM change
                     WHERE ?1 IS NULL OR stage = ?1 OR stage = '' ORDER BY number DESC LIMIT ?2",
                )?;
                let changes = query.query_map((stage, limit), change)?;
                changes.collect()
            })
            .await
    }

    /// The last change of a stage alone that is in force: what a rollback undoes.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn last_in_force(&self, stage: &str) -> Result<Option<Change>, StateError> {
        let stage = stage.to_owned();
        self.store
            .transact("read the changes", move |state| {
                let mut query = state.prepare(
                    "SELECT number, at_ms, kind, stage, before, after, outcome, reason FROM change
                     WHERE stage = ?1 AND outcome = 'promoted' AND kind <> 'rollback'
                     ORDER BY number DESC LIMIT 1",
                )?;
                query.query_row([stage], change).optional()
            })
            .await
    }
}

fn insert(
    state: &rusqlite::Transaction<'_>,
    change: &NewChange,
    outcome: ChangeOutcome,
    reason: &str,
) -> rusqlite::Result<i64> {
    let NewChange { kind, stage, before, after } = change;
    state.execute(
        "INSERT INTO change (at_ms, kind, stage, before, after, outcome, reason)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        (now_ms(), kind.as_str(), stage, before, after, outcome.as_str(), reason),
    )?;
    Ok(state.last_insert_rowid())
}

fn change(row: &rusqlite::Row<'_>) -> rusqlite::Result<Change> {
    let unknown = |column: usize, word: String| {
        let cause = format!("{word:?} is unknown to this version");
        let kind = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(column, kind, cause.into())
    };
    let (kind, outcome): (String, String) = (row.get(2)?, row.get(6)?);
    Ok(Change {
        number: row.get(0)?,
        at_ms: row.get(1)?,
        kind: ChangeKind::from_str(&kind).ok_or_else(|| unknown(2, kind))?,
        stage: row.get(3)?,
        before: row.get(4)?,
        after: row.get(5)?,
        outcome: ChangeOutcome::from_str(&outcome).ok_or_else(|| unknown(6, outcome))?,
        reason: row.get(7)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn fault_18_an_unreadable_record_of_what_runs_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = StateStore::open(folder.path()).expect("opened");
        let changes = Changes::new(store.clone());
        assert_eq!(changes.running().await.expect("read"), None);
        for (declared, running) in [("{}", "{}"), ("", "{\"stages\":[]}"), ("{\"stages\":[]}", "[")]
        {
            let spoil = move |state: &rusqlite::Transaction<'_>| {
                state.execute("DELETE FROM running", [])?;
                state.execute("INSERT INTO running VALUES (?1, ?2)", (declared, running))
            };
            store.transact("spoil", spoil).await.expect("spoilt");
            let error = changes.running().await.expect_err("unreadable").to_string();
            assert!(error.contains("the record of what runs cannot be read"), "{error}");
            assert!(error.contains("--files-count"), "{error}");
        }
    }
}
