//! The validation of a plugin's answer, against the contract in the words of `plugin.wit`.

use bytes::Bytes;
use fastrand::Rng;

use super::answer::validate;
use super::flow::Item;
use shardmill_config::StageLimits;
use shardmill_core::fuzzing::{Choices, FuzzTarget};
use shardmill_core::record::excerpt;
use shardmill_plugin::Outcome;

/// Checks that [`validate`] accepts exactly the answers that keep the contract, and returns their content unchanged.
pub const OUTCOME: FuzzTarget = FuzzTarget { name: "outcome", run, grow, words: &[] };

/// Bytes that each output counts besides its own, as the book ("Limits") says.
const OUTPUT_BYTES: usize = 256;

/// One output, by value.
#[derive(Debug, PartialEq)]
struct Passed {
    item: usize,
    route: usize,
    key: Option<Vec<u8>>,
    payload: Option<Vec<u8>>,
}

type Rejects = Vec<(usize, String)>;

fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let items: Vec<Item> = (0u32..)
        .take(choices.below(6))
        .map(|record| {
            let (key, payload) = (choices.below(4), choices.below(9));
            let key = Bytes::copy_from_slice(choices.bytes(key));
            let payload = Bytes::copy_from_slice(choices.bytes(payload));
            Item { record, ordinal: 0, upstream_route: 0, key, payload }
        })
        .collect();
    let limits = StageLimits {
        output_bytes_max: *choices.one_of(&[64 << 20, 0, 600, 1_500]),
        outputs_per_record_max: *choices.one_of(&[10_000, 0, 1, 2]),
        ..StageLimits::default()
    };
    let (routes, first_item) = (choices.below(4), choices.below(3));
    let arena_bytes = choices.below(64);
    let arena = choices.bytes(arena_bytes).to_vec();
    let outputs = words(&mut choices, &arena, 6);
    let rejects = words(&mut choices, &arena, 3);

    let expected = reference(&items, &arena, &outputs, &rejects, routes, &limits, first_item);
    let outcome = Outcome { arena, outputs: outputs.clone(), rejects: rejects.clone() };
    let found = validate(&items, outcome, routes, &limits, first_item).ok().map(|outcome| {
        let bytes = |bytes: Option<Bytes>| bytes.map(|bytes| bytes.to_vec());
        let passed: Vec<Passed> = outcome
            .outputs()
            .map(|output| Passed {
                item: output.item,
                route: output.route,
                key: bytes(output.key),
                payload: bytes(output.payload),
            })
            .collect();
        let rejected = outcome.rejected.into_iter().map(|one| (one.item, one.reason));
        (passed, rejected.collect::<Rejects>())
    });
    assert_eq!(found, expected, "{outputs:?} and {rejects:?} of {} items", items.len());
}

/// Makes the words of outputs or rejects: mostly valid ones, sometimes any.
fn words(choices: &mut Choices<'_>, arena: &[u8], record_words: usize) -> Vec<u32> {
    let mut words = Vec::new();
    let mut input = 0;
    for _ in 0..choices.below(8) {
        input = match choices.byte() {
            0..=99 => input,
            100..=219 => input + 1,
            220..=239 => choices.byte().into(),
            _ => choices.word(),
        };
        words.push(input);
        if record_words == 6 {
            words.push(
                if choices.byte() < 240 { choices.byte() % 3 } else { choices.byte() }.into(),
            );
            words.extend(span(choices, arena));
        }
        words.extend(span(choices, arena));
        if input > 1 << 20 {
            input = 0;
        }
    }
    let odd = if choices.byte() > 250 { choices.below(6) } else { 0 };
    words.extend((0..odd).map(|_| choices.word()));
    words
}

/// Makes a span: none, one within the arena, or any.
fn span(choices: &mut Choices<'_>, arena: &[u8]) -> [u32; 2] {
    match choices.byte() {
        0..=79 => [u32::MAX, 0],
        80..=229 => {
            let start = choices.below(arena.len() + 1);
            let length = choices.below(arena.len() - start + 1);
            [start as u32, length as u32]
        }
        230..=244 => [choices.byte().into(), choices.byte().into()],
        _ => [choices.word(), choices.word()],
    }
}

/// Reads an answer by the rules of the contract. `None`: the answer breaks it.
fn reference(
    items: &[Item],
    arena: &[u8],
    outputs: &[u32],
    rejects: &[u32],
    routes: usize,
    limits: &StageLimits,
    first_item: usize,
) -> Option<(Vec<Passed>, Rejects)> {
    // Spans lie within their arena.
    let within = |start: u32, length: u32| -> Option<Vec<u8>> {
        let end = u64::from(start) + u64::from(length);
        let in_arena = end <= arena.len() as u64;
        in_arena.then(|| arena[start as usize..end as usize].to_vec())
    };
    let optional = |start: u32, length: u32| match (start, length) {
        (u32::MAX, 0) => Some(None),
        _ => within(start, length).map(Some),
    };
    if !outputs.len().is_multiple_of(6) || !rejects.len().is_multiple_of(3) {
        return None;
    }
    if outputs.len() / 6 > items.len() * limits.outputs_per_record_max {
        return None;
    }
    let (mut passed, mut passed_bytes) = (Vec::new(), 0);
    for output in outputs.chunks(6) {
        let item = items.get(output[0] as usize)?;
        let (key, payload) = (optional(output[2], output[3])?, optional(output[4], output[5])?);
        if output[1] as usize >= routes || key.as_ref().is_some_and(|key| is_no_text(key)) {
            return None;
        }
        passed_bytes += OUTPUT_BYTES + key.as_ref().map_or(item.key.len(), Vec::len);
        passed_bytes += payload.as_ref().map_or(item.payload.len(), Vec::len);
        let (input, route) = (output[0] as usize, output[1] as usize);
        passed.push(Passed { item: input + first_item, route, key, payload });
    }
    // The input may always pass unchanged, whatever the limit is.
    let entered: usize =
        items.iter().map(|item| OUTPUT_BYTES + item.key.len() + item.payload.len()).sum();
    if passed_bytes > entered && passed_bytes > limits.output_bytes_max {
        return None;
    }
    if !passed.is_sorted_by_key(|passed| passed.item) {
        return None;
    }
    let mut rejected = Vec::new();
    for reject in rejects.chunks(3) {
        let item = reject[0] as usize + first_item;
        let reason = within(reject[1], reject[2])?;
        // Outputs or a reject for an input, never both.
        if reject[0] as usize >= items.len() || passed.iter().any(|passed| passed.item == item) {
            return None;
        }
        rejected.push((item, excerpt(&reason)));
    }
    let is_ascending = rejected.is_sorted_by(|(one, _), (other, _)| one < other);
    is_ascending.then_some((passed, rejected))
}

fn is_no_text(bytes: &[u8]) -> bool {
    String::from_utf8(bytes.to_vec()).is_err()
}

fn grow(random: &mut Rng) -> Vec<u8> {
    let length = random.usize(..160);
    (0..length).map(|_| random.u8(..)).collect()
}
