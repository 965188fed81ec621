//! The revision that runs instead of the configured one, and the history of all changes.
//!
//! A swap lasts: after a restart with the same files, the plugin that was swapped in runs again. If the files have
//! changed since, the files win, stage by stage. To tell these cases apart, two revisions are stored together
//! ([`Running`]): the one that the files described at the last change, and the one that runs.
//!
//! | the file describes a stage | runs after a restart |
//! |---|---|
//! | as it did at the last change | what was swapped in |
//! | differently | what the file says; earlier changes of the stage become `superseded` |
//!
//! **Invariants.** [`Changes::record_running`] writes the running revision and its change in one transaction, before a
//! lane runs it: a crash leaves either the old pair or the new one. An unreadable row is an error, never "nothing
//! was swapped": a default would silently undo a swap.

use std::collections::BTreeMap;

use rusqlite::OptionalExtension as _;
use serde::Serialize;

use super::store::{StateError, StateStore, now_ms};
use crate::RevisionSpec;
use shardmill_core::record::SinkName;

/// The revision that the files described, and the one that runs instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// The revision as the configuration and the plugin files described it at the last change.
    pub declared: RevisionSpec,
    /// The revision that runs.
    pub running: RevisionSpec,
}

impl Running {
    /// Returns the pair with renamed sinks; `names` has the old and the new name of each.
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

    /// Returns the revision to run now that the files describe `declared`: a stage that the files describe as at
    /// the last change runs as it ran, all others run as described.
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

/// The kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// Another plugin for one stage.
    Swap,
    /// Another plugin for a share of the partition keys.
    Canary,
    /// Return to the revision before the last change of a stage.
    Rollback,
    /// Changed files.
    Reload,
}

/// The outcome of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeOutcome {
    /// It runs now, or ran.
    Promoted,
    /// It was refused; the previous revision runs on.
    Refused,
    /// It was promoted and later undone: the previous revision runs again.
    RolledBack,
    /// It was promoted; since then the files have changed and take precedence.
    Superseded,
}

macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal),+ }) => {
        impl $name {
            /// Returns the word for it in the database and in reports.
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

/// A change that was attempted.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// Its number: later ones have greater numbers.
    pub number: i64,
    /// Time of the change, in milliseconds since 1970.
    pub at_ms: i64,
    /// Its kind.
    pub kind: ChangeKind,
    /// The stage that it changed; empty for a reload.
    pub stage: String,
    /// Id of the revision that ran before.
    pub before: String,
    /// Id of the revision that was to run; empty if the change failed before it had one.
    pub after: String,
    /// Its outcome.
    pub outcome: ChangeOutcome,
    /// Reason of a refusal or a rollback; empty otherwise.
    pub reason: String,
}

/// A change that has no number yet.
#[derive(Clone, Debug)]
pub struct NewChange {
    /// Its kind.
    pub kind: ChangeKind,
    /// The stage that it changes; empty for a reload.
    pub stage: String,
    /// Id of the revision that ran before.
    pub before: String,
    /// Id of the revision that is to run; empty if there is none yet.
    pub after: String,
}

/// The action that errors of [`Changes::running`] name.
const READ_RUNNING: &str = "read the running revision";
/// The way out when the stored running revision cannot be read.
const FILES_COUNT: &str = "run the version of shardmill that wrote it, or start once with \
                           `run --files-count`: the configured plugins run then, and earlier swaps are \
                           dropped";

/// The changes of a pipeline.
#[derive(Clone)]
pub struct Changes {
    store: StateStore,
}

impl Changes {
    /// Creates a handle over the pipeline's state database.
    pub fn new(store: StateStore) -> Self {
        Self { store }
    }

    /// Reads the revision that runs instead of what the files describe, as stored by the last change.
    ///
    /// # Errors
    /// [`StateError`] when the database or the stored revision cannot be read. Skipping an unreadable one would
    /// silently undo what was swapped in.
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
                let cause = format!("invalid record of the running revision: {error}");
                self.store.unreadable(READ_RUNNING, cause, FILES_COUNT)
            })
        };
        Ok(Some(Running { declared: read(&declared)?, running: read(&running)? }))
    }

    /// Stores the running revision, and the change that led to it, in one transaction. `undoes` is the number of a
    /// change that this one undoes, with the reason. Returns the number of the new change.
    ///
    /// # Errors
    /// [`StateError`]; the previous revision must run on then.
    pub async fn record_running(
        &self,
        running: &Running,
        change: Option<NewChange>,
        undoes: Option<(i64, String)>,
    ) -> Result<Option<i64>, StateError> {
        let (declared, running) = (running.declared.to_json(), running.running.to_json());
        self.store
            .transact("store the running revision", move |state| {
                // The table has one row. A crash leaves the old row or the new one, never none.
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

    /// Stores the sinks that run, each as the files describe it. A redrive beside the pipeline compares them: it
    /// must not run with other sinks.
    ///
    /// # Errors
    /// [`StateError`]; the earlier entries stay.
    pub async fn note_sinks(&self, sinks: Vec<(SinkName, String)>) -> Result<(), StateError> {
        self.store
            .transact("store the running sinks", move |state| {
                state.execute("DELETE FROM running_sink", [])?;
                let mut insert = state.prepare("INSERT INTO running_sink VALUES (?1, ?2)")?;
                let mut sinks = sinks.iter();
                sinks.try_for_each(|(sink, text)| insert.execute((sink.as_str(), text)).map(drop))
            })
            .await
    }

    /// Reads the sinks that run, as stored last; empty if nothing was stored.
    ///
    /// # Errors
    /// [`StateError`] when the database cannot be read.
    pub async fn running_sinks(&self) -> Result<BTreeMap<SinkName, String>, StateError> {
        self.store
            .transact("read the running sinks", |state| {
                let mut query = state.prepare("SELECT sink, fingerprint FROM running_sink")?;
                let sinks = query.query_map([], |row| {
                    Ok((SinkName::from(row.get::<_, String>(0)?), row.get(1)?))
                })?;
                sinks.collect()
            })
            .await
    }

    /// Marks earlier changes of these stages as superseded by the files: a rollback cannot undo them any more.
    ///
    /// # Errors
    /// [`StateError`]; only these marks are missing then.
    pub async fn supersede(&self, stages: Vec<String>) -> Result<(), StateError> {
        self.store
            .transact("mark changes as superseded", move |state| {
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

    /// Records a refused change.
    ///
    /// # Errors
    /// [`StateError`]; only the history lacks it then.
    pub async fn record_refused(
        &self,
        change: NewChange,
        reason: String,
    ) -> Result<(), StateError> {
        self.store
            .transact("record a refused change", move |state| {
                insert(state, &change, ChangeOutcome::Refused, &reason)
            })
            .await
            .map(drop)
    }

    /// Reads the last changes, the newest first; with `stage`, those of that stage and reloads.
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

    /// Reads the last change of this stage that is in force: the one that a rollback undoes. Reloads and rollbacks
    /// do not count.
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
        let cause = format!("unknown word {word:?} in the history of changes");
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
            assert!(error.contains("invalid record of the running revision"), "{error}");
            assert!(error.contains("--files-count"), "{error}");
        }
    }
}
