//! A plugin's answer to a call, validated against the contract and the limits.

use bytes::Bytes;

use super::flow::{self, Item};
use shardmill_config::StageLimits;
use shardmill_core::record::{excerpt, shortened};
use shardmill_plugin::{CallError, Outcome, Output, Reject, Span};

/// Bytes that an output costs the host besides its own: its words, and its overhead on the way to a sink.
const OUTPUT_OVERHEAD_BYTES: usize = 256;
/// Bytes of the reasons of one run of a stage that are kept whole: as many as the records of a batch may have. One
/// record may become 10,000 items, which may all be rejected.
const REASONS_BYTES_MAX: usize = 8 << 20;
/// Bytes that are kept of each reason beyond that.
const REASON_BYTES_AFTER: usize = 128;
/// Bytes that a reject costs the host besides its reason: it becomes a dead letter.
const REJECT_OVERHEAD_BYTES: usize = 512;
/// Words of an output, and of a reject.
const OUTPUT_WORDS: usize = 6;
const REJECT_WORDS: usize = 3;

/// One output of a stage.
#[derive(Clone, Debug)]
pub struct StageOutput {
    /// Index of the item that it came from.
    pub item: usize,
    /// Index of the route in the plugin's descriptor.
    pub route: usize,
    /// The partition key; `None`: the item's own.
    pub key: Option<Bytes>,
    /// The payload; `None`: the item's own.
    pub payload: Option<Bytes>,
}

/// The validated outputs of one call, as the plugin wrote them.
#[derive(Debug)]
pub(super) struct PluginAnswer {
    arena: Bytes,
    outputs: Vec<u32>,
    /// Index of the call's first item.
    first_item: usize,
}

impl PluginAnswer {
    /// Returns the outputs, which share the arena.
    fn outputs(&self) -> impl Iterator<Item = StageOutput> {
        let (outputs, _) = self.outputs.as_chunks();
        let share = |span: Span| {
            self.arena.slice(span.start as usize..span.start as usize + span.length as usize)
        };
        outputs.iter().map(Output::from_words).map(move |output| StageOutput {
            item: output.input as usize + self.first_item,
            route: output.route as usize,
            key: output.key.map(share),
            payload: output.payload.map(share),
        })
    }
}

/// An item that the stage rejected.
#[derive(Clone, Debug)]
pub struct Rejected {
    /// Index of the item.
    pub item: usize,
    /// Why.
    pub reason: String,
    /// The plugin's stack, when it trapped.
    pub backtrace: String,
    /// The call failed: it trapped or exceeded a limit.
    pub trapped: bool,
}

/// Outcome of a flow at a stage.
#[derive(Debug, Default)]
pub struct StageOutcome {
    /// One for each successful call: a single one, unless there was a search for culprits.
    pub(super) answers: Vec<PluginAnswer>,
    /// The rejected items, in ascending order.
    pub rejected: Vec<Rejected>,
    /// Bytes of their reasons.
    reason_bytes: usize,
    /// Bytes of the answers' arenas.
    arena_bytes: usize,
}

/// Returns the bytes that an outcome may hold. The input may always pass unchanged.
pub(super) fn occupied_bytes_max(flow: &[Item], limits: &StageLimits) -> usize {
    let entered: usize = flow.iter().map(|item| item.key.len() + item.payload.len()).sum();
    limits.answer_bytes_max().max(entered + flow.len() * OUTPUT_OVERHEAD_BYTES)
}

impl StageOutcome {
    /// Returns the outputs, by ascending item.
    pub fn outputs(&self) -> impl Iterator<Item = StageOutput> {
        self.answers.iter().flat_map(PluginAnswer::outputs)
    }

    /// Returns the number of outputs.
    pub(super) fn output_count(&self) -> usize {
        self.answers.iter().map(|answer| answer.outputs.len() / OUTPUT_WORDS).sum()
    }

    /// Returns the memory that the outcome holds, in bytes.
    pub(super) fn occupied_bytes(&self) -> usize {
        let outputs = self.output_count() * OUTPUT_OVERHEAD_BYTES;
        let rejected = self.rejected.len() * REJECT_OVERHEAD_BYTES + self.reason_bytes;
        self.arena_bytes + outputs + rejected
    }

    /// Adds the outcome of a call with later items.
    pub(super) fn add(&mut self, made: Self) {
        self.arena_bytes += made.arena_bytes;
        self.answers.extend(made.answers);
        for mut rejected in made.rejected {
            if self.reason_bytes >= REASONS_BYTES_MAX && rejected.reason.len() > REASON_BYTES_AFTER
            {
                rejected.reason = shortened(rejected.reason.as_bytes(), REASON_BYTES_AFTER);
            }
            self.reason_bytes += rejected.reason.len();
            self.rejected.push(rejected);
        }
    }

    /// Returns the arenas that the outputs share.
    pub(super) fn arenas(&self) -> impl Iterator<Item = &Bytes> {
        self.answers.iter().map(|answer| &answer.arena)
    }
}

/// Validates an answer against the contract and the limits. `first_item` is added to its item indexes.
pub(super) fn validate(
    flow: &[Item],
    outcome: Outcome,
    routes: usize,
    limits: &StageLimits,
    first_item: usize,
) -> Result<StageOutcome, CallError> {
    let Outcome { arena, outputs, rejects } = outcome;
    let items = flow.len();
    let mut last = 0;
    // Spans may overlap, so the outputs can be far larger than the arena.
    let mut output_bytes = 0;
    let mut is_arena_used = false;
    let output_bytes_max = occupied_bytes_max(flow, limits);
    let words = whole(&outputs, "outputs")?;
    if words.len() > items.saturating_mul(limits.outputs_per_record_max) {
        return Err(CallError::output(format!(
            "too many outputs: expected at most {1} for each of {items} records, found {0}",
            words.len(),
            limits.outputs_per_record_max
        )));
    }
    for (index, output) in words.iter().map(Output::from_words).enumerate() {
        let input = output.input as usize;
        if input >= items {
            return Err(CallError::contract(format!(
                "output {index} has an invalid input index: expected less than {items}, found {input}"
            )));
        }
        if input < last {
            return Err(CallError::contract(format!(
                "output {index} is out of order: expected input {last} or later, found {input}"
            )));
        }
        if output.route as usize >= routes {
            return Err(CallError::contract(format!(
                "output {index} has an invalid route index: expected less than {routes}, found {}",
                output.route
            )));
        }
        last = input;
        let item = &flow[input];
        let key = output.key.map(|key| slice(&arena, key, "the key of output", index));
        let payload = output.payload.map(|payload| slice(&arena, payload, "output", index));
        let (key, payload) = (key.transpose()?, payload.transpose()?);
        is_arena_used |= key.is_some() || payload.is_some();
        output_bytes += key.unwrap_or(&item.key).len() + payload.unwrap_or(&item.payload).len();
        // Millions of empty outputs are not free.
        output_bytes += OUTPUT_OVERHEAD_BYTES;
        // This check comes before a key is read: reading one key for many outputs would take forever.
        if output_bytes > output_bytes_max {
            return Err(CallError::output(format!(
                "outputs of more than {output_bytes_max} bytes in total, with keys and {OUTPUT_OVERHEAD_BYTES} \
                 bytes for each ({})",
                limits.answer_bound()
            )));
        }
        if let Some(key) = key {
            // The next stage or sink may read it as text.
            std::str::from_utf8(key).map_err(|error| {
                CallError::contract(format!(
                    "the key of output {index} is not valid UTF-8: {error}"
                ))
            })?;
        }
    }
    let (mut rejected, mut reason_bytes) = (Vec::with_capacity(rejects.len() / REJECT_WORDS), 0);
    let mut rejected_before = None;
    for (index, reject) in whole(&rejects, "rejects")?.iter().map(Reject::from_words).enumerate() {
        let input = reject.input as usize;
        if input >= items || rejected_before.is_some_and(|before| input <= before) {
            return Err(CallError::contract(format!(
                "reject {index} has an invalid input index: expected ascending indexes less than {items}, \
                 found {input}"
            )));
        }
        if words
            .binary_search_by_key(&reject.input, |words| Output::from_words(words).input)
            .is_ok()
        {
            return Err(CallError::contract(format!(
                "input {input} has both an output and a reject"
            )));
        }
        rejected_before = Some(input);
        let reason = slice(&arena, reject.reason, "the reason of reject", index)?;
        // Many rejects may share one long reason.
        let reason = match reason_bytes < REASONS_BYTES_MAX {
            true => excerpt(reason),
            false => shortened(reason, REASON_BYTES_AFTER),
        };
        reason_bytes += reason.len();
        let (item, backtrace) = (input + first_item, String::new());
        rejected.push(Rejected { item, reason, backtrace, trapped: false });
    }
    // Reasons are copies, so an arena without outputs can be dropped.
    let arena = if is_arena_used { Bytes::from(arena) } else { Bytes::new() };
    let arena_bytes = arena.len();
    let answers = match outputs.is_empty() {
        true => Vec::new(),
        false => vec![PluginAnswer { arena, outputs, first_item }],
    };
    Ok(StageOutcome { answers, rejected, reason_bytes, arena_bytes })
}

/// Returns the words as records of `N` words.
fn whole<'w, const N: usize>(words: &'w [u32], what: &str) -> Result<&'w [[u32; N]], CallError> {
    match words.as_chunks() {
        (records, []) => Ok(records),
        (records, rest) => Err(CallError::contract(format!(
            "its {what} end within a record: found {} of {N} words after {} complete records",
            rest.len(),
            records.len()
        ))),
    }
}

/// Returns the bytes of a span.
#[inline]
fn slice<'a>(arena: &'a [u8], span: Span, what: &str, index: usize) -> Result<&'a [u8], CallError> {
    flow::within(span, arena.len()).map(|range| &arena[range]).ok_or_else(|| {
        CallError::contract(format!(
            "{what} {index} is outside of the answer's arena: expected a span within {} bytes, found {}+{}",
            arena.len(),
            span.start,
            span.length
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(payload: &[u8]) -> Item {
        let payload = Bytes::copy_from_slice(payload);
        Item { record: 0, ordinal: 0, upstream_route: 0, key: Bytes::new(), payload }
    }

    /// Makes an answer with this many empty outputs, for the first item.
    fn empty_outputs(outputs: usize) -> Outcome {
        let none = Some(Span { start: 0, length: 0 });
        let output = Output { input: 0, route: 0, key: none, payload: none };
        let words = std::iter::repeat_n(output.to_words(), outputs).flatten().collect();
        Outcome { arena: Vec::new(), outputs: words, rejects: Vec::new() }
    }

    #[test]
    fn wall_02_outputs_without_bytes_are_not_free() {
        let limits = StageLimits { outputs_per_record_max: 1_000_000, ..StageLimits::default() };
        let validate = |outputs| validate(&[item(b"one")], empty_outputs(outputs), 1, &limits, 0);
        let most = limits.output_bytes_max / OUTPUT_OVERHEAD_BYTES;
        assert_eq!(validate(most).expect("within the limit").output_count(), most);
        let refused = validate(most + 1).expect_err("over the limit").message;
        assert!(refused.contains("outputs of more than 67108864 bytes"), "{refused}");
    }

    /// Items that one record may become, each rejected with the same 8 KiB: in one call, and in two.
    #[test]
    fn wall_04_reasons_of_many_rejects_are_bounded_together() {
        const ITEMS: u32 = 10_000;
        let items = vec![item(b"one"); ITEMS as usize];
        let reject =
            |input| Reject { input, reason: Span { start: 0, length: 8 << 10 } }.to_words();
        let validate = || {
            let rejects: Vec<u32> = (0..ITEMS).flat_map(reject).collect();
            let outcome = Outcome { arena: vec![b'x'; 8 << 10], outputs: Vec::new(), rejects };
            validate(&items, outcome, 1, &StageLimits::default(), 0).expect("kept")
        };
        let bytes = |outcome: &StageOutcome| -> usize {
            outcome.rejected.iter().map(|one| one.reason.len()).sum()
        };
        let most = |items: usize| REASONS_BYTES_MAX + (8 << 10) + items * (REASON_BYTES_AFTER + 64);
        let mut outcome = validate();
        assert_eq!(outcome.rejected.len(), ITEMS as usize);
        assert_eq!(outcome.rejected[1_000].reason.len(), 8 << 10, "a batch's own are whole");
        assert!(bytes(&outcome) <= most(ITEMS as usize), "{} bytes", bytes(&outcome));
        outcome.add(validate());
        assert_eq!(outcome.rejected.len(), 2 * ITEMS as usize);
        assert!(bytes(&outcome) <= most(2 * ITEMS as usize), "{} bytes", bytes(&outcome));
    }

    #[test]
    fn wall_02_what_came_in_may_pass_whatever_the_limit_is() {
        let limits = StageLimits { output_bytes_max: 1, ..StageLimits::default() };
        let items = vec![item(b"one"); 1_000];
        let pass = |input| Output { input, route: 0, key: None, payload: None }.to_words();
        let outputs: Vec<u32> = (0..1_000).flat_map(pass).collect();
        let outcome = Outcome { arena: Vec::new(), outputs, rejects: Vec::new() };
        assert_eq!(validate(&items, outcome, 1, &limits, 0).expect("passed").output_count(), 1_000);
    }
}
