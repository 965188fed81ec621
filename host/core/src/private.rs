//! Folders and files that only this user can reach: the state of pipelines, locks, compiled code, exports.
//!
//! Other users of the machine may have rights in the folders above the state. A user who can write there can replace
//! the record of what runs; one who can read there sees payloads. So a state folder is made for its owner alone, and
//! checked before use, together with the folders above it up to a mount. [`judge`] decides; this module asks the file
//! system.

mod judge;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::ops::Deref;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Component, Path, PathBuf};

pub use self::judge::Reach;
pub use self::judge::Trusted;
use self::judge::{BEYOND_OWNER, FileSystem, Judge, Me, Own, PathStep, StepKind};

/// Mode of new folders.
const FOLDER_MODE: u32 = 0o700;
/// Mode of new files.
const FILE_MODE: u32 = 0o600;
/// Highest number of links on the way to a folder: the limit of the kernel.
const LINKS_MAX: u32 = 40;
/// Longest text of a lock, in bytes: it contains a process id.
const LOCK_BYTES_MAX: u64 = 32;

/// Largest file by which processes find each other, in bytes: it contains an address and a token.
const OWN_BYTES_MAX: u64 = 64 << 10;

/// Option that turns off the checks of state folders.
pub(crate) const TRUST_OPTION: &str = "--trust-state-dir";

/// A place that others can reach, or that cannot be made or inspected.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// Another user can change what lies there.
    #[error(
        "refused to use {folder}: expected a folder that only this user (uid {uid}) can change, but {reach}; \
         {}, or accept it with {TRUST_OPTION}", .reach.way_out()
    )]
    Reached {
        /// The folder.
        folder: String,
        /// User of this process.
        uid: u32,
        /// How another user can reach it.
        reach: Reach,
    },
    /// The system does not allow it to be made or inspected.
    #[error(
        "failed to {action} {path}: {cause}; give this user access to it, free the disk, or set another `state_dir`"
    )]
    Unusable {
        /// `make`, `look at`.
        action: &'static str,
        /// Place.
        path: String,
        /// Error of the system.
        cause: io::Error,
    },
}

fn unusable(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrivateError {
    let path = path.display().to_string();
    move |cause| PrivateError::Unusable { action, path, cause }
}

/// Folder of the states of pipelines, and whether the reach of other users is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
    is_trusted: bool,
}

impl From<PathBuf> for StateDir {
    fn from(path: PathBuf) -> Self {
        Self { path, is_trusted: false }
    }
}

impl Deref for StateDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl PartialEq<PathBuf> for StateDir {
    fn eq(&self, other: &PathBuf) -> bool {
        self.path == *other
    }
}

impl PartialEq<Path> for StateDir {
    fn eq(&self, other: &Path) -> bool {
        self.path == other
    }
}

impl PartialEq<&Path> for StateDir {
    fn eq(&self, other: &&Path) -> bool {
        self.path == *other
    }
}

impl AsRef<Path> for StateDir {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl StateDir {
    /// Sets whether the folder is trusted: its checks are skipped, whoever can reach it.
    #[must_use]
    pub fn trusted(self, is_trusted: bool) -> Self {
        Self { is_trusted, ..self }
    }

    /// Returns another folder that is checked in the same way.
    #[must_use]
    pub fn at(&self, path: PathBuf) -> Self {
        Self { path, is_trusted: self.is_trusted }
    }

    /// Checks the folder of a pipeline, or the existing part of the way to it. Changes nothing.
    ///
    /// # Errors
    /// [`PrivateError`].
    pub fn check(&self, name: &str) -> Result<(), PrivateError> {
        let folder = absolute(&self.join(name))?;
        if self.is_trusted {
            return Ok(());
        }
        let (steps, is_there) = steps(&folder)?;
        checked(&folder, &steps, is_there).map(drop)
    }

    /// Makes the folder of a pipeline, and missing folders above it, for this user alone. Checks it, and removes the
    /// rights of others in a folder of this user.
    ///
    /// # Errors
    /// [`PrivateError`].
    pub fn make(&self, name: &str) -> Result<PathBuf, PrivateError> {
        let folder = absolute(&self.join(name))?;
        // A link to a missing folder gets its own message; making the folder would fail with "File exists". And nothing
        // is made where a link of another user leads.
        let (way, is_there) = steps(&folder)?;
        if !self.is_trusted && !is_there {
            verdict(&folder, &way, is_there).0?;
        }
        make_folders(&folder).map_err(unusable("make", &folder))?;
        let (steps, is_there) = steps(&folder)?;
        let own = match self.is_trusted {
            false => checked(&folder, &steps, is_there)?,
            // Others may rely on their rights there.
            true => Own::Fits,
        };
        // The real folder: the mode of a link means nothing.
        if own == Own::Wide
            && let Some(real) = steps.last()
        {
            tighten(&real.path);
        }
        Ok(self.join(name))
    }
}

/// Judges a folder by the steps to it, and warns if the file system keeps no owners or modes.
fn checked(folder: &Path, steps: &[PathStep], is_there: bool) -> Result<Own, PrivateError> {
    let (verdict, is_loose) = verdict(folder, steps, is_there);
    if verdict.is_ok() && is_loose {
        tracing::warn!(
            folder = %folder.display(),
            "the file system keeps no owners or modes of files, so other users who can reach it can change what \
             runs; use a state_dir on another file system"
        );
    }
    verdict
}

/// Judges a folder by the steps to it. Also returns whether its file system keeps no owners or modes; this is probed
/// only if the first verdict is a refusal.
fn verdict(folder: &Path, steps: &[PathStep], is_there: bool) -> (Result<Own, PrivateError>, bool) {
    let mut judge = Judge { me: Me::now(), loose: None };
    let mut verdict = judged(&judge, folder, steps, is_there);
    if verdict.is_err()
        && let Some(deepest) = steps.last()
        && let Some(loose) = probe(&deepest.path, &judge.me)
    {
        judge.loose = Some(loose);
        verdict = judged(&judge, folder, steps, is_there);
    }
    let verdict = verdict.map_err(|reach| PrivateError::Reached {
        folder: folder.display().to_string(),
        uid: judge.me.uid,
        reach,
    });
    (verdict, judge.loose.is_some())
}

fn judged(judge: &Judge, folder: &Path, steps: &[PathStep], is_there: bool) -> Result<Own, Reach> {
    let Some(last) = steps.last().filter(|_| is_there) else {
        return judge.reach_above(steps).map_or(Ok(Own::Fits), Err);
    };
    let own = judge.own_at(steps);
    if let Own::Refused(reach) = own {
        return Err(reach);
    }
    // While others could write, they may have left an entry under one of our names.
    match reached_entry(judge, folder, last) {
        Some(reach) => Err(reach),
        None => Ok(own),
    }
}

/// Finds out how another user can reach an entry of a folder: by owning the entry, or through the target of a link.
/// `real` is the folder without links.
fn reached_entry(judge: &Judge, folder: &Path, real: &PathStep) -> Option<Reach> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.into_iter().find_map(|entry| {
        // Deleted in the meantime: harmless.
        let about = entry.metadata().ok()?;
        let uid = about.uid();
        if !judge.trusts(uid, real.device) {
            return Some(Reach::Owner { path: entry.path(), uid });
        }
        // A link to nothing is reported by whoever opens it.
        let (mut steps, _) = about.is_symlink().then(|| steps(&entry.path()).ok())??;
        // The folder itself was judged before, and may be tightened next.
        steps.retain(|step| step.path != real.path);
        judge.reach_above(&steps)
    })
}

/// Removes the rights of others in a folder or file of this user, and logs it.
pub fn tighten(path: &Path) {
    let Ok(about) = fs::symlink_metadata(path) else { return };
    let mode = about.mode() & 0o777;
    if about.is_symlink() || about.uid() != Me::now().uid || mode & BEYOND_OWNER == 0 {
        return;
    }
    let tight = mode & !BEYOND_OWNER;
    let changed = fs::set_permissions(path, Permissions::from_mode(tight))
        .and_then(|()| Ok(fs::symlink_metadata(path)?.mode() & BEYOND_OWNER == 0));
    let path = path.display();
    match changed {
        Ok(true) => tracing::warn!(
            "{path} was open to other users (mode {mode:04o}); now only this user can access it (mode {tight:04o})"
        ),
        Ok(false) => tracing::warn!(
            "the file system of {path} keeps no modes: other users may reach it (mode {mode:04o})"
        ),
        Err(error) => tracing::warn!(
            "{path} is open to other users (mode {mode:04o}), and that cannot be changed: {error}"
        ),
    }
}

/// Removes the rights of others in a folder or file of this user, also if links of this user lead to it.
pub fn tighten_linked(path: &Path) {
    let Ok(path) = absolute(path) else { return };
    let Ok((steps, true)) = steps(&path) else { return };
    let judge = Judge { me: Me::now(), loose: None };
    // A link of another user could lead to any folder of this user.
    let is_led_by_others = steps
        .iter()
        .any(|step| step.kind == StepKind::Link && !judge.trusts(step.uid, step.device));
    let Some(real) = steps.last().filter(|_| !is_led_by_others) else { return };
    // Not `/`, nor another mount that has other uses.
    if real.path == path || real.kind != StepKind::Mount {
        tighten(&real.path);
    }
}

/// Makes a folder and missing folders above it, for this user alone.
///
/// # Errors
/// Error of the system.
pub fn make_folders(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)
}

/// Makes an empty file for this user alone, unless it exists. Removes the rights of others in an existing one and in
/// the files of SQLite beside it.
///
/// The file must not be opened here if it may be a database: closing it would release the locks that this process has
/// on it through other descriptors (POSIX).
pub fn make_database(path: &Path) {
    if !path.exists() {
        let folder = path.parent().unwrap_or(Path::new("."));
        let made = tempfile::NamedTempFile::new_in(folder)
            .and_then(|file| Ok(file.into_temp_path().persist_noclobber(path)?));
        // An error is ignored: opening the database reports it.
        drop(made);
    }
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let mut file = path.as_os_str().to_owned();
        file.push(suffix);
        tighten_linked(Path::new(&file));
    }
}

/// Opens a lock file, and makes it if needed, for this user alone. Links are not followed: a link could lead to any
/// file of this user, which the text of the lock would overwrite.
///
/// # Errors
/// Error of the system, or that the file is not a lock.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
    let file = open_itself(path, &mut options)?;
    if file.metadata()?.len() > LOCK_BYTES_MAX {
        return Err(not_a_lock());
    }
    tighten(path);
    Ok(file)
}

/// Opens a lock to see whether a process has it.
///
/// # Errors
/// Error of the system, or that it is a link.
pub fn open_lock_to_look(path: &Path) -> io::Result<File> {
    open_itself(path, OpenOptions::new().read(true))
}

/// Opens a regular file; a link is refused.
fn open_itself(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // Without O_NONBLOCK, opening a named pipe in its place would block this thread forever.
    let opened = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other(
            "expected a file, found a symbolic link, which is not followed here; delete the link",
        ),
        _ => error,
    })?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("expected a file, found something else; move it away")),
    }
}

fn not_a_lock() -> io::Error {
    io::Error::other(
        "expected a lock, which holds the number of a process, found something else; move the file away",
    )
}

/// Writes the id of this process into a lock that it has. Any other content is kept: the file may be another file of
/// this user under a second name (a hard link).
///
/// # Errors
/// Error of the system, or that the file is not a lock.
pub fn sign_lock(mut file: &File) -> io::Result<()> {
    check_lock_text(file)?;
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// Checks that a file can be opened as a lock and signed. Does not make, change or lock it.
///
/// # Errors
/// Error of the system, also if the file is missing, or that it is not a lock.
pub fn check_lock(path: &Path) -> io::Result<()> {
    check_lock_text(&open_itself(path, OpenOptions::new().read(true).write(true))?)
}

fn check_lock_text(mut file: &File) -> io::Result<()> {
    let mut text = String::new();
    file.rewind()?;
    let read = file.take(LOCK_BYTES_MAX + 1).read_to_string(&mut text);
    let is_number = text.trim().bytes().all(|byte| byte.is_ascii_digit());
    match read.is_ok() && is_number && text.len() as u64 <= LOCK_BYTES_MAX {
        true => Ok(()),
        false => Err(not_a_lock()),
    }
}

/// Opens a file for an export of a state (dead letters). A new file is made for this user alone; an existing one is
/// emptied, and the rights of others in it are removed. Pipes and devices are used as they are.
///
/// # Errors
/// Error of the system, or that others could read what is written.
pub fn create_export(path: &Path) -> io::Result<File> {
    let mut new = OpenOptions::new();
    match new.write(true).create_new(true).mode(FILE_MODE).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => return made,
    }
    let me = Me::now();
    let entry = fs::symlink_metadata(path)?;
    if entry.is_symlink() && entry.uid() != me.uid && entry.uid() != 0 {
        let message = format!("it is a symbolic link of user {}; delete it", entry.uid());
        return Err(io::Error::other(message));
    }
    let file = OpenOptions::new().write(true).open(path)?;
    let about = file.metadata()?;
    if about.is_file() {
        if about.uid() != me.uid {
            let message =
                format!("it belongs to user {}, who could read it; name another file", about.uid());
            return Err(io::Error::other(message));
        }
        if about.mode() & BEYOND_OWNER != 0 {
            file.set_permissions(Permissions::from_mode(about.mode() & 0o777 & !BEYOND_OWNER))?;
        }
        file.set_len(0)?;
    }
    Ok(file)
}

/// Returns options that make a file for this user alone. An existing file keeps its mode.
pub fn new_file_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(FILE_MODE);
    options
}

/// Opens a file of this user to read it. Refuses a link and a file of another user.
///
/// # Errors
/// Error of the system, or the owner.
pub fn open_own(path: &Path) -> io::Result<File> {
    let file = open_itself(path, OpenOptions::new().read(true))?;
    let (owner, uid) = (file.metadata()?.uid(), Me::now().uid);
    match owner == uid {
        true => Ok(file),
        false => Err(io::Error::other(format!(
            "expected a file of user {uid}, found one of user {owner}"
        ))),
    }
}

/// Reads a file that nobody else can have written. By such files, processes of one user find each other; a file of
/// another user would send commands, and their contents, to a port of that user.
///
/// # Errors
/// Error of the system, or that another user may have written it.
pub fn read_own(path: &Path) -> io::Result<Vec<u8>> {
    read_opened(&open_itself(path, OpenOptions::new().read(true))?, path)
}

/// Does the same for an open file.
pub fn read_opened(file: &File, path: &Path) -> io::Result<Vec<u8>> {
    let about = file.metadata()?;
    let (owner, mode, device) = (about.uid(), about.mode() & 0o777, about.dev());
    let mut judge = Judge { me: Me::now(), loose: None };
    let is_ours = judge.is_ours(owner, mode, device) || {
        judge.loose = path.parent().and_then(|folder| probe(folder, &judge.me));
        judge.is_ours(owner, mode, device)
    };
    if !is_ours {
        return Err(io::Error::other(format!(
            "expected a file that user {} owns and nobody else can write, found one of user {owner}, mode \
             {mode:04o}; remove it, and restart the process that wrote it",
            judge.me.uid
        )));
    }
    let mut bytes = Vec::new();
    file.take(OWN_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file for this user alone (0600). It appears whole or not at all.
///
/// # Errors
/// Error of the system.
pub fn write_own(path: &Path, bytes: &[u8]) -> io::Result<()> {
    put_own(path, bytes, |_| Ok(())).map(drop)
}

/// Writes a file like [`write_own`], and locks it while the returned file is open. By [`open_published`], others find
/// out whether this process still runs.
pub fn publish_own(path: &Path, bytes: &[u8]) -> io::Result<File> {
    // Locked before it is in place, so that nobody finds it without its lock.
    put_own(path, bytes, File::lock)
}

fn put_own(
    path: &Path,
    bytes: &[u8],
    before: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<File> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut draft = tempfile::NamedTempFile::new_in(folder)?;
    draft.write_all(bytes)?;
    draft.as_file().sync_all()?;
    before(draft.as_file())?;
    draft.persist(path).map_err(|error| error.error)
}

/// Distinguishes a published file from the one that replaced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMark {
    device: u64,
    inode: u64,
    /// Time of the write, because inodes are reused.
    written: (i64, i64),
}

/// Opens a file of [`publish_own`]; `None`: the process that wrote it has ended.
///
/// The lock is on the file itself. The lock of a separate file could already belong to the next process, while the
/// address is still that of the previous one.
///
/// # Errors
/// Error of the system, or that it is a link.
pub fn open_published(path: &Path) -> io::Result<Option<(File, FileMark)>> {
    let file = open_itself(path, OpenOptions::new().read(true))?;
    if !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
        return Ok(None);
    }
    let about = file.metadata()?;
    let written = (about.mtime(), about.mtime_nsec());
    Ok(Some((file, FileMark { device: about.dev(), inode: about.ino(), written })))
}

/// Whether others have rights in an open file: everybody, or a group that this process is not in.
pub fn is_open_to_others(file: &File) -> io::Result<bool> {
    let about = file.metadata()?;
    Ok(Judge { me: Me::now(), loose: None }.is_open_to_others(about.gid(), about.mode()))
}

/// Finds out how another user could have put or changed a file, or what lies in a folder. Links are followed; folders
/// above are not checked. Groups count as other users, except this process's own group and root's.
///
/// # Errors
/// Error of the system.
pub fn reach_of(path: &Path, trusted: Trusted) -> io::Result<Option<Reach>> {
    let about = fs::metadata(path)?;
    // In a sticky folder, everybody can put a file that did not exist. So the sticky bit does not count here.
    let step = PathStep { mode: about.mode() & 0o777, ..step(path, &about, StepKind::Folder) };
    Ok(judge_of_programs(trusted).reach(&step))
}

/// Path without links, and how another user can replace what lies there.
pub struct Way {
    /// The path without links.
    pub real: PathBuf,
    /// How another user can replace it; `None`: nobody can.
    pub reach: Option<Reach>,
}

/// Follows a path from `/` to its target, and judges each folder and each link on the way, and the target itself.
///
/// # Errors
/// Error of the system, also if nothing exists there.
pub fn way_to(path: &Path, trusted: Trusted) -> io::Result<Way> {
    let looked_at = |error| match error {
        PrivateError::Unusable { cause, .. } => cause,
        reached @ PrivateError::Reached { .. } => io::Error::other(reached.to_string()),
    };
    let (steps, is_there) = steps(&std::path::absolute(path)?).map_err(looked_at)?;
    let last = steps.last().filter(|_| is_there).ok_or(ErrorKind::NotFound)?;
    let reach = judge_of_programs(trusted).reach_above(&steps);
    Ok(Way { real: last.path.clone(), reach })
}

/// Makes the judge of programs that this process runs, and of what its tools follow. Only the own group of this process
/// is trusted; several users may share its other groups.
fn judge_of_programs(trusted: Trusted) -> Judge {
    Judge { me: Me { gids: [effective_gid()].into(), trusted, ..Me::now() }, loose: None }
}

/// Returns the user id of this process.
pub fn uid() -> u32 {
    // SAFETY: a question without arguments that cannot fail.
    unsafe { libc::geteuid() }
}

fn effective_gid() -> u32 {
    // SAFETY: as above.
    unsafe { libc::getegid() }
}

impl Me {
    fn now() -> Self {
        let mut gids = vec![0; 1 << 16];
        // SAFETY: the call writes at most the given number of values, and the vector has that length.
        let count = unsafe { libc::getgroups(gids.len() as libc::c_int, gids.as_mut_ptr()) };
        gids.truncate(usize::try_from(count).unwrap_or(0));
        gids.push(effective_gid());
        let trusted = Trusted::Nobody;
        Self { uid: uid(), gids: gids.into_iter().collect(), unmapped: unmapped(), trusted }
    }
}

/// Returns the owner that the kernel shows for users that this user namespace does not map; `None`: all are mapped.
fn unmapped() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    let count = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
    if map.lines().filter_map(count).sum::<u64>() >= u64::from(u32::MAX) {
        return None;
    }
    fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok()
}

/// Makes a file in a folder that was refused, without a name if possible, to find out whether the file system keeps
/// owners and modes. Returns `None` if it does, or if no file can be made.
fn probe(folder: &Path, me: &Me) -> Option<FileSystem> {
    let mut unnamed = OpenOptions::new();
    #[cfg(target_os = "linux")]
    unnamed.write(true).mode(FILE_MODE).custom_flags(libc::O_TMPFILE);
    let about = match unnamed.open(folder) {
        Ok(file) => file.metadata().ok()?,
        // Not every file system supports unnamed files.
        Err(_) => tempfile::NamedTempFile::new_in(folder).ok()?.as_file().metadata().ok()?,
    };
    let keeps_modes = about.mode() & BEYOND_OWNER == 0;
    let found = FileSystem { device: about.dev(), new_owner: about.uid(), keeps_modes };
    (!keeps_modes || found.new_owner != me.uid).then_some(found)
}

fn absolute(path: &Path) -> Result<PathBuf, PrivateError> {
    std::path::absolute(path).map_err(unusable("look at", path))
}

/// Returns the steps from `/` to a folder, with all links on the way, as far as they exist; and whether they end at the
/// folder. If so, the last step is the folder itself, without links.
///
/// After a link or a `..`, the way starts again at `/`. So all folders above the new place count, also those that an
/// earlier mount made irrelevant.
fn steps(folder: &Path) -> Result<(Vec<PathStep>, bool), PrivateError> {
    let mounts = mounts();
    let mut at = PathBuf::from("/");
    let mut ahead: Vec<PathBuf> = components(folder);
    let mut links_left = LINKS_MAX;
    // Number of names left when the first link was found. While more are left, the next name belongs to a link's
    // target.
    let mut after_link = usize::MAX;
    let about = fs::symlink_metadata(&at).map_err(unusable("look at", &at))?;
    let root = step(&at, &about, StepKind::Mount);
    let mut steps = vec![root.clone()];
    while let Some(next) = ahead.pop() {
        let is_up = next.as_os_str() == "..";
        let path = if is_up { at.clone() } else { at.join(&next) };
        let about = match fs::symlink_metadata(&path) {
            Ok(about) => about,
            Err(error) if error.kind() == ErrorKind::NotFound && ahead.len() >= after_link => {
                let cause =
                    "it is missing, and a symbolic link leads to it (make it, or delete the link)";
                return Err(unusable("look at", &path)(io::Error::new(error.kind(), cause)));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((steps, false)),
            Err(error) => return Err(unusable("look at", &path)(error)),
        };
        if is_up {
            steps.push(step(&path, &about, StepKind::Up));
            at.pop();
            ahead.extend(components(&at));
        } else if about.is_symlink() {
            steps.push(step(&path, &about, StepKind::Link));
            links_left = links_left.checked_sub(1).ok_or_else(|| {
                unusable("look at", &path)(io::Error::from_raw_os_error(libc::ELOOP))
            })?;
            let target = fs::read_link(&path).map_err(unusable("look at", &path))?;
            after_link = after_link.min(ahead.len());
            ahead.extend(components(&target));
            if target.is_relative() {
                ahead.extend(components(&at));
            }
        } else {
            let above = fs::symlink_metadata(&at).map_err(unusable("look at", &at))?;
            let is_mount = about.dev() != above.dev() || mounts.contains(&path);
            let kind = if is_mount { StepKind::Mount } else { StepKind::Folder };
            steps.push(step(&path, &about, kind));
            at = path;
            continue;
        }
        at = PathBuf::from("/");
        steps.push(root.clone());
    }
    Ok((steps, true))
}

/// Splits a path into names, the last one first.
fn components(path: &Path) -> Vec<PathBuf> {
    let names = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.collect()
}

fn step(path: &Path, about: &fs::Metadata, kind: StepKind) -> PathStep {
    let (uid, gid, mode) = (about.uid(), about.gid(), about.mode());
    PathStep { path: path.to_owned(), kind, uid, gid, mode, device: about.dev() }
}

/// Lists where file systems are mounted. A bind mount may be on the same device as the folder above it, so a comparison
/// of devices does not find it.
fn mounts() -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    let listed = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let points = listed.split(|byte| *byte == b'\n').filter_map(|line| {
        let point = line.split(|byte| *byte == b' ').nth(4)?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(unescaped(point))))
    });
    points.collect()
}

/// Decodes the octal escapes in the path of a mount, such as those of spaces.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let code = after.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_14_a_lock_follows_no_link_and_keeps_what_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        fs::write(&target, "precious\n").unwrap();
        let (link, hard, pipe) =
            (folder.path().join("link"), folder.path().join("hard"), folder.path().join("pipe"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        fs::hard_link(&target, &hard).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&link, &hard, &pipe] {
            assert!(check_lock(path).is_err(), "{}", path.display());
            let signed = open_lock(path).and_then(|file| sign_lock(&file));
            assert!(signed.is_err(), "{}", path.display());
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), "precious\n");

        let lock = folder.path().join("lock");
        assert_eq!(check_lock(&lock).unwrap_err().kind(), ErrorKind::NotFound);
        for _ in 0..2 {
            sign_lock(&open_lock(&lock).unwrap()).unwrap();
            assert_eq!(fs::read_to_string(&lock).unwrap(), format!("{}\n", std::process::id()));
            assert_eq!(fs::metadata(&lock).unwrap().mode() & 0o777, 0o600);
            check_lock(&lock).unwrap();
        }
    }

    #[test]
    fn wall_14_an_export_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new"), folder.path().join("old"));
        fs::write(&old, "longer than what comes").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        for path in [&new, &old] {
            create_export(path).unwrap().write_all(b"letters").unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), "letters");
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600, "{}", path.display());
        }
        create_export(Path::new("/dev/null")).unwrap().write_all(b"letters").unwrap();
    }

    #[test]
    fn wall_15_a_file_is_its_owners_and_a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("file"), folder.path().join("link"));
        write_own(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read_own(&path).unwrap(), b"one");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read_own(&link).unwrap_err().to_string().contains("link"));
        let missing = read_own(&folder.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        fs::set_permissions(&path, Permissions::from_mode(0o622)).unwrap();
        assert!(read_own(&path).unwrap_err().to_string().contains("mode 0622"));
    }

    #[test]
    fn wall_15_a_published_file_is_found_while_its_process_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("address");
        assert_eq!(open_published(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let first = publish_own(&path, b"one").unwrap();
        let (file, first_mark) = open_published(&path).unwrap().expect("found");
        assert_eq!(read_opened(&file, &path).unwrap(), b"one");
        assert_eq!(open_published(&path).unwrap().expect("found").1, first_mark);
        // The next process has started, and the previous one has not ended yet.
        let second = publish_own(&path, b"two").unwrap();
        drop(first);
        let (file, second_mark) = open_published(&path).unwrap().expect("found");
        assert_eq!(read_opened(&file, &path).unwrap(), b"two");
        assert_ne!(first_mark, second_mark);
        drop(second);
        assert!(open_published(&path).unwrap().is_none());
    }

    #[test]
    fn the_way_to_a_folder_has_all_its_links() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        fs::create_dir_all(real.join("a/b")).unwrap();
        for (target, link) in [("../a", "up"), (".", "same"), ("b/..", "back"), ("up/b", "far")] {
            std::os::unix::fs::symlink(target, real.join("a").join(link)).unwrap();
        }
        let (found, is_there) = steps(&real.join("a/up/b/missing")).unwrap();
        assert!(!is_there);
        let tail: Vec<_> = found.iter().rev().take(2).map(|step| (&step.path, step.kind)).collect();
        assert_eq!(tail[0], (&real.join("a/b"), StepKind::Folder));
        assert_eq!(tail[1], (&real.join("a"), StepKind::Folder));
        let is_found = |path: &str, kind: StepKind| {
            found.iter().any(|step| step.path == real.join(path) && step.kind == kind)
        };
        assert!(is_found("a/up", StepKind::Link) && is_found("a", StepKind::Up));
        // The last step is the folder that is used, whatever links lead to it.
        for (link, target) in [("up", "a"), ("same", "a"), ("back", "a"), ("far", "a/b")] {
            let (found, is_there) = steps(&real.join("a").join(link)).unwrap();
            let last = found.last().map(|step| (step.path.clone(), step.kind));
            assert!(is_there, "{link}");
            assert_eq!(last, Some((real.join(target), StepKind::Folder)), "{link}");
        }
        std::os::unix::fs::symlink("nowhere", real.join("dangling")).unwrap();
        for path in ["dangling", "dangling/b"] {
            let error = steps(&real.join(path)).unwrap_err().to_string();
            assert!(error.contains("nowhere: it is missing"), "{error}");
        }
        std::os::unix::fs::symlink("loop", real.join("loop")).unwrap();
        assert!(steps(&real.join("loop")).is_err());
    }

    #[test]
    fn a_mounts_path_is_read_with_its_spaces() {
        assert_eq!(unescaped(br"/my\040disk\134x"), br"/my disk\x");
        assert_eq!(unescaped(br"\9"), br"\9");
    }
}
