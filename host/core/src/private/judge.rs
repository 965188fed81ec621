//! Decides whether other users can reach a folder, from its owner and mode and those of the folders above it. Nothing
//! is looked up here.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

/// The administrator: trusted everywhere, because nothing can be hidden from root.
const ROOT: u32 = 0;
/// Everybody may write.
const OTHERS_WRITE: u32 = 0o002;
/// The group may write.
const GROUP_WRITES: u32 = 0o020;
/// Only their owners may rename and remove entries (sticky bit).
const STICKY: u32 = 0o1000;
/// All rights of users who are neither the owner nor in the group.
const EVERYBODY: u32 = 0o007;
/// All rights of everybody except the owner.
pub(super) const BEYOND_OWNER: u32 = 0o077;

/// User of this process.
#[derive(Clone, Debug, Default)]
pub(super) struct Me {
    pub uid: u32,
    pub gids: BTreeSet<u32>,
    /// Owner that the kernel shows for users that this user namespace does not map, if there are any.
    pub unmapped: Option<u32>,
    /// Who else may change what lies there.
    pub trusted: Trusted,
}

/// Other users, besides root, whose rights are accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trusted {
    /// Nobody else.
    #[default]
    Nobody,
    /// The owner of what this process was asked to work on.
    User(u32),
    /// The owner of each place, and its group: this user has named the place.
    Owners,
}

/// How one file system keeps rights, as a probe file shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSystem {
    pub device: u64,
    /// Owner of a new file of this process.
    pub new_owner: u32,
    /// Whether a new file has the requested mode.
    pub keeps_modes: bool,
}

/// Folder or link on the way from `/` to a folder.
#[derive(Clone, Debug)]
pub(super) struct PathStep {
    pub path: PathBuf,
    pub kind: StepKind,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub device: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepKind {
    Folder,
    /// Folder at which a file system is mounted. Whoever mounted it decided who may use it.
    Mount,
    /// Symbolic link, followed by the steps from `/` to its target.
    Link,
    /// Folder that a `..` leaves, followed by the steps from `/` to the folder above it.
    Up,
}

/// How another user can reach what lies at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// By owning it.
    Owner {
        /// Place.
        path: PathBuf,
        /// Owner.
        uid: u32,
    },
    /// By the write permission of everybody.
    Everybody {
        /// Place.
        path: PathBuf,
        /// Mode.
        mode: u32,
    },
    /// By the write permission of a group that this process is not in.
    Group {
        /// Place.
        path: PathBuf,
        /// Group.
        gid: u32,
        /// Mode.
        mode: u32,
    },
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner { path, uid } => write!(f, "{} belongs to user {uid}", path.display()),
            Self::Everybody { path, mode } => write!(
                f,
                "every user may replace what lies in {} (mode {mode:04o}, no sticky bit)",
                path.display()
            ),
            Self::Group { path, gid, mode } => write!(
                f,
                "group {gid}, which this process is not in, may replace what lies in {} (mode {mode:04o}, \
                 no sticky bit)",
                path.display()
            ),
        }
    }
}

impl Reach {
    /// Returns a part of a sentence that says how to remove the reach.
    pub(super) fn way_out(&self) -> String {
        match self {
            Self::Owner { path, .. } => format!(
                "run as that user, or move {} away or give it to this user (chown)",
                path.display()
            ),
            Self::Everybody { path, .. } => {
                format!("run `chmod o-w {}`, or set `state_dir` elsewhere", path.display())
            }
            Self::Group { path, .. } => {
                format!("run `chmod g-w {}`, or set `state_dir` elsewhere", path.display())
            }
        }
    }
}

/// Rules by which the steps to a folder are judged.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    pub me: Me,
    /// File system without owners or modes, if the folder lies on one.
    pub loose: Option<FileSystem>,
}

impl Judge {
    /// Whether an owner is trusted: this user, root, a user that was named as trusted, or the owner that the kernel or
    /// the file system shows in place of one that it does not keep.
    pub fn trusts(&self, uid: u32, device: u64) -> bool {
        let shown_as = self.loose.filter(|it| it.device == device).map(|it| it.new_owner);
        let is_trusted = match self.me.trusted {
            Trusted::Nobody => false,
            Trusted::User(trusted) => uid == trusted,
            Trusted::Owners => true,
        };
        is_trusted
            || uid == self.me.uid
            || uid == ROOT
            || self.me.unmapped == Some(uid)
            || shown_as == Some(uid)
    }

    /// Whether nobody else can have written a file of this owner and mode. Root manages the pipelines of all users, and
    /// reads what their owners wrote.
    pub fn is_ours(&self, uid: u32, mode: u32, device: u64) -> bool {
        let is_trusted = self.trusts(uid, device) || self.me.uid == ROOT;
        is_trusted && (!self.keeps_modes(device) || mode & (OTHERS_WRITE | GROUP_WRITES) == 0)
    }

    /// Whether others have rights in a file, apart from the groups of this process and root's.
    pub fn is_open_to_others(&self, gid: u32, mode: u32) -> bool {
        let beyond = if self.is_own_group(gid) { EVERYBODY } else { BEYOND_OWNER };
        mode & beyond != 0
    }

    /// Kubernetes gives volumes to a group of the process (fsGroup), OpenShift gives images to root's group, and many
    /// systems give each user a group that may write.
    fn is_own_group(&self, gid: u32) -> bool {
        gid == 0 || self.me.gids.contains(&gid)
    }

    fn keeps_modes(&self, device: u64) -> bool {
        self.loose.is_none_or(|it| it.device != device || it.keeps_modes)
    }

    /// Returns how another user can change what lies at a step.
    pub fn reach(&self, step: &PathStep) -> Option<Reach> {
        let path = step.path.clone();
        if !self.trusts(step.uid, step.device) {
            return Some(Reach::Owner { path, uid: step.uid });
        }
        // The mode of a link means nothing, and in a sticky folder users can change only their own entries.
        if step.kind == StepKind::Link || step.mode & STICKY != 0 || !self.keeps_modes(step.device)
        {
            return None;
        }
        let mode = step.mode & 0o7777;
        if step.mode & OTHERS_WRITE != 0 {
            return Some(Reach::Everybody { path, mode });
        }
        let is_trusted = self.me.trusted == Trusted::Owners || self.is_own_group(step.gid);
        let is_reached = step.mode & GROUP_WRITES != 0 && !is_trusted;
        is_reached.then_some(Reach::Group { path, gid: step.gid, mode })
    }

    /// Returns how another user can replace what lies below these steps, from `/` on.
    ///
    /// A mount and the folders above it are not judged: whoever mounted it is responsible, and volumes of containers
    /// are commonly open to everybody. A link or a `..` leads away from that place, so a reach that was found before a
    /// link stays found.
    pub(crate) fn reach_above(&self, steps: &[PathStep]) -> Option<Reach> {
        let (mut before, mut found) = (None, None);
        for step in steps {
            match step.kind {
                StepKind::Mount => found = None,
                StepKind::Folder => found = found.or_else(|| self.reach(step)),
                StepKind::Link => {
                    before = before.or_else(|| found.take()).or_else(|| self.reach(step));
                    found = None;
                }
                StepKind::Up => before = before.or_else(|| found.take()),
            }
        }
        before.or(found)
    }

    /// Decides about the folder at the end of these steps, from `/` on.
    pub(crate) fn own_at(&self, steps: &[PathStep]) -> Own {
        let Some((last, above)) = steps.split_last() else { return Own::Fits };
        // The folders above a mount do not reach it, but links that lead to it do.
        let way = if last.kind == StepKind::Mount { steps } else { above };
        self.reach_above(way).map_or_else(|| self.own(last), Own::Refused)
    }

    /// Decides about the folder itself.
    pub fn own(&self, step: &PathStep) -> Own {
        if step.kind == StepKind::Mount {
            return Own::Fits;
        }
        match self.reach(step) {
            Some(reach @ Reach::Owner { .. }) => Own::Refused(reach),
            _ if step.uid == self.me.uid && step.mode & BEYOND_OWNER != 0 => Own::Wide,
            Some(reach) => Own::Refused(reach),
            None => Own::Fits,
        }
    }
}

/// Verdict about a folder that must belong to this user alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Own {
    Fits,
    /// It belongs to this user, and others have rights that must be removed.
    Wide,
    Refused(Reach),
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: u32 = 1000;
    const DISK: u64 = 1;
    const VOLUME: u64 = 2;

    fn judge() -> Judge {
        Judge { me: Me { uid: ME, gids: [1000, 2000].into(), ..Me::default() }, loose: None }
    }

    fn step(path: &str, kind: StepKind, uid: u32, gid: u32, mode: u32) -> PathStep {
        let device = if path.starts_with("/volume") { VOLUME } else { DISK };
        PathStep { path: path.into(), kind, uid, gid, mode, device }
    }

    fn folder(path: &str, uid: u32, mode: u32) -> PathStep {
        step(path, StepKind::Folder, uid, 0, mode)
    }

    #[test]
    fn wall_14_folders_above_the_state_are_judged_up_to_a_mount() {
        use StepKind::{Folder, Link, Mount};
        let root = step("/", Mount, 0, 0, 0o755);
        let shared = || Reach::Everybody { path: "/srv".into(), mode: 0o777 };
        for (name, steps, found) in [
            ("nothing above", vec![], None),
            ("a home", vec![folder("/home", 0, 0o755), folder("/home/me", ME, 0o750)], None),
            ("/tmp", vec![folder("/tmp", 0, 0o1777), folder("/tmp/x", ME, 0o755)], None),
            ("open to all", vec![folder("/srv", 0, 0o777)], Some(shared())),
            (
                "further up",
                vec![folder("/srv", 0, 0o777), folder("/srv/x", ME, 0o700)],
                Some(shared()),
            ),
            (
                "another user's",
                vec![folder("/home", 0, 0o755), folder("/home/you", 1001, 0o755)],
                Some(Reach::Owner { path: "/home/you".into(), uid: 1001 }),
            ),
            ("a group of ours", vec![step("/volume", Folder, 0, 2000, 0o2775)], None),
            ("root's group", vec![step("/app", Folder, 0, 0, 0o775)], None),
            (
                "a group of others",
                vec![step("/srv", Folder, 0, 50, 0o775)],
                Some(Reach::Group { path: "/srv".into(), gid: 50, mode: 0o775 }),
            ),
            ("emptyDir", vec![step("/volume", Mount, 0, 0, 0o777)], None),
            ("a volume of another user", vec![step("/volume", Mount, 1001, 1001, 0o755)], None),
            (
                "below a mount",
                vec![step("/volume", Mount, 0, 0, 0o777), folder("/volume/x", ME, 0o777)],
                Some(Reach::Everybody { path: "/volume/x".into(), mode: 0o777 }),
            ),
            (
                "a mount below what is open",
                vec![folder("/srv", 0, 0o777), step("/srv/data", Mount, 0, 0, 0o755)],
                None,
            ),
            (
                "a link of another user",
                vec![folder("/tmp", 0, 0o1777), step("/tmp/x", Link, 1001, 1001, 0o777)],
                Some(Reach::Owner { path: "/tmp/x".into(), uid: 1001 }),
            ),
            (
                "a link of ours",
                vec![step("/x", Link, ME, ME, 0o777), folder("/y", ME, 0o755)],
                None,
            ),
            (
                "a link in a place that is open, to a mount",
                vec![
                    folder("/srv", 0, 0o777),
                    step("/srv/x", Link, ME, ME, 0o777),
                    step("/volume", Mount, 0, 0, 0o755),
                ],
                Some(shared()),
            ),
        ] {
            let steps: Vec<PathStep> = [root.clone()].into_iter().chain(steps).collect();
            assert_eq!(judge().reach_above(&steps), found, "{name}");
        }
    }

    #[test]
    fn wall_16_the_way_to_a_tool_is_judged_with_its_links_and_the_folders_above_its_target() {
        use StepKind::{Link, Mount};
        let root = || step("/", Mount, 0, 0, 0o755);
        let ours =
            || vec![root(), folder("/ours", ME, 0o755), step("/ours/t", Link, ME, ME, 0o777)];
        let to = |steps: Vec<PathStep>| [ours(), steps].concat();
        let open = |path: &str| Some(Reach::Everybody { path: path.into(), mode: 0o777 });
        let of_another = |path: &str| Some(Reach::Owner { path: path.into(), uid: 1001 });
        let (srv, q, file) = (
            || folder("/srv", 0, 0o755),
            || folder("/srv/q", 0, 0o755),
            || folder("/srv/q/t.js", 0, 0o755),
        );
        for (name, steps, found) in [
            ("closed", to(vec![srv(), q(), file()]), None),
            (
                "a folder above the target's is open",
                to(vec![folder("/srv", 0, 0o777), q(), file()]),
                open("/srv"),
            ),
            (
                "the target's folder is open",
                to(vec![srv(), folder("/srv/q", 0, 0o777), file()]),
                open("/srv/q"),
            ),
            (
                "the target is open",
                to(vec![srv(), q(), folder("/srv/q/t.js", 0, 0o777)]),
                open("/srv/q/t.js"),
            ),
            ("the sticky bit", to(vec![folder("/srv", 0, 0o1777), q(), file()]), None),
            (
                "another user's folder",
                to(vec![srv(), folder("/srv/q", 1001, 0o755), file()]),
                of_another("/srv/q"),
            ),
            (
                "another user's link on the way",
                to(vec![srv(), step("/srv/q", Link, 1001, 1001, 0o777), folder("/usr", 0, 0o755)]),
                of_another("/srv/q"),
            ),
            (
                "a second link, in an open folder",
                to(vec![
                    folder("/srv", 0, 0o777),
                    step("/srv/q", Link, 0, 0, 0o777),
                    folder("/usr", 0, 0o755),
                ]),
                open("/srv"),
            ),
        ] {
            assert_eq!(judge().reach_above(&steps), found, "{name}");
        }
    }

    #[test]
    fn wall_16_a_trusted_owner_is_no_reach_but_everybody_is() {
        let by = |trusted| Judge { me: Me { trusted, ..judge().me }, loose: None };
        let group = |mode| step("/x", StepKind::Folder, 0, 50, mode);
        for (trusted, place, is_reached) in [
            (Trusted::Nobody, folder("/x", 1001, 0o755), true),
            (Trusted::User(1001), folder("/x", 1001, 0o755), false),
            (Trusted::User(1001), folder("/x", 1002, 0o755), true),
            (Trusted::User(1001), folder("/x", 1001, 0o757), true),
            (Trusted::User(1001), group(0o775), true),
            (Trusted::Owners, folder("/x", 1002, 0o755), false),
            (Trusted::Owners, group(0o775), false),
            (Trusted::Owners, group(0o777), true),
        ] {
            assert_eq!(by(trusted).reach(&place).is_some(), is_reached, "{trusted:?} {place:?}");
        }
    }

    #[test]
    fn wall_14_the_folder_itself_is_ours_or_refused() {
        use StepKind::{Folder, Mount};
        let own = |kind, uid, mode| judge().own(&step("/s", kind, uid, 50, mode));
        assert_eq!(own(Folder, ME, 0o700), Own::Fits);
        assert_eq!(own(Folder, ME, 0o755), Own::Wide);
        assert_eq!(own(Folder, ME, 0o1777), Own::Wide);
        assert_eq!(own(Folder, 0, 0o755), Own::Fits);
        assert_eq!(own(Mount, 0, 0o777), Own::Fits);
        assert!(matches!(own(Folder, 0, 0o777), Own::Refused(Reach::Everybody { .. })));
        assert!(matches!(own(Folder, 1001, 0o700), Own::Refused(Reach::Owner { uid: 1001, .. })));
    }

    #[test]
    fn wall_14_a_folder_that_links_lead_to_is_judged_as_one_without_links() {
        use StepKind::{Link, Mount, Up};
        let root = || step("/", Mount, 0, 0, 0o755);
        let link = |path: &str, uid| step(path, Link, uid, uid, 0o777);
        let ours = || vec![root(), folder("/s", ME, 0o755), link("/s/g", ME), root()];
        let to = |steps: Vec<PathStep>| [ours(), steps].concat();
        let srv = |mode| folder("/srv", 0, mode);
        let open = |path: &str, mode| Own::Refused(Reach::Everybody { path: path.into(), mode });
        let of_another = |path: &str| Own::Refused(Reach::Owner { path: path.into(), uid: 1001 });
        for (name, steps, expected) in [
            ("tight", to(vec![srv(0o755), folder("/srv/x", ME, 0o700)]), Own::Fits),
            ("wide", to(vec![srv(0o755), folder("/srv/x", ME, 0o777)]), Own::Wide),
            ("wide, sticky above", to(vec![srv(0o1777), folder("/srv/x", ME, 0o755)]), Own::Wide),
            ("open above", to(vec![srv(0o777), folder("/srv/x", ME, 0o700)]), open("/srv", 0o777)),
            (
                "another user's",
                to(vec![srv(0o755), folder("/srv/x", 1001, 0o700)]),
                of_another("/srv/x"),
            ),
            (
                "a link to a link",
                to(vec![srv(0o755), link("/srv/l", ME), root(), folder("/x", ME, 0o777)]),
                Own::Wide,
            ),
            (
                "a link to a link in an open folder",
                to(vec![srv(0o777), link("/srv/l", ME), root(), folder("/x", ME, 0o700)]),
                open("/srv", 0o777),
            ),
            (
                "a link to another user's link",
                to(vec![srv(0o1777), link("/srv/l", 1001), root(), folder("/x", ME, 0o700)]),
                of_another("/srv/l"),
            ),
            ("a mount", to(vec![step("/volume", Mount, 0, 0, 0o777)]), Own::Fits),
            (
                "a mount, by another user's link",
                vec![root(), link("/l", 1001), root(), step("/volume", Mount, 0, 0, 0o777)],
                of_another("/l"),
            ),
            (
                "up from a mount below an open folder",
                to(vec![
                    srv(0o777),
                    step("/srv/m", Mount, 0, 0, 0o755),
                    step("/srv/m", Up, 0, 0, 0o755),
                    root(),
                    srv(0o777),
                    folder("/srv/x", ME, 0o700),
                ]),
                open("/srv", 0o777),
            ),
            (
                "up from below an open folder",
                to(vec![
                    srv(0o777),
                    folder("/srv/y", ME, 0o755),
                    step("/srv/y", Up, ME, ME, 0o755),
                    root(),
                    step("/volume", Mount, 0, 0, 0o755),
                ]),
                open("/srv", 0o777),
            ),
        ] {
            assert_eq!(judge().own_at(&steps), expected, "{name}");
        }
    }

    #[test]
    fn wall_14_a_file_system_without_rights_is_not_held_to_them() {
        let nobody = 65_534;
        let squashed = FileSystem { device: VOLUME, new_owner: nobody, keeps_modes: true };
        let fat = FileSystem { device: VOLUME, new_owner: ME, keeps_modes: false };
        for (loose, step, is_reached) in [
            (None, folder("/volume/x", nobody, 0o755), true),
            (Some(squashed), folder("/volume/x", nobody, 0o755), false),
            (Some(squashed), folder("/volume/x", 1001, 0o755), true),
            // Only on that file system.
            (Some(squashed), folder("/x", nobody, 0o755), true),
            (None, folder("/volume/x", ME, 0o777), true),
            (Some(fat), folder("/volume/x", ME, 0o777), false),
            (Some(fat), folder("/x", ME, 0o777), true),
        ] {
            let judge = Judge { loose, ..judge() };
            assert_eq!(judge.reach(&step).is_some(), is_reached, "{loose:?} {step:?}");
        }
        // In a user namespace that maps only this user, `/` belongs to an unmapped user.
        let me = Me { unmapped: Some(nobody), ..judge().me };
        let namespaced = Judge { me, loose: None };
        assert_eq!(namespaced.reach(&folder("/", nobody, 0o755)), None);
    }

    #[test]
    fn wall_14_a_secret_is_known_beyond_this_process_and_its_groups_or_not() {
        for (gid, mode, is_open_to_others) in [
            (1000, 0o600, false),
            (2000, 0o660, false),
            (0, 0o640, false),
            (50, 0o600, false),
            (50, 0o640, true),
            (2000, 0o604, true),
            (1000, 0o661, true),
        ] {
            assert_eq!(judge().is_open_to_others(gid, mode), is_open_to_others, "{gid} {mode:o}");
        }
    }

    #[test]
    fn wall_15_a_file_counts_if_nobody_else_can_have_written_it() {
        let nobody = 65_534;
        let squashed = FileSystem { device: VOLUME, new_owner: nobody, keeps_modes: true };
        let fat = FileSystem { device: VOLUME, new_owner: ME, keeps_modes: false };
        for (user, loose, (owner, mode), expected) in [
            (ME, None, (ME, 0o600), true),
            (ME, None, (ME, 0o644), true),
            (ME, None, (ME, 0o660), false),
            (ME, None, (ME, 0o602), false),
            (ME, None, (ROOT, 0o600), true),
            (ME, None, (1001, 0o600), false),
            (ROOT, None, (1001, 0o600), true),
            (ROOT, None, (1001, 0o606), false),
            // A pipeline runs there with a warning, so its commands must reach it.
            (ME, Some(fat), (ME, 0o777), true),
            (ME, Some(fat), (1001, 0o777), false),
            (ME, Some(squashed), (nobody, 0o600), true),
            (ME, Some(squashed), (nobody, 0o666), false),
        ] {
            let judge = Judge { me: Me { uid: user, ..judge().me }, loose };
            assert_eq!(
                judge.is_ours(owner, mode, VOLUME),
                expected,
                "{user} {loose:?} {owner} {mode:o}"
            );
        }
    }
}
