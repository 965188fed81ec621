//! Watches the pipeline's file and its plugins' files, and reloads what has changed.
//!
//! Files are polled. A file that is replaced by a rename, or a folder whose link is changed (as Kubernetes does),
//! gives no event on the path that was watched. A file counts once it has stopped changing, so that a file which is
//! still being written is not loaded in part.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Swapper;
use shardmill_config::PipelineConfig;

/// Interval at which the files are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Consecutive checks that must find the files unchanged before they are loaded.
const STABLE_POLLS: u32 = 3;

/// Attributes that distinguish one state of a file from another.
#[derive(Clone, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    /// Device, inode, bytes, seconds and nanoseconds of the last change; `None`: the file is missing.
    about: Option<(u64, u64, u64, i64, i64)>,
}

impl Stamp {
    fn of(path: &Path) -> Self {
        let about = std::fs::metadata(path).ok();
        let about = about.map(|it| (it.dev(), it.ino(), it.len(), it.mtime(), it.mtime_nsec()));
        Self { path: path.to_owned(), about }
    }
}

/// Returns the stamps of a pipeline's files.
fn stamps(config: &PipelineConfig) -> Vec<Stamp> {
    let plugins = config.stages.iter().map(|stage| stage.plugin.value.as_path());
    plugins.chain([config.file.path.as_path()]).map(Stamp::of).collect()
}

/// Reloads whenever the files have changed and are stable, until `stop`. A refused reload is logged, and tried again
/// when the files change again.
pub async fn watch_files(
    swapper: Swapper,
    mut config: PipelineConfig,
    read_config: impl Fn() -> anyhow::Result<PipelineConfig> + Send,
    stop: CancellationToken,
) {
    let mut loaded = stamps(&config);
    let mut last = loaded.clone();
    let mut still = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
        let now = stamps(&config);
        still = if now == last { still + 1 } else { 0 };
        last = now;
        if still < STABLE_POLLS || last == loaded {
            continue;
        }
        loaded = last.clone();
        match read_config() {
            Ok(fresh) => {
                // The configuration may name other files now.
                config = fresh.clone();
                (loaded, last) = (stamps(&config), stamps(&config));
                match swapper.reload(fresh, false).await {
                    Ok(report) if report.number.is_some() => {
                        let changed: Vec<&str> = report.diff.lines().collect();
                        let changed = changed.join("; ");
                        match report.may_be_undone {
                            false => {
                                tracing::warn!(changed, "the files have changed: reloaded");
                            }
                            true => tracing::warn!(
                                changed,
                                "the files have changed: stored, but not in force yet; it may still be undone \
                                 until all lanes have restarted"
                            ),
                        }
                    }
                    Ok(_) => {}
                    Err(refused) => tracing::error!(%refused, "the files have changed"),
                }
            }
            Err(error) => {
                let text = shardmill_config::error_text(&error);
                tracing::error!(
                    error = text,
                    "the pipeline's file has changed and is invalid; the running configuration stays"
                );
            }
        }
    }
}
