//! A run as data: how each process ends, and what happens between two of them. The script is drawn from the seed
//! before the run begins, and printed when the run fails.

use fastrand::Rng;

use super::Size;

/// Maximum number of steps that a process lives.
const STEPS_MAX: u64 = 90;

/// Event between two lives, while nothing runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Nothing,
    /// A sink's destination is restored from a backup of before an earlier life.
    SinkRestored {
        place: usize,
        backup: usize,
    },
    /// The state folder is restored from a copy of before an earlier life.
    StateRestored {
        copy: usize,
    },
    StateLost,
    /// The sink of all rows is removed from the configuration.
    SinkRemoved,
    SinkReturned,
    /// The sink of all rows gets another name.
    SinkRenamed,
}

impl Between {
    fn forgets(self) -> bool {
        matches!(self, Self::StateLost | Self::StateRestored { .. })
    }
}

/// End of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The process ends when everything is read; there are no faults.
    CaughtUp,
    /// The process is killed at a step. Only work that its servers have already received goes on.
    Killed { steps: u64 },
    /// The process is asked to stop at a step, and has some time to end.
    Stopped { steps: u64 },
}

/// Whether and when dead letters are redriven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redriving {
    No,
    /// Before the pipeline starts; the command is killed at a step.
    Before {
        steps: u64,
    },
    /// While the pipeline runs; the redrive is killed together with it.
    Beside {
        after_ms: u64,
    },
}

/// Contents of the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File {
    /// Side that goes to the sink `right`.
    pub right: u8,
    /// Seed of the commit sizes, and of which sinks may be given up.
    pub commit_seed: u64,
    pub is_away: bool,
    pub is_renamed: bool,
    /// Whether sinks may be given up.
    pub gives_up: bool,
    /// Whether the process has only a short time to end: less than a commit may take.
    pub is_hasty: bool,
}

/// A process, from its start to its end.
#[derive(Clone, Debug)]
pub struct Life {
    pub before: Between,
    pub file: File,
    /// Reloads, each after a pause in milliseconds.
    pub reloads: Vec<(u64, File)>,
    pub redriving: Redriving,
    pub end: End,
}

/// All lives. The last two are without faults: the first of them reads everything, the second finds nothing to do.
#[derive(Clone, Debug)]
pub struct Script {
    pub lives: Vec<Life>,
    /// Whether each side keeps its sink, so that every revision routes a record to the same sink.
    pub is_one_sided: bool,
    /// Life from which on tables accept what they refused.
    pub accepts_from: Option<usize>,
}

impl Script {
    pub fn draw(seed: u64, size: Size) -> Self {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let kills = rng.usize(1..=size.kills_max);
        let forgets = rng.u8(..6) == 0;
        let restores = size.is_pure && rng.u8(..3) == 0;
        // An older copy of the state does not know which dead letters were redriven, and would redrive them again.
        let redrives = size.is_pure && !forgets && rng.u8(..3) == 0;
        let moves_sinks = rng.u8(..2) == 0;
        let is_one_sided = (forgets || restores) && rng.bool();
        let mut file = File {
            right: u8::from(rng.bool()),
            commit_seed: rng.u64(..),
            is_away: false,
            is_renamed: false,
            gives_up: true,
            is_hasty: false,
        };
        let forgets_before = if forgets { rng.usize(1..=kills) } else { 0 };
        let mut lives = Vec::new();
        for number in 0..kills {
            let before = match number {
                0 => Between::Nothing,
                _ if number == forgets_before => match rng.bool() {
                    true => Between::StateRestored { copy: rng.usize(..number) },
                    false => Between::StateLost,
                },
                _ => between(rng, number, &file, (restores, moves_sinks, is_one_sided)),
            };
            match before {
                Between::SinkRemoved => file.is_away = true,
                Between::SinkReturned => file.is_away = false,
                Between::SinkRenamed => file.is_renamed = true,
                _ => {}
            }
            change(rng, &mut file, (false, is_one_sided));
            let steps = rng.u64(1..STEPS_MAX);
            let end = match rng.u8(..4) {
                0 => End::Stopped { steps },
                _ => End::Killed { steps },
            };
            file.is_hasty = matches!(end, End::Stopped { .. });
            let redriving = match (redrives && !file.is_away, rng.u8(..4)) {
                (true, 0 | 1) => Redriving::Before { steps: rng.u64(1..STEPS_MAX / 2) },
                (true, 2) => Redriving::Beside { after_ms: rng.u64(..200) },
                _ => Redriving::No,
            };
            // A redrive beside the pipeline uses the sinks of the running pipeline, so reloads must not change them.
            let keeps_sinks = matches!(redriving, Redriving::Beside { .. });
            let mut reloads = Vec::new();
            let first = file;
            for _ in 0..rng.u8(..3) {
                let pause_ms = rng.u64(..150);
                match keeps_sinks {
                    true if is_one_sided => {}
                    true => file.right = 1 - file.right,
                    false => change(rng, &mut file, (moves_sinks, is_one_sided)),
                }
                reloads.push((pause_ms, file));
            }
            lives.push(Life { before, file: first, reloads, redriving, end });
        }
        for place in 0..2 {
            let before = match place {
                0 if kills == forgets_before => Between::StateLost,
                0 if file.is_away => Between::SinkReturned,
                _ => Between::Nothing,
            };
            (file.is_away, file.is_hasty) = (false, false);
            change(rng, &mut file, (false, is_one_sided));
            let (reloads, redriving, end) = (Vec::new(), Redriving::No, End::CaughtUp);
            lives.push(Life { before, file, reloads, redriving, end });
        }
        let accepts_from = redrives.then(|| rng.usize(..=kills));
        Self { lives, is_one_sided, accepts_from }
    }

    /// Whether the state is ever lost or restored from a copy.
    pub fn forgets(&self) -> bool {
        self.lives.iter().any(|life| life.before.forgets())
    }

    /// Whether a sink was away when the state was lost or restored, so that the state may not know it.
    pub fn has_new_sink(&self) -> bool {
        self.lives.iter().any(|life| life.before.forgets() && life.file.is_away)
    }

    /// Whether a sink is away at some time after the state was lost or restored. If no process has written it in
    /// between, which depends on when a process was killed, the sink is new to the state when it comes back.
    pub fn may_have_new_sink(&self) -> bool {
        let lives = self.lives.iter().skip_while(|life| !life.before.forgets());
        lives
            .into_iter()
            .any(|life| life.file.is_away || life.reloads.iter().any(|(_, file)| file.is_away))
    }

    /// Whether a later life needs a copy of the state of before this life.
    pub fn needs_copy(&self, number: usize) -> bool {
        self.lives.iter().any(|life| life.before == Between::StateRestored { copy: number })
    }
}

/// Draws what happens before a life.
fn between(
    rng: &mut Rng,
    number: usize,
    file: &File,
    (restores, moves_sinks, is_one_sided): (bool, bool, bool),
) -> Between {
    match rng.u8(..6) {
        0 if restores => {
            // If the state no longer has the revision that ran first, the current revision runs the records again for
            // a restored sink. If sides change, it may route a record to the sink that has not lost it.
            let place = if is_one_sided { rng.usize(..super::SINKS.len()) } else { super::ALL };
            Between::SinkRestored { place, backup: rng.usize(..number) }
        }
        1 | 2 if moves_sinks && file.is_away => Between::SinkReturned,
        1 | 2 if moves_sinks => Between::SinkRemoved,
        3 if moves_sinks && !file.is_renamed => Between::SinkRenamed,
        _ => Between::Nothing,
    }
}

/// Edits the file.
fn change(rng: &mut Rng, file: &mut File, (moves_sinks, is_one_sided): (bool, bool)) {
    match rng.u8(..4) {
        0 => {}
        1 if !is_one_sided => file.right = 1 - file.right,
        2 if moves_sinks => match rng.u8(..4) {
            0 => file.is_renamed = true,
            _ => file.is_away = !file.is_away,
        },
        _ => {
            file.commit_seed = rng.u64(..);
            if !is_one_sided {
                file.right = u8::from(rng.bool());
            }
        }
    }
}
