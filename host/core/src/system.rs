//! Limits that the system sets for this process. They are checked before they are reached, because a failure at a limit
//! shows up far from its cause.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Address space that the linear memory of a sandbox reserves. It is not memory in use: only pages that a plugin
/// touches are.
const MEMORY_BYTES: u64 = (4 << 30) + (64 << 20);
/// Address space that a lane needs in addition: the stacks of its threads.
const LANE_BYTES: u64 = 8 << 20;
/// Address space that the rest of the process may still need.
const SPARE_BYTES: u64 = 512 << 20;
/// Open files of a lane without its sinks: its connection to the stream, and one more while that is renewed.
const LANE_FILES: u64 = 2;
/// Open files of each sink of a lane: a connection, or a database and its log.
const SINK_FILES: u64 = 2;
/// Files that the rest of the process may still open.
const SPARE_FILES: u64 = 16;
/// Share of its open files that a process may use for connections of one port, as a divisor. All ports together leave
/// most files to the pipeline.
const PORT_SHARE: u64 = 8;
/// The same for the embedded stream, whose clients are lanes.
const STREAM_SHARE: u64 = 2;
/// Connections that a port keeps however low the limit of open files is.
const PORT_CONNECTIONS_MIN: usize = 4;
/// Files that a start opens before the shards are known: state, sinks, ports, and the pipes of a compiler.
const START_FILES: u64 = 32;

/// A limit of the process is too low for the pipeline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Address space.
    #[error(
        "expected an address space of at least {} MiB for {what}, found a limit of {} MiB (ulimit -v): each \
         memory of a plugin reserves {} MiB, of which only what it touches is memory; raise or remove \
         the limit, and bound memory by `ulimit -m`, a cgroup or `limits.memory` instead",
        .needed >> 20, .limit >> 20, MEMORY_BYTES >> 20
    )]
    AddressSpace {
        /// Purpose.
        what: String,
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are allowed.
        limit: u64,
    },
    /// Open files.
    #[error(
        "expected a limit of at least {needed} open files for {what}, found {limit} (ulimit -n): raise it, in \
         a systemd unit by LimitNOFILE"
    )]
    OpenFiles {
        /// Purpose.
        what: String,
        /// Number that is needed.
        needed: u64,
        /// Number that is allowed.
        limit: u64,
    },
    /// Memory mappings.
    #[error(
        "{used} of the {limit} mappings of memory that the system gives a process are in use, and each memory \
         of a plugin takes some: raise it (sysctl vm.max_map_count), or read fewer shards in one process"
    )]
    Mappings {
        /// Number in use.
        used: u64,
        /// Number that is allowed.
        limit: u64,
    },
}

impl LimitError {
    /// Finds the limit that caused a failure to start a sandbox with this number of memories: address space or
    /// mappings. Returns `None` for another cause.
    pub fn of_refusal(cause: &str, memories: usize) -> Option<Self> {
        if !is_out_of_memory(cause) {
            return None;
        }
        match address_limit() {
            Some(limit) => {
                let more =
                    (memories as u64).saturating_mul(MEMORY_BYTES).saturating_add(SPARE_BYTES);
                let needed = Usage::now().address_bytes.saturating_add(more);
                Some(Self::AddressSpace { what: "one more sandbox".into(), needed, limit })
            }
            None => Self::of_mappings(mappings_limit()?, mappings_used()?),
        }
    }

    /// Returns the error for the limit of mappings if 90 % of it is used.
    fn of_mappings(limit: u64, used: u64) -> Option<Self> {
        (used.saturating_mul(10) >= limit.saturating_mul(9))
            .then_some(Self::Mappings { used, limit })
    }
}

/// Returns the number of mappings that a process may have, if the system says so.
fn mappings_limit() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()
}

/// Returns the number of mappings that this process has.
fn mappings_used() -> Option<u64> {
    Some(std::fs::read_to_string("/proc/self/maps").ok()?.lines().count() as u64)
}

/// Whether a text reports that the system refused memory. `std::io::Error` writes the number of the error into it.
fn is_out_of_memory(cause: &str) -> bool {
    cause.contains(&format!("(os error {})", libc::ENOMEM))
}

/// Resources that the lanes of a pipeline need from the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Number of lanes.
    pub lanes: usize,
    /// Stages, including canaries: each lane has a sandbox for each.
    pub stages: usize,
    /// Linear memories of these sandboxes, in each lane. A component of JavaScript has three.
    pub memories: usize,
    /// Sinks of each lane.
    pub sinks: usize,
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lanes, stages, memories, sinks } = self;
        write!(
            f,
            "{lanes} shards with {stages} stages, {memories} memories of plugins and {sinks} sinks each"
        )
    }
}

impl Needs {
    /// Checks that all lanes can run.
    ///
    /// # Errors
    /// [`LimitError`], with what is needed.
    pub fn check(self) -> Result<(), LimitError> {
        let Usage { address_bytes, open_files } = Usage::now();
        let open_files = open_files + PortFiles::not_open();
        self.check_beside(address_bytes, open_files, address_limit(), files_limit())
    }

    fn check_beside(
        self,
        address_bytes: u64,
        open_files: u64,
        address_limit: Option<u64>,
        files_limit: Option<u64>,
    ) -> Result<(), LimitError> {
        let (lanes, memories, sinks) = (self.lanes as u64, self.memories as u64, self.sinks as u64);
        let lane_bytes = LANE_BYTES.saturating_add(memories.saturating_mul(MEMORY_BYTES));
        check_address(
            self.to_string(),
            address_bytes,
            lanes.saturating_mul(lane_bytes),
            address_limit,
        )?;
        let lane_files = LANE_FILES + sinks.saturating_mul(SINK_FILES);
        let needed = open_files + lanes.saturating_mul(lane_files) + SPARE_FILES;
        match files_limit {
            Some(limit) if limit < needed => {
                Err(LimitError::OpenFiles { what: self.to_string(), needed, limit })
            }
            _ => Ok(()),
        }
    }
}

/// Checks that a command can start: that one sandbox fits, and the files that are opened before those of lanes.
///
/// # Errors
/// [`LimitError`], with what is needed.
pub fn check_start() -> Result<(), LimitError> {
    let Usage { address_bytes, open_files } = Usage::now();
    check_address("one plugin".into(), address_bytes, MEMORY_BYTES, address_limit())?;
    let needed = open_files + START_FILES;
    match files_limit() {
        Some(limit) if limit < needed => {
            Err(LimitError::OpenFiles { what: "a start without a shard".into(), needed, limit })
        }
        _ => Ok(()),
    }
}

fn check_address(what: String, used: u64, more: u64, limit: Option<u64>) -> Result<(), LimitError> {
    let needed = used.saturating_add(more).saturating_add(SPARE_BYTES);
    match limit {
        Some(limit) if limit < needed => Err(LimitError::AddressSpace { what, needed, limit }),
        _ => Ok(()),
    }
}

/// Ignores SIGXFSZ. A write beyond the limit of the file size (`ulimit -f`) then fails with an error, as on a full
/// disk, and does not end the process without a message.
pub fn ignore_file_size_signal() {
    // SAFETY: sets the disposition of one signal, before other threads are started.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Returns the error of a process that could not start, with the limit that caused it if known.
pub fn cannot_begin(error: std::io::Error) -> anyhow::Error {
    match (error.raw_os_error(), files_limit()) {
        (Some(libc::EMFILE), Some(limit)) => {
            let what = "a start without a shard".into();
            LimitError::OpenFiles { what, needed: START_FILES + SPARE_FILES, limit }.into()
        }
        _ => error.into(),
    }
}

/// Raises the limit of open files as far as the system allows.
pub fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a structure that lives here. A refusal leaves the limit as it is.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0
            && limit.rlim_cur < limit.rlim_max
        {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Returns how many of the `wanted` connections a port may keep, so that most open files are left to the pipeline.
/// `is_beside_lanes` is false for the embedded stream only.
pub fn port_connections_max(wanted: usize, is_beside_lanes: bool) -> usize {
    share_of_files(wanted, files_limit(), if is_beside_lanes { PORT_SHARE } else { STREAM_SHARE })
}

fn share_of_files(wanted: usize, files_limit: Option<u64>, share: u64) -> usize {
    let share = files_limit.map(|limit| usize::try_from(limit / share).unwrap_or(usize::MAX));
    share.map_or(wanted, |share| wanted.min(share.max(PORT_CONNECTIONS_MIN)))
}

/// Files that the ports of this process may open as connections, and those that are open.
static PORT_FILES: AtomicU64 = AtomicU64::new(0);
static PORT_FILES_OPEN: AtomicU64 = AtomicU64::new(0);

/// File descriptors that are reserved for the connections of a port. Lanes start only if enough others are left.
pub struct PortFiles(u64);

impl PortFiles {
    /// Reserves this number.
    pub fn keep(connections: usize) -> Self {
        let kept = connections as u64;
        PORT_FILES.fetch_add(kept, Ordering::Relaxed);
        Self(kept)
    }

    /// Notes that one is used.
    pub fn opened(&self) {
        PORT_FILES_OPEN.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that one is no longer used.
    pub fn closed(&self) {
        PORT_FILES_OPEN.fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns the number of reserved descriptors that are not used.
    fn not_open() -> u64 {
        PORT_FILES.load(Ordering::Relaxed).saturating_sub(PORT_FILES_OPEN.load(Ordering::Relaxed))
    }
}

impl Drop for PortFiles {
    fn drop(&mut self) {
        PORT_FILES.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Returns the bytes of address space that this process may have; `None`: no limit.
pub fn address_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_AS)
}

fn files_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_NOFILE)
}

/// Type of the number of a limit.
#[cfg(target_env = "gnu")]
pub type Resource = libc::__rlimit_resource_t;
/// Type of the number of a limit.
#[cfg(not(target_env = "gnu"))]
pub(crate) type Resource = libc::c_int;

fn soft_limit(resource: Resource) -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes a structure that lives here.
    let found = unsafe { libc::getrlimit(resource, &raw mut limit) };
    (found == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Use of this process; 0 if the system does not say.
struct Usage {
    address_bytes: u64,
    open_files: u64,
}

impl Usage {
    fn now() -> Self {
        let pages = std::fs::read_to_string("/proc/self/statm").ok();
        let pages = pages.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        // SAFETY: a question about a constant of the system.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let address_bytes = pages.unwrap_or(0) * u64::try_from(page_bytes).unwrap_or(4_096);
        let open_files = std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64);
        Self { address_bytes, open_files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_03_ports_leave_most_open_files_to_the_pipeline() {
        for (wanted, limit, kept) in [
            (1_024, None, 1_024),
            (1_024, Some(1 << 20), 1_024),
            (1_024, Some(1_024), 128),
            (32, Some(1_024), 32),
            (1_024, Some(16), 4),
            (2, Some(16), 2),
        ] {
            assert_eq!(share_of_files(wanted, limit, PORT_SHARE), kept, "{wanted} of {limit:?}");
        }
    }

    const NEEDS: Needs = Needs { lanes: 8, stages: 3, memories: 5, sinks: 2 };
    const GIB: u64 = 1 << 30;

    #[test]
    fn fault_45_a_refusal_of_memory_is_known() {
        let error = std::io::Error::from_raw_os_error(libc::ENOMEM);
        assert!(is_out_of_memory(&error.to_string()), "{error}");
        assert!(!is_out_of_memory("unknown import"));
    }

    #[test]
    fn wall_11_mappings_that_are_used_up_are_named() {
        for (used, is_named) in [(100, false), (58_000, false), (59_000, true), (65_530, true)] {
            let found = LimitError::of_mappings(65_530, used);
            assert_eq!(found.is_some(), is_named, "{used}");
        }
        let text = LimitError::of_mappings(65_530, 65_000).map(|error| error.to_string());
        assert!(text.is_some_and(|text| text.contains("65000 of the 65530 mappings")));
    }

    #[test]
    fn fault_45_what_is_needed_is_what_is_used_and_what_the_lanes_add() {
        let needed_bytes = GIB + 8 * (5 * MEMORY_BYTES + LANE_BYTES) + SPARE_BYTES;
        let needed_files = 20 + 8 * (2 + 2 * 2) + 16;
        for (address, files, is_enough) in [
            (None, None, true),
            (Some(needed_bytes), Some(needed_files), true),
            (Some(needed_bytes - 1), None, false),
            (None, Some(needed_files - 1), false),
        ] {
            let checked = NEEDS.check_beside(GIB, 20, address, files);
            assert_eq!(checked.is_ok(), is_enough, "{address:?} {files:?}: {checked:?}");
        }
        let error = NEEDS.check_beside(GIB, 20, Some(4 * GIB), None).expect_err("too little");
        let text = error.to_string();
        assert!(
            text.contains("8 shards with 3 stages, 5 memories") && text.contains("4096 MiB"),
            "{text}"
        );
    }
}
