//! A candidate, from its bytes to a validated revision. Nothing that runs is changed here.
//!
//! The exception is `check_tables`, the last check before a promotion: a sink that will get other rows learns that, and
//! may create its table. A check that fails afterwards, and a rehearsal, call `prepare_as_before`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::trial::{SHADOW_PAUSE, Trial, TrialReport};
use super::{Component, Inner, Setup, Step, StepFailed};
use crate::lane::Shared;
use crate::stage::{LoadedStage, Revision};
use shardmill_config::{Capability, Gates, PipelineConfig};
use shardmill_core::record::{Digest, SinkName, StageName};
use shardmill_core::sink::Sink;
use shardmill_plugin::Plugin;
use shardmill_state::{CanarySpec, RevisionSpec};

/// Digits of a digest that name a component: fewer might match several by chance.
const DIGEST_DIGITS_MIN: usize = 6;

/// Time for which a change waits for the answer of a sink or a lookup, because somebody waits for the change.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(8);
/// Time in any case for telling the sinks again what they get now.
const REMEMBER_MIN: Duration = Duration::from_secs(1);

impl Inner {
    /// Returns the candidate's bytes, and a name for messages.
    pub(super) async fn fetch(&self, component: &Component) -> Result<(String, Bytes), StepFailed> {
        let digits = match component {
            Component::Bytes { name, bytes } => return Ok((name.clone(), bytes.clone())),
            Component::Kept(digits) => digits.to_ascii_lowercase(),
        };
        let digits = digits.strip_prefix("sha256:").unwrap_or(&digits).to_owned();
        let is_digest = digits.len() >= DIGEST_DIGITS_MIN
            && digits.chars().all(|digit| digit.is_ascii_hexdigit());
        if !is_digest {
            let cause = format!(
                "not a valid component: {digits:?}; expected a file, or at least the first {DIGEST_DIGITS_MIN} \
                 digits of a digest"
            );
            return Err(Step::Fetch.failed(cause));
        }
        let kept = self.state.components(digits.clone()).await;
        match kept.map_err(|error| Step::Fetch.failed(error))?.as_slice() {
            [(digest, bytes)] => {
                Ok((format!("component {}", &digest[..12]), Bytes::from(bytes.clone())))
            }
            [] => Err(Step::Fetch.failed(format!(
                "unknown component {digits}…: it is not stored, or no longer; give its file (see `shardmill \
                 plugin history`)"
            ))),
            several => Err(Step::Fetch.failed(format!(
                "ambiguous digest {digits}…: it matches {} components; give more digits",
                several.len()
            ))),
        }
    }
}

/// Returns a stage of a revision.
pub(super) fn stage(revision: &Revision, name: &StageName) -> Result<LoadedStage, StepFailed> {
    let found = revision.stages.iter().find(|stage| stage.name == *name);
    found.cloned().ok_or_else(|| {
        let names: Vec<&str> = revision.stages.iter().map(|stage| stage.name.as_str()).collect();
        let help = shardmill_config::suggest(name.as_str(), "the stages are", &names);
        Step::Fetch.failed(format!("unknown stage {name}: {help}"))
    })
}

/// Refuses a component other than the one that the configuration pins.
pub(super) fn check_pin(
    config: &PipelineConfig,
    stage: &StageName,
    digest: &Digest,
) -> Result<(), StepFailed> {
    let own = config.stages.iter().find(|own| own.name.value == *stage);
    match own.and_then(|own| own.sha256.as_ref()) {
        Some(expected) if expected.value != digest.as_str() => Err(Step::Pin.failed(format!(
            "{}: expected the pinned digest {} of stage {stage}, found {digest}; change the pin and reload",
            config.file.place(&expected.span),
            expected.value
        ))),
        _ => Ok(()),
    }
}

/// Compiles the candidate within its stage's limits.
pub(super) async fn compile(
    setup: &Setup,
    stage: &StageName,
    name: &str,
    bytes: &Bytes,
) -> Result<Plugin, StepFailed> {
    let own = setup.config.stages.iter().find(|own| own.name.value == *stage);
    let limits = own.map(|own| own.compile_limits).unwrap_or_default();
    let (host, name, bytes) = (setup.host.clone(), name.to_owned(), bytes.clone());
    blocking(Step::Compile, move || {
        Plugin::load(&host.engine, &host.cache.with_limits(limits), &name, &bytes)
    })
    .await
}

/// Returns the specification with another component for a stage, or with a canary beside it.
pub(super) fn replaced(
    spec: &RevisionSpec,
    stage: &StageName,
    digest: &Digest,
    canary_percent: Option<u8>,
) -> RevisionSpec {
    let mut spec = spec.clone();
    for own in spec.stages.iter_mut().filter(|own| own.name == *stage) {
        own.canary = canary_percent
            .map(|percent| CanarySpec { digest: digest.to_string(), percent })
            .filter(|canary| canary.digest != own.digest);
        if canary_percent.is_none() {
            own.digest = digest.to_string();
        }
    }
    spec
}

/// Checks that a revision sends rows to the configured sinks only, and to each of them. An earlier revision may name
/// a sink that a reload has removed since, or lack one that was added: rows would be missing without any message.
pub(super) fn check_bindings(
    config: &PipelineConfig,
    spec: &RevisionSpec,
) -> Result<(), StepFailed> {
    let routes = spec.stages.iter().flat_map(|stage| stage.routes.values().flatten());
    let bound: BTreeSet<&SinkName> = routes.chain(&spec.source_sinks).collect();
    let configured: BTreeSet<&SinkName> =
        config.sinks.iter().map(|sink| &sink.name.value).collect();
    let cause = match (bound.difference(&configured).next(), configured.difference(&bound).next()) {
        (None, None) => return Ok(()),
        (Some(gone), _) => format!(
            "the earlier revision sends rows to sink {gone}, which is missing from the configuration"
        ),
        (None, Some(new)) => format!(
            "the earlier revision sends no rows to sink {new}, which the configuration has now"
        ),
    };
    Err(Step::Check.failed(format!(
        "{cause}; undo the change in the file, with its sinks, and run `shardmill reload`"
    )))
}

/// Checks the rows of each sink against its table as it is now, also for sinks whose rows do not change: a table may
/// have changed since, and a restart would refuse it. A sink whose rows change may create its table here, and
/// remembers what it will get, so this is the last step before a promotion.
///
/// On the way back (`is_way_back`) to what ran before, a failure of a sink whose rows do not change is only a
/// warning: a rollback must not depend on a server that cannot be reached.
///
/// All sinks together have until `answer_by`: somebody waits, and a locked table delays each check of it.
pub(super) async fn check_tables(
    shared: &Shared,
    sinks: &[Arc<dyn Sink>],
    (before, next): (&Revision, &Revision),
    is_way_back: bool,
    answer_by: tokio::time::Instant,
) -> Result<(), StepFailed> {
    let is_unchanged = |sink: &Arc<dyn Sink>| {
        is_known(shared, sink) && next.routes_to(sink.name()) == before.routes_to(sink.name())
    };
    // Sinks that must answer come first: on the way back, one that only gets a warning may take all of the time.
    let (unchanged, changed): (Vec<_>, Vec<_>) = sinks.iter().cloned().partition(is_unchanged);
    let begun = Instant::now();
    for (place, sink) in changed.iter().chain(&unchanged).enumerate() {
        let is_unchanged = is_unchanged(sink);
        let routes = next.routes_to(sink.name());
        let look = async {
            match is_unchanged {
                // A table that was moved away for a while is not created again.
                true => sink.check(&routes).await.map(drop),
                false => sink.prepare(&routes).await,
            }
        };
        let asked = Instant::now();
        let refused = match tokio::time::timeout_at(answer_by, look).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => {
                // The sink before may have taken nearly all of the time.
                let before = match place {
                    0 => String::new(),
                    _ => format!(
                        " (of {:.1} s for all sinks together)",
                        begun.elapsed().as_secs_f64()
                    ),
                };
                format!(
                    "sink {} did not answer within {:.1} s{before}: its table is locked, or its server does \
                     not answer; nothing was changed; free it, then try again",
                    sink.name(),
                    asked.elapsed().as_secs_f64(),
                )
            }
        };
        if is_unchanged && is_way_back {
            tracing::warn!(cause = refused, "the earlier version is restored nevertheless");
            continue;
        }
        prepare_as_before(shared, &changed, (before, next), answer_by).await;
        return Err(Step::Check.failed(refused));
    }
    Ok(())
}

/// Whether a sink is one of the running ones.
fn is_known(shared: &Shared, sink: &Arc<dyn Sink>) -> bool {
    shared.sinks.iter().any(|known| Arc::ptr_eq(known, sink))
}

/// Prepares those of `sinks` that were prepared for `next` again for what runs. The other sinks still expect that, and
/// one of them may have a locked table, which would be waited for in vain.
pub(super) async fn prepare_as_before(
    shared: &Shared,
    sinks: &[Arc<dyn Sink>],
    (before, next): (&Revision, &Revision),
    answer_by: tokio::time::Instant,
) {
    // It worked before. If it fails now, the sink's next commit reports that.
    let restored = sinks.iter().filter(|sink| is_known(shared, sink)).map(|known| async {
        let routes = before.routes_to(known.name());
        if routes != next.routes_to(known.name()) {
            let _ = known.prepare(&routes).await;
        }
    });
    let end = answer_by.max(tokio::time::Instant::now() + REMEMBER_MIN);
    let _ = tokio::time::timeout_at(end, futures::future::join_all(restored)).await;
}

/// Loads a revision, with the given plugins and those that ran before. Configures each stage, and checks imports
/// against grants, formats and columns against its neighbours.
pub(super) async fn load(
    setup: &Setup,
    before: &Arc<Revision>,
    spec: RevisionSpec,
    fresh: HashMap<String, Plugin>,
) -> Result<Revision, StepFailed> {
    let mut plugins = before.plugins();
    plugins.extend(fresh);
    let missing = spec.digests().filter(|digest| !plugins.contains_key(*digest));
    for digest in missing.map(str::to_owned).collect::<Vec<_>>() {
        let plugin = setup.shared.revisions.plugin(&digest).await;
        let plugin = plugin.map_err(|error| Step::Fetch.failed(format!("{error:#}")))?;
        plugins.insert(digest, plugin);
    }
    let (host, stream) = (setup.host.clone(), setup.config.source.stream_name());
    let before = before.clone();
    blocking(Step::Check, move || Revision::rebuilt(spec, &plugins, &host, &stream, &before)).await
}

/// Runs the candidate on recent inputs of the stage, or says why that is impossible.
pub(super) async fn try_out(
    shared: &Shared,
    (incumbent, candidate): (&LoadedStage, &LoadedStage),
    shadow: Duration,
    gates: &Gates,
    stop: &CancellationToken,
) -> Result<(Option<TrialReport>, Option<String>), StepFailed> {
    for (side, who) in [(candidate, "it"), (incumbent, "the incumbent")] {
        if side.services.http.is_some() && side.plugin.capabilities.contains(&Capability::Http) {
            let why = format!("{who} imports http: a trial would send its requests again");
            return Ok((None, Some(why)));
        }
    }
    let mut trial = Trial::new((incumbent, candidate), shadow, &shared.config.timing, stop);
    let shadow_end = Instant::now() + shadow;
    loop {
        let samples = shared.samples.clone();
        let pass = move || {
            trial.pass(&samples);
            Ok::<_, std::convert::Infallible>(trial)
        };
        trial = blocking(Step::Trial, pass).await?;
        if trial.is_over() || Instant::now() >= shadow_end {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(SHADOW_PAUSE.min(shadow)) => {}
            () = stop.cancelled() => {}
        }
    }
    let report = trial.finish();
    match report.refusal(gates) {
        None => Ok((Some(report), None)),
        Some(cause) => Err(StepFailed { step: Step::Trial, cause, trial: Some(Box::new(report)) }),
    }
}

/// Runs blocking work off the async threads.
pub(super) async fn blocking<T: Send + 'static, E: std::fmt::Display + Send + 'static>(
    step: Step,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, StepFailed> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(step.failed(error)),
        Err(panic) => Err(step.failed(panic)),
    }
}
