//! A reload: makes what the files describe now run, as one revision, in a running pipeline.
//!
//! Everything that the files name is loaded and checked beside what runs (`validate`). What differs decides how it is
//! applied:
//!
//! | difference | applied |
//! |---|---|
//! | the name, the state folder, the source, ports, `[timing]`, sinks of `[dead_letters]`, `[reload] watch` | refused |
//! | none that a lane would notice (pins, limits of compilation) | kept for later changes; nothing is promoted |
//! | stages only | promoted; each lane changes at its next batch boundary, or restarts if a sink gets other rows |
//! | sinks or settings | promoted; all lanes end and restart |
//!
//! To change what `refuse_immutable` refuses, restart the process.
//!
//! Stages that differ are tried on recent records first. A sink that is removed while it lags behind the others is
//! refused before anything is durable: the lanes would find that out only when they have ended, after the answer.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::promotion::{AnswerTime, Promotion, rehearse};
use super::trial::TrialReport;
use super::{
    ChangeRefused, Inner, OTHERS_FIRST, Setup, Step, StepFailed, Swapper, TURNS_MAX, candidate,
};
use crate::lane::roster;
use crate::lane::{LaneChange, RevisionStore, WaitingLane};
use crate::stage::Revision;
use shardmill_config::{KinesisConfig, LookupConfig, PipelineConfig, SinkConfig, SourceKind};
use shardmill_core::boxed;
use shardmill_core::record::{SinkName, StageName};
use shardmill_core::sink::Sink;
use shardmill_plugin::{Backends, PluginHost};
use shardmill_state::RevisionSpec;
use shardmill_state::{ChangeKind, NewChange};

/// Differences between the files and what runs, one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReloadDiff {
    /// Stages that come, go, or change.
    pub stages: Vec<String>,
    /// Sinks that come, go, or change.
    pub sinks: Vec<String>,
    /// Other settings.
    pub settings: Vec<String>,
}

impl ReloadDiff {
    /// Whether the files describe what runs.
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty() && self.sinks.is_empty() && self.settings.is_empty()
    }

    /// Returns all lines.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().chain(&self.sinks).chain(&self.settings).map(String::as_str)
    }
}

/// A reload that was made, or would be.
#[derive(Debug, Serialize)]
pub struct ReloadReport {
    /// Its number in the history; `None`: nothing was changed.
    pub number: Option<i64>,
    /// The revision that runs now, or would.
    #[serde(rename = "generation")]
    pub revision: String,
    /// Differences from what ran before.
    pub diff: ReloadDiff,
    /// Whether the lanes restart, because sinks or settings change.
    #[serde(rename = "takes_over")]
    pub restarts_lanes: bool,
    /// Trials of the changed stages on recent records.
    pub trials: Vec<(String, TrialReport)>,
    /// Changed stages without a trial, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub no_trials: Vec<(String, String)>,
    /// The lanes that have changed.
    pub lanes: Vec<LaneChange>,
    /// Lanes that have not changed yet, and why.
    pub waiting: Vec<WaitingLane>,
    /// The change is stored and not in force yet: the lanes end only at a batch boundary, or when their time is
    /// over. What is found then may undo the change.
    pub may_be_undone: bool,
}

/// The validated content of the files.
struct Reloaded {
    config: PipelineConfig,
    host: PluginHost,
    declared: RevisionSpec,
    /// The running revision, with the new names of its sinks.
    known: RevisionSpec,
    next: Arc<Revision>,
    components: Vec<(String, bytes::Bytes)>,
    sinks: Vec<Arc<dyn Sink>>,
    diff: ReloadDiff,
}

impl Reloaded {
    /// Returns the sinks whose tables a dry run checks: all except new ones that would create their table, which a
    /// dry run must not do.
    fn sinks_to_look_at(&self, setup: &Setup) -> Vec<Arc<dyn Sink>> {
        let is_known =
            |sink: &Arc<dyn Sink>| setup.shared.sinks.iter().any(|known| Arc::ptr_eq(known, sink));
        let sinks = self.sinks.iter().zip(&self.config.sinks);
        let looked_at =
            sinks.filter(|(sink, config)| is_known(sink) || !config.settings.creates_table());
        looked_at.map(|(sink, _)| sink.clone()).collect()
    }
}

impl Swapper {
    /// Runs what the files describe now. With `dry_run`, reports what that would change.
    ///
    /// # Errors
    /// [`ChangeRefused`]: nothing was changed.
    #[boxed]
    pub async fn reload(
        &self,
        config: PipelineConfig,
        dry_run: bool,
    ) -> Result<ReloadReport, ChangeRefused> {
        for _ in 0..TURNS_MAX {
            let beside = self.inner.setup.lock().await.clone();
            let before = beside.shared.revision();
            let made = self.inner.reload(&beside, &before, config.clone(), dry_run).await;
            let refused = match made {
                Ok(Some((report, stage))) => {
                    if let Some(stage) = stage {
                        let probation = config.reload.probation;
                        self.begin_probation(&before, &stage, report.number, probation);
                    }
                    return Ok(report);
                }
                // Another change came first: compare with what runs now.
                Ok(None) => continue,
                Err(failed) => failed,
            };
            return Err(self.inner.reload_refused(&before, refused, dry_run).await);
        }
        let before = self.inner.setup.lock().await.shared.revision();
        let failed = Step::Promote.failed(OTHERS_FIRST);
        Err(self.inner.reload_refused(&before, failed, dry_run).await)
    }
}

impl Inner {
    async fn reload_refused(
        &self,
        before: &Revision,
        failed: StepFailed,
        dry_run: bool,
    ) -> ChangeRefused {
        self.refused(ChangeKind::Reload, String::new(), before, failed, dry_run).await
    }

    /// Makes a reload. The whole flow is on one screen. Returns also the stage, if exactly one changes; `None`:
    /// another change came first.
    async fn reload(
        self: &Arc<Self>,
        beside: &Setup,
        before: &Arc<Revision>,
        config: PipelineConfig,
        dry_run: bool,
    ) -> Result<Option<(ReloadReport, Option<String>)>, StepFailed> {
        refuse_immutable(&beside.config, &config)?;
        let reloaded = self.validate(beside, before, config).await?;
        let changed = changed_stages(&reloaded.known, &reloaded.next.spec);
        let mut report = ReloadReport {
            number: None,
            revision: reloaded.next.id.to_string(),
            restarts_lanes: !reloaded.diff.sinks.is_empty() || !reloaded.diff.settings.is_empty(),
            diff: reloaded.diff.clone(),
            trials: Vec::new(),
            no_trials: Vec::new(),
            lanes: Vec::new(),
            waiting: Vec::new(),
            may_be_undone: false,
        };
        for stage in &changed {
            let (Ok(incumbent), Ok(fresh)) =
                (candidate::stage(before, stage), candidate::stage(&reloaded.next, stage))
            else {
                continue;
            };
            let gates = &reloaded.config.reload.gates;
            let sides = (&incumbent, &fresh);
            let (trial, no_trial) =
                candidate::try_out(&beside.shared, sides, Duration::ZERO, gates, &self.ends)
                    .await?;
            report.trials.extend(trial.map(|trial| (stage.to_string(), trial)));
            report.no_trials.extend(no_trial.map(|why| (stage.to_string(), why)));
        }
        let mut setup = self.setup.lock().await;
        if setup.changes != beside.changes {
            return Ok(None);
        }
        let answer_time = AnswerTime::begin();
        // Before anything is durable: the lanes would find it out only when they have ended, after the answer.
        let refused = roster::refuse_lagging(
            &setup.shared,
            &reloaded.config,
            &self.stream,
            answer_time.sinks_catch_up_by(),
        );
        refused.await.map_err(|error| Step::Check.failed(format!("{error:#}")))?;
        if dry_run {
            let sinks = reloaded.sinks_to_look_at(&setup);
            rehearse(&setup, &sinks, &reloaded.next, &answer_time, &self.ends).await?;
            return Ok(Some((report, None)));
        }
        if report.diff.is_empty() && reloaded.declared == setup.running.declared {
            // Nothing that a lane would notice: pins, limits of compilation and trials.
            (setup.config, setup.host) = (Arc::new(reloaded.config), reloaded.host);
            setup.changes += 1;
            return Ok(Some((report, None)));
        }
        // Only a change of a single stage can be rolled back and is watched.
        let single = match &changed[..] {
            [stage] if same_names(&before.spec, &reloaded.next.spec) => Some(stage.to_string()),
            _ => None,
        };
        let Reloaded { config, host, declared, next, components, sinks, .. } = reloaded;
        let change = NewChange {
            kind: ChangeKind::Reload,
            stage: single.clone().unwrap_or_default(),
            before: before.id.to_string(),
            after: next.id.to_string(),
        };
        let restart_with = report.restarts_lanes.then(|| {
            let revisions = RevisionStore::new(host.clone(), self.state.clone());
            let (config, next) = (config.clone(), next.clone());
            Arc::new(setup.shared.reshaped(config, next, sinks, revisions))
        });
        let stages_now: Vec<StageName> =
            config.stages.iter().map(|one| one.name.value.clone()).collect();
        let samples = restart_with.as_ref().unwrap_or(&setup.shared).samples.clone();
        let fingerprints = config.sink_fingerprints();
        let files = Some((Arc::new(config), host));
        let promotion =
            Promotion { next, components, declared, change, undoes: None, restart_with, files };
        // What the files describe now replaces what was swapped in before.
        let stages = changed.iter().map(ToString::to_string).collect();
        let promoted = self.promote(setup, promotion, answer_time).await?;
        if single.is_none()
            && let Err(error) = self.changes.supersede(stages).await
        {
            tracing::warn!(
                %error,
                "failed to mark earlier swaps of these stages as replaced; the history shows them as in force"
            );
        }
        if let Err(error) = self.changes.note_sinks(fingerprints).await {
            tracing::warn!(
                %error,
                "failed to store the sinks' settings; redrives are refused until the next reload or start"
            );
        }
        samples.keep_only(&stages_now.iter().collect::<Vec<_>>());
        report.number = promoted.number;
        (report.lanes, report.waiting) = (promoted.lanes, promoted.waiting);
        report.may_be_undone = promoted.may_be_undone;
        Ok(Some((report, single)))
    }

    /// Loads and checks everything that the files name.
    async fn validate(
        &self,
        setup: &Setup,
        before: &Arc<Revision>,
        config: PipelineConfig,
    ) -> Result<Reloaded, StepFailed> {
        let backends = Backends::from_config(&config, &tokio::runtime::Handle::current());
        let backends = backends.map_err(|error| Step::Check.failed(error))?;
        let prepared = tokio::time::timeout(candidate::ANSWER_MAX, backends.prepare()).await;
        let prepared = prepared.map_err(|_| {
            let seconds = candidate::ANSWER_MAX.as_secs();
            Step::Check.failed(format!("the server of a lookup did not answer within {seconds} s"))
        });
        prepared?.map_err(|error| Step::Check.failed(error))?;
        let cache = setup.host.cache.with_limits(config.compile_limits());
        let host = PluginHost { backends, cache, ..setup.host.clone() };
        let (own, with, embedded) = (config.clone(), host.clone(), self.embedded_plugin);
        let (described, components) = candidate::blocking(Step::Compile, move || {
            Revision::from_config(&own, &with, &embedded).map_err(|error| error.render(false))
        })
        .await?;
        let declared = described.spec.clone();
        // A renamed sink does not drop what was swapped in.
        let running = setup.running.with_renamed(renamed(&config)).carried_over(&declared);
        let mut known = before.spec.clone();
        for (old, new) in renamed(&config) {
            known.rename_sink(old, new);
        }
        let next = match running == declared {
            true => described,
            false => {
                let setup = Setup { host: host.clone(), ..setup.clone() };
                candidate::load(&setup, before, running, described.plugins()).await?
            }
        };
        let sinks = self.sinks(setup, &config)?;
        let diff = ReloadDiff {
            stages: stage_lines(&known, &next.spec),
            sinks: sink_lines(&setup.config.sinks, &config.sinks),
            settings: setting_lines(&setup.config, &config),
        };
        let next = Arc::new(next);
        Ok(Reloaded { config, host, declared, known, next, components, sinks, diff })
    }

    /// Returns the sinks of a configuration. Unchanged sinks keep their connections.
    fn sinks(
        &self,
        setup: &Setup,
        config: &PipelineConfig,
    ) -> Result<Vec<Arc<dyn Sink>>, StepFailed> {
        let built = (self.build_sinks)(config).map_err(|error| Step::Check.failed(error))?;
        let kept = |fresh: Arc<dyn Sink>, own: &SinkConfig| {
            let known = setup.config.sinks.iter().zip(&setup.shared.sinks);
            let mut known = known.filter(|(known, _)| same_sink(known, own));
            known.next().map_or(fresh, |(_, sink)| sink.clone())
        };
        Ok(built.into_iter().zip(&config.sinks).map(|(fresh, own)| kept(fresh, own)).collect())
    }
}

/// Returns the old and new names of renamed sinks.
fn renamed(config: &PipelineConfig) -> impl Iterator<Item = (&SinkName, &SinkName)> {
    let sinks = config.sinks.iter();
    sinks.filter_map(|sink| Some((&sink.renamed_from.as_ref()?.value, &sink.name.value)))
}

/// Whether two tables describe one sink in the same way.
fn same_sink(one: &SinkConfig, two: &SinkConfig) -> bool {
    one.name.value == two.name.value
        && one.fingerprint_json == two.fingerprint_json
        // Variables may have changed since, such as the password of a server.
        && *one.settings == *two.settings
}

/// Refuses what a running process cannot change, with the reason.
fn refuse_immutable(old: &PipelineConfig, new: &PipelineConfig) -> Result<(), StepFailed> {
    let refuse = |what: &str, why: &str| {
        let file = new.file.path.display();
        Err(Step::Fetch
            .failed(format!("{file}: {what} cannot change while the pipeline runs: {why}")))
    };
    if old.name != new.name {
        return refuse(
            "[pipeline] name",
            "positions are stored under it; run the pipeline with the other name as a process of its own",
        );
    }
    if old.state_dir != new.state_dir {
        return refuse("[pipeline] state_dir", "the lock and the positions are in it; restart");
    }
    if source_shown(old) != source_shown(new) {
        return refuse("[source]", "lanes are reading from it; restart");
    }
    if old.reload.watch != new.reload.watch {
        return refuse(
            "[reload] watch",
            "whether files are watched is decided at the start; restart",
        );
    }
    if old.admin != new.admin || old.intake != new.intake {
        return refuse("[admin] and [intake]", "their ports are open; restart");
    }
    if old.timing.http != new.timing.http {
        let keys = "http_head, http_body and http_idle under [timing]";
        return refuse(keys, "the ports are open; restart");
    }
    if old.timing != new.timing {
        return refuse("[timing]", "the source, the sinks and the lanes already use it; restart");
    }
    let dead_letters = |config: &PipelineConfig| {
        config
            .dead_letter_sinks
            .iter()
            .map(|sink| sink.fingerprint_json.clone())
            .collect::<Vec<_>>()
    };
    if dead_letters(old) != dead_letters(new) {
        return refuse(
            "[dead_letters] sinks",
            "they are copied by a pipeline of their own; restart",
        );
    }
    Ok(())
}

/// Returns a text of the source's settings, without their places in the file.
fn source_shown(config: &PipelineConfig) -> String {
    let batch = config.source.batch;
    match &config.source.kind {
        SourceKind::File(file) => format!("{file:?} {batch:?}"),
        SourceKind::Kinesis(kinesis) => {
            let KinesisConfig {
                stream,
                server,
                start,
                on_lost_records,
                create,
                reader,
                records_per_call_max,
                poll_interval,
            } = kinesis;
            format!(
                "{:?} {server:?} {start:?} {on_lost_records:?} {create:?} {reader:?} \
                 {records_per_call_max} {poll_interval:?} {batch:?}",
                stream.value
            )
        }
    }
}

/// Returns the stages that both have and that differ.
fn changed_stages(old: &RevisionSpec, new: &RevisionSpec) -> Vec<StageName> {
    let changed =
        new.stages.iter().filter(|stage| old.stage(&stage.name).is_some_and(|old| old != *stage));
    changed.map(|stage| stage.name.clone()).collect()
}

fn same_names(old: &RevisionSpec, new: &RevisionSpec) -> bool {
    let names = |spec: &RevisionSpec| {
        spec.stages.iter().map(|stage| stage.name.clone()).collect::<Vec<_>>()
    };
    names(old) == names(new)
}

fn stage_lines(old: &RevisionSpec, new: &RevisionSpec) -> Vec<String> {
    let mut lines = Vec::new();
    for stage in old.stages.iter().filter(|stage| new.stage(&stage.name).is_none()) {
        lines.push(format!("- stage {}", stage.name));
    }
    for stage in &new.stages {
        let Some(was) = old.stage(&stage.name) else {
            lines.push(format!("+ stage {} ({})", stage.name, &stage.digest[..12]));
            continue;
        };
        let changes = was.changes_to(stage);
        if !changes.is_empty() {
            lines.push(format!("~ stage {}: {}", stage.name, changes.join(", ")));
        }
    }
    let stays = |spec: &RevisionSpec, other: &RevisionSpec| {
        let stays = spec.stages.iter().filter(|stage| other.stage(&stage.name).is_some());
        stays.map(|stage| stage.name.to_string()).collect::<Vec<_>>()
    };
    if stays(old, new) != stays(new, old) {
        lines.push(format!("~ order of stages: {}", stays(new, old).join(" → ")));
    }
    if old.source_sinks != new.source_sinks || old.source_format != new.source_format {
        lines.push("~ routes or format of the source".into());
    }
    lines
}

fn sink_lines(old: &[SinkConfig], new: &[SinkConfig]) -> Vec<String> {
    let find = |sinks: &[SinkConfig], name: &SinkName| {
        sinks.iter().position(|sink| sink.name.value == *name)
    };
    // `renamed_from` stays in the file after the sink has its new name.
    let was_called = |sink: &SinkConfig| {
        let was = &sink.renamed_from.as_ref()?.value;
        find(old, was).filter(|_| find(old, &sink.name.value).is_none())
    };
    let renamed: Vec<usize> = new.iter().filter_map(was_called).collect();
    let gone = old
        .iter()
        .enumerate()
        .filter(|(at, sink)| find(new, &sink.name.value).is_none() && !renamed.contains(at));
    let mut lines: Vec<_> = gone.map(|(_, sink)| format!("- sink {}", sink.name.value)).collect();
    for sink in new {
        let name = &sink.name.value;
        match (find(old, name), was_called(sink)) {
            (None, None) => lines.push(format!("+ sink {name}")),
            (None, Some(at)) => {
                lines.push(format!("~ sink {}: renamed to {name}", old[at].name.value))
            }
            (Some(at), _) if !same_sink(&old[at], sink) => lines.push(format!("~ sink {name}")),
            (Some(_), _) => {}
        }
    }
    lines
}

fn setting_lines(old: &PipelineConfig, new: &PipelineConfig) -> Vec<String> {
    let mut lines = Vec::new();
    let mut note = |name: &str, old: String, new: String| {
        if old != new {
            lines.push(format!("~ {name}: {old} → {new}"));
        }
    };
    note("buffer", old.buffer_bytes_max.to_string(), new.buffer_bytes_max.to_string());
    note("rejected", format!("{:?}", old.rejected_max), format!("{:?}", new.rejected_max));
    let dead_letters = |config: &PipelineConfig| match config.dead_letters_bytes_max {
        Some(bytes) => bytes.to_string(),
        None => "the default".to_owned(),
    };
    note("dead_letters.bytes", dead_letters(old), dead_letters(new));
    let mismatch = |config: &PipelineConfig| format!("{:?}", config.on_position_mismatch);
    note("on_position_mismatch", mismatch(old), mismatch(new));
    let samples = |config: &PipelineConfig| format!("{:?}", config.reload.samples);
    note("reload.trial", samples(old), samples(new));
    // Without their places in the file, and without secrets.
    let same_lookup = |(one, two): (&LookupConfig, &LookupConfig)| {
        one.name.value == two.name.value
            && one.query.value == two.query.value
            && (one.timeout, one.cache) == (two.timeout, two.cache)
            && one.source == two.source
    };
    if old.lookups.len() != new.lookups.len()
        || !old.lookups.iter().zip(&new.lookups).all(same_lookup)
    {
        lines.push("~ lookups".into());
    }
    let hosts = |config: &PipelineConfig| {
        let stages = config.stages.iter();
        stages.map(|stage| (stage.name.value.clone(), stage.http_hosts.clone())).collect::<Vec<_>>()
    };
    let of_both = |(name, _): &(StageName, _)| old.stages.iter().any(|own| own.name.value == *name);
    if hosts(old) != hosts(new).into_iter().filter(of_both).collect::<Vec<_>>() {
        lines.push("~ hosts of http".into());
    }
    lines
}
