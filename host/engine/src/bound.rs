//! The bound on a process's memory: a formula of the configuration, compared with what the machine has.

use std::fmt;
use std::path::{Path, PathBuf};

use shardmill_config::{PipelineConfig, SinkConfig, StageLimits};
use shardmill_core::budget::READ_BYTES_MAX;
use shardmill_core::budget::ledger::{bytes_bound, encoded_bound, text};

/// The process itself: its code, the runtime's threads, compiled plugins, the state database.
const PROCESS_BYTES: usize = 100 << 20;
/// Copies of a batch that a lane has in hand: the records, the plugin's input, its answer, and the rows.
const BATCH_COPIES: usize = 4;

/// Copies of an answer while a payload is made again: as between two stages, and one kept for the next dead letter
/// of the record.
const REMADE_ANSWER_COPIES: usize = 4;
/// The largest record of a stream.
///
/// Source: API reference, PutRecord.
const RECORD_BYTES_MAX: usize = 10 << 20;
/// Copies of the record meanwhile: as stored, as it enters the stages, as packed, and one kept for the next dead
/// letter.
const REMADE_RECORD_COPIES: usize = 4;

/// Upper bound of the memory that a pipeline holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBound {
    /// Lanes that run at once.
    pub lanes: usize,
    /// Everything but plugins, in bytes.
    pub host_bytes: usize,
    /// Instances of plugins.
    pub instances: usize,
    /// Memory that they may have together, in bytes.
    pub plugin_bytes: usize,
}

impl MemoryBound {
    /// Computes the bound of a pipeline with this many lanes.
    ///
    /// | part | bytes |
    /// |---|---|
    /// | the process | 100 MiB |
    /// | the sinks' buffers | half of `buffer`, the larger of the other half and 256 KiB per lane, and 1 MiB per lane |
    /// | each sink that encodes rows early | the larger of half of `buffer` and 256 KiB per lane, and 4 MiB per lane |
    /// | what the readers of a stream read ahead, with the answers that they read | as the sinks' buffers |
    /// | one large answer of a stream | what 20 MiB of text hold while they are read: 37 MiB |
    /// | batches in hand | 4 × `batch.bytes` per lane |
    /// | answers in hand | the largest `limits.output`, at most `limits.memory`, per lane; × 3 for several stages |
    /// | one large request | the largest answer, once |
    /// | trials | `bytes` of `[reload.trial]` per stage |
    /// | the intake | `in_flight` |
    /// | lookups' caches | `bytes` of each |
    /// | copies of dead letters | as the sinks' buffers of one lane, with the sinks that encode rows early |
    /// | plugins | `limits.memory` per lane and stage |
    pub fn of(config: &PipelineConfig, lanes: usize) -> Self {
        let lanes = lanes.max(1);
        let buffers = bytes_bound(config.buffer_bytes_max, lanes);
        // An answer is counted as read-ahead before it is read, and one at a time may exceed that.
        let (read_ahead, large_read) = match config.source.kinesis() {
            Some(_) => (buffers, READ_BYTES_MAX),
            None => (0, 0),
        };
        let in_hand = lanes * BATCH_COPIES * config.source.batch.bytes_max;
        let limits = || config.stages.iter().map(|stage| &stage.limits);
        let large = limits().map(StageLimits::answer_bytes_max).max().unwrap_or_default();
        // Between two stages there are: the first one's answer, the same packed for the second, and the second one's
        // answer.
        let copies_of_answer = if config.stages.len() > 1 { 3 } else { 1 };
        let answers = large.saturating_mul(copies_of_answer).saturating_mul(lanes);
        let trials = config.reload.samples.bytes_max * config.stages.len();
        let intake = config.intake.as_ref().map_or(0, |intake| intake.in_flight_bytes_max);
        let lookups = config.lookups.iter().map(|lookup| lookup.cache.bytes_max).sum::<usize>();
        let encoded = |sinks: &[SinkConfig], lanes: usize| {
            let is_encoding = |sink: &&SinkConfig| sink.settings.encodes_early();
            let bound = encoded_bound(config.buffer_bytes_max, lanes);
            bound.saturating_mul(sinks.iter().filter(is_encoding).count())
        };
        let copies = match config.dead_letter_sinks.is_empty() {
            true => 0,
            false => {
                bytes_bound(config.buffer_bytes_max, 1) + encoded(&config.dead_letter_sinks, 1)
            }
        };
        let encoded = encoded(&config.sinks, lanes);
        let parts = [
            buffers, encoded, read_ahead, large_read, in_hand, answers, large, trials, intake,
            lookups, copies,
        ];
        let plugin_bytes = limits().map(|limits| limits.memory_bytes_max).sum::<usize>();
        Self {
            lanes,
            host_bytes: parts.into_iter().fold(PROCESS_BYTES, usize::saturating_add),
            instances: lanes * config.stages.len(),
            plugin_bytes: plugin_bytes.saturating_mul(lanes),
        }
    }

    /// Computes the bound of a redrive of dead letters whose payloads are made again, one at a time.
    ///
    /// | part | bytes |
    /// |---|---|
    /// | the stages before, started once more | `limits.memory` per stage |
    /// | their answers, and what they made of the dead letter's record | four times as an answer in hand |
    /// | the batch that a payload is in | 4 × the same |
    /// | the record | 4 × 10 MiB |
    pub fn with_remade_payloads(self, config: &PipelineConfig) -> Self {
        let limits = || config.stages.iter().map(|stage| &stage.limits);
        let memory_bytes = limits().map(|limits| limits.memory_bytes_max).sum::<usize>();
        // A payload is a part of an answer.
        let large = limits().map(StageLimits::answer_bytes_max).max().unwrap_or_default();
        let made = large.saturating_mul(REMADE_ANSWER_COPIES + BATCH_COPIES);
        let record = RECORD_BYTES_MAX * REMADE_RECORD_COPIES;
        Self {
            lanes: self.lanes,
            host_bytes: self.host_bytes.saturating_add(made).saturating_add(record),
            instances: self.instances + config.stages.len(),
            plugin_bytes: self.plugin_bytes.saturating_add(memory_bytes),
        }
    }

    /// Returns the bound, in bytes.
    pub(crate) fn total_bytes(&self) -> usize {
        self.host_bytes.saturating_add(self.plugin_bytes)
    }

    /// Returns a warning if the machine, or the control group of the process, has less memory.
    pub fn warning(&self, available: Option<&AvailableMemory>) -> Option<String> {
        let available = available.filter(|available| available.bytes < self.total_bytes())?;
        Some(format!(
            "memory may grow to {}, but {} has only {}: {self}; lower `buffer` under [pipeline] or `memory` \
             under [stage.limits], or give the process more memory",
            text(self.total_bytes()),
            available.of,
            text(available.bytes)
        ))
    }
}

impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lanes = if self.lanes == 1 { "1 lane".into() } else { format!("{} lanes", self.lanes) };
        write!(f, "at most {} with {lanes}", text(self.total_bytes()))?;
        match self.instances {
            0 => Ok(()),
            instances => write!(
                f,
                " ({} for the host, {} for {instances} plugin instance{})",
                text(self.host_bytes),
                text(self.plugin_bytes),
                if instances == 1 { "" } else { "s" }
            ),
        }
    }
}

/// Memory that a process can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AvailableMemory {
    /// The number of bytes.
    pub bytes: usize,
    /// Who has them, for messages.
    pub of: &'static str,
}

/// Returns the memory that this process can have: the machine's, or less where a control group limits it. `None`:
/// the system does not say.
pub fn memory_bytes_available() -> Option<AvailableMemory> {
    available_below(Path::new("/"))
}

/// Returns the same, with the system's files below `root`.
///
/// Source: proc(5), `/proc/meminfo`; cgroups(7), `/proc/PID/cgroup`; the kernel's "Control Group v2",
/// `memory.max`, and "Memory Resource Controller", `memory.limit_in_bytes`.
fn available_below(root: &Path) -> Option<AvailableMemory> {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).ok();
    let machine = meminfo.as_deref().and_then(total_of_meminfo);
    let machine = machine.map(|bytes| AvailableMemory { bytes, of: "the machine" });
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().flat_map(|line| limit_files(root, line));
    let limits = limits.filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    let group = limits.min().map(|bytes| AvailableMemory { bytes, of: "its control group" });
    machine.into_iter().chain(group).min_by_key(|available| available.bytes)
}

fn total_of_meminfo(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1 << 10)
}

/// Returns the files that limit a process's memory, by a line of its `/proc/self/cgroup`: those of its own group and
/// of all groups around it. In a container the path may be the host's; then only the root exists.
fn limit_files(root: &Path, line: &str) -> Vec<PathBuf> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next(), fields.next(), fields.next());
    let (mount, file) = match controllers {
        Some("") => ("sys/fs/cgroup", "memory.max"),
        Some(some) if some.split(',').any(|one| one == "memory") => {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let path = Path::new(path.unwrap_or_default().trim_start_matches('/'));
    path.ancestors().map(|group| root.join(mount).join(group).join(file)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde::Deserialize;
    use shardmill_config::reading::{Check, RawCommit, Spanned, Text};
    use shardmill_config::{
        CommitPolicy, Key, ReadSink, SharedParts, SinkBuildError, SinkContext, SinkSettings,
        SinkTable, SinkType, SinkTypes,
    };
    use shardmill_core::sink::Sink;

    use super::*;

    /// Sink types that matter only for their memory. They accept any key.
    const TYPES: SinkTypes = SinkTypes::new(&[
        &Stub { name: "discard", encodes_early: false },
        &Stub { name: "objects", encodes_early: true },
        &Stub { name: "sqlite", encodes_early: false },
        &Stub { name: "stdout", encodes_early: false },
    ]);

    #[derive(Clone, Debug, PartialEq)]
    struct Stub {
        name: &'static str,
        encodes_early: bool,
    }

    #[derive(Deserialize)]
    struct RawStub {
        name: Spanned<Text>,
        commit: Option<RawCommit>,
    }

    impl SinkType for Stub {
        fn name(&self) -> &'static str {
            self.name
        }

        fn about(&self) -> &'static str {
            "A stub."
        }

        fn keys(&self) -> &'static [Key] {
            &[]
        }

        fn commit_policy(&self) -> CommitPolicy {
            CommitPolicy::TABLE
        }

        fn read(&self, table: SinkTable<'_>, check: &mut Check) -> Option<ReadSink> {
            let raw: RawStub = table.shaped(check)?;
            Some(ReadSink::new(raw.name, raw.commit, Some(self.clone())))
        }
    }

    impl SinkSettings for Stub {
        fn destination(&self) -> Option<String> {
            None
        }

        fn is_exact(&self) -> bool {
            false
        }

        fn encodes_early(&self) -> bool {
            self.encodes_early
        }

        fn build(
            &self,
            _context: &SinkContext<'_>,
            _shared: &mut SharedParts,
        ) -> Result<Arc<dyn Sink>, SinkBuildError> {
            Err("a stub takes no rows".into())
        }
    }

    fn system(meminfo: &str, cgroup: &str, files: &[(&str, &str)]) -> Option<AvailableMemory> {
        let root = tempfile::tempdir().expect("a folder");
        let all = [("proc/meminfo", meminfo), ("proc/self/cgroup", cgroup)];
        for (path, text) in all.iter().chain(files) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        available_below(root.path())
    }

    #[test]
    fn fault_02_a_limit_of_any_group_around_the_process_counts() {
        const MEMINFO: &str = "MemTotal:       24684224 kB\nMemFree:        1 kB\n";
        let bytes = |found: Option<AvailableMemory>| found.map(|it| (it.bytes >> 20, it.of));
        let machine = Some((24_105, "the machine"));
        assert_eq!(bytes(system(MEMINFO, "0::/\n", &[])), machine);
        let unlimited = [("sys/fs/cgroup/a/b/memory.max", "max\n")];
        assert_eq!(bytes(system(MEMINFO, "0::/a/b\n", &unlimited)), machine);
        let outer = [unlimited[0], ("sys/fs/cgroup/a/memory.max", "536870912\n")];
        let limited = Some((512, "its control group"));
        assert_eq!(bytes(system(MEMINFO, "0::/a/b\n", &outer)), limited);
        // In a container, the process's own group is the root that it sees.
        let root = [("sys/fs/cgroup/memory.max", "536870912\n")];
        assert_eq!(bytes(system(MEMINFO, "0::/kubepods/x\n", &root)), limited);
        let old = [("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "536870912\n")];
        assert_eq!(bytes(system(MEMINFO, "4:cpu:/a\n3:memory,x:/a\n", &old)), limited);
        assert_eq!(system("", "", &[]), None);
    }

    #[test]
    fn wall_02_what_rows_become_counts_for_each_sink_that_encodes_them() {
        const MIB: usize = 1 << 20;
        let sink = |name: &str, rest: &str| format!("[[sink]]\nname = \"{name}\"\n{rest}\n");
        let bound = |sink: &str, lanes| {
            let text = format!(
                "[pipeline]\nname = \"cars\"\nbuffer = \"64 MiB\"\n\
                 [source]\ntype = \"file\"\npath = \"rows.txt\"\n\
                 [[stage]]\nname = \"route\"\nplugin = \"route.wasm\"\n\
                 routes = {{ all = [\"out\"] }}\n{sink}"
            );
            let config = shardmill_config::parse("pipeline.toml", &text, &TYPES, &|_| None);
            MemoryBound::of(&config.expect("a pipeline"), lanes).host_bytes
        };
        let plain = sink("out", "type = \"discard\"");
        let objects = sink("out", "type = \"objects\"\nurl = \"file:///out\"");
        let more = |lanes| bound(&objects, lanes) - bound(&plain, lanes);
        assert_eq!(more(1), 36 * MIB);
        assert_eq!(more(4), 48 * MIB);
        assert_eq!(more(1_000), 4_250 * MIB, "256 KiB and 4 MiB for each");
    }

    #[test]
    fn wall_02_one_large_answer_of_a_stream_counts_however_many_lanes_read() {
        let bound = |source: &str, lanes| {
            let text = format!(
                "[pipeline]\nname = \"cars\"\nbuffer = \"16 MiB\"\n[source]\n{source}\n\
                 [[sink]]\nname = \"out\"\ntype = \"discard\"\n"
            );
            let config = shardmill_config::parse("pipeline.toml", &text, &TYPES, &|_| None);
            MemoryBound::of(&config.expect("a pipeline"), lanes).host_bytes
        };
        let stream = "type = \"kinesis\"\nstream = \"s\"\nformat = \"application/json\"";
        let file = "type = \"file\"\npath = \"rows.txt\"\nformat = \"application/json\"";
        for (lanes, read_ahead_mib) in [(1, 17), (32, 48), (100, 133)] {
            let more = bound(stream, lanes) - bound(file, lanes);
            assert_eq!(more, (read_ahead_mib << 20) + READ_BYTES_MAX, "{lanes} lanes");
        }
        assert!(bound(stream, 32) < 270 << 20, "{} bytes with 32 lanes", bound(stream, 32));
    }

    #[test]
    fn wall_04_payloads_that_are_remade_count() {
        let bound = MemoryBound { lanes: 1, host_bytes: 300 << 20, instances: 0, plugin_bytes: 0 };
        let text = crate::assets::PIPELINE;
        let config = shardmill_config::parse("pipeline.toml", text, &TYPES, &|_| None);
        let config = config.expect("the pipeline of the root");
        let limits = config.stages.iter().map(|stage| stage.limits);
        let large = limits.map(|limits| limits.answer_bytes_max()).max().expect("a stage");
        let with_remade = bound.with_remade_payloads(&config);
        // The payload in its batch, the record, and the answer that it is made of.
        let least = bound.host_bytes + BATCH_COPIES * large + RECORD_BYTES_MAX + large;
        assert!(with_remade.host_bytes >= least, "{with_remade}");
        assert_eq!(with_remade.instances, config.stages.len());
        assert!(with_remade.plugin_bytes > 0, "{with_remade}");
    }

    #[test]
    fn fault_02_what_is_above_the_machine_is_warned_of() {
        let bound =
            MemoryBound { lanes: 5, host_bytes: 300 << 20, instances: 5, plugin_bytes: 1 << 30 };
        let of = "the machine";
        assert_eq!(bound.warning(Some(&AvailableMemory { bytes: 2 << 30, of })), None);
        assert_eq!(bound.warning(None), None);
        let said = bound.warning(Some(&AvailableMemory { bytes: 1 << 30, of })).expect("a warning");
        assert!(said.contains("1324 MiB, but the machine has only 1024 MiB"), "{said}");
        assert!(said.contains("5 lanes (300 MiB for the host, 1024 MiB for 5 plugin"), "{said}");
    }
}
