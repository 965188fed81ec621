//! Recent inputs of each stage, on which a candidate is tried before it takes the incumbent's place.
//!
//! Per stage the last batches are kept, bounded in number, bytes and age; of a busy stage not every batch, so that
//! keeping them costs almost nothing. They are kept as packed copies: a batch shares memory with others of the same
//! answer, which would all be kept alive, and each record costs more than its bytes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::flow::Flow;
use super::packed::PackedBatch;
use shardmill_config::SampleLimits;
use shardmill_core::record::{Batch, StageName};

/// Pause after a batch was kept, per stage. Keeping one takes about 50 µs, so this is about one hundredth of the
/// time, whatever the load.
const PAUSE: Duration = Duration::from_millis(5);

/// A batch as it entered a stage.
#[derive(Clone)]
pub struct Sample {
    /// Its number: later samples of the process have greater numbers.
    pub number: u64,
    /// The batch.
    pub batch: Arc<Batch>,
    /// Its items when it entered.
    pub flow: Arc<Flow>,
}

/// A sample as it is kept.
struct KeptSample {
    number: u64,
    packed: PackedBatch,
    taken: Instant,
}

/// The samples of a pipeline. Clones share them.
#[derive(Clone)]
pub struct Samples {
    shared: Arc<Shared>,
}

struct Shared {
    limits: SampleLimits,
    begun: Instant,
    stages: Mutex<HashMap<StageName, Kept>>,
    next_number: AtomicU64,
}

/// The samples of one stage, the oldest first.
#[derive(Default)]
struct Kept {
    samples: VecDeque<KeptSample>,
    /// Memory that they hold.
    bytes: usize,
    /// Time of the last sample, in microseconds since `begun`.
    last_us: u64,
}

impl Samples {
    /// Makes an empty store with `limits` per stage.
    pub fn new(limits: SampleLimits) -> Self {
        let (begun, stages, next_number) = (Instant::now(), Mutex::default(), AtomicU64::new(1));
        Self { shared: Arc::new(Shared { limits, begun, stages, next_number }) }
    }

    /// Keeps a batch that is about to enter a stage, unless one was kept just before, or another lane is keeping
    /// one.
    pub fn offer(&self, stage: &StageName, batch: &Arc<Batch>, flow: &Flow) {
        if flow.is_empty() || self.shared.limits.batches_max == 0 {
            return;
        }
        let Ok(mut stages) = self.shared.stages.try_lock() else { return };
        let now_us = self.shared.begun.elapsed().as_micros() as u64;
        let kept = match stages.get_mut(stage) {
            Some(kept) => kept,
            None => stages.entry(stage.clone()).or_default(),
        };
        if !kept.samples.is_empty() && now_us < kept.last_us + PAUSE.as_micros() as u64 {
            return;
        }
        let bytes = PackedBatch::bytes_of(batch, flow);
        if bytes > self.shared.limits.bytes_max {
            return;
        }
        kept.last_us = now_us;
        kept.bytes += bytes;
        kept.samples.push_back(KeptSample {
            number: self.shared.next_number.fetch_add(1, Ordering::Relaxed),
            packed: PackedBatch::pack(batch, flow),
            taken: Instant::now(),
        });
        kept.forget(&self.shared.limits);
    }

    /// Returns the numbers of a stage's samples after a number, the oldest first.
    pub(crate) fn numbers_after(&self, stage: &StageName, number: u64) -> Vec<u64> {
        let mut stages = self.lock();
        let Some(kept) = stages.get_mut(stage) else { return Vec::new() };
        kept.forget(&self.shared.limits);
        kept.samples.iter().map(|sample| sample.number).filter(|own| *own > number).collect()
    }

    /// Returns a sample by its number; `None`: it is no longer kept. Unpacked it holds several times as much memory,
    /// so take one after the other.
    pub fn get(&self, stage: &StageName, number: u64) -> Option<Sample> {
        let stages = self.lock();
        let mut samples = stages.get(stage)?.samples.iter();
        let (batch, flow) = samples.find(|sample| sample.number == number)?.packed.unpack();
        Some(Sample { number, batch: Arc::new(batch), flow: Arc::new(flow) })
    }

    /// Forgets the samples of stages that are gone.
    pub(crate) fn keep_only(&self, stages: &[&StageName]) {
        self.lock().retain(|name, _| stages.contains(&name));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<StageName, Kept>> {
        self.shared.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn forget(&mut self, limits: &SampleLimits) {
        while let Some(oldest) = self.samples.front()
            && (self.samples.len() > limits.batches_max
                || self.bytes > limits.bytes_max
                || oldest.taken.elapsed() > limits.age_max)
        {
            self.bytes -= oldest.packed.bytes();
            self.samples.pop_front();
        }
    }
}
