//! Canaries: a new version runs for some of the keys.

use std::collections::HashMap;

use super::fixture::Fixture;

#[test]
fn a_canary_keeps_the_order_of_each_key_and_can_be_promoted() {
    let mut fixture = Fixture::new(4);
    fixture.start();
    fixture.world.put(0..1_000, 200);
    fixture.wait_rows(1_000);
    let report = fixture.swap(&fixture.version("v2 none"), &["--canary", "30"]);
    assert_eq!(report["percent"], 30);
    fixture.world.put(1_000..5_000, 200);
    fixture.wait_rows(5_000);
    let rows = fixture.rows();
    let of_canary = rows.iter().filter(|row| row.version == "v2").count();
    assert!((400..=2_000).contains(&of_canary), "{of_canary} of 4,000 with 30 %");
    // All rows of a key have the same version, and are in the order in which they were put.
    let mut sides: HashMap<&str, &str> = HashMap::new();
    let mut last: HashMap<&str, u64> = HashMap::new();
    for row in &rows {
        assert!(last.insert(&row.key, row.id).is_none_or(|last| last < row.id), "{row:?}");
        if row.id >= 1_000 {
            let side = sides.entry(&row.key).or_insert(&row.version);
            assert_eq!(*side, row.version, "{row:?}");
        }
    }
    // A restart after a kill keeps the canary.
    fixture.kill();
    fixture.start();
    fixture.world.put(5_000..6_000, 200);
    fixture.wait_rows(6_000);
    // Promotes the canary to all keys, named by the digest of its component.
    let digest = report["after"]["digest"].as_str().expect("a digest")[..12].to_owned();
    let promoted = fixture.swap(&digest, &[]);
    assert_eq!(promoted["percent"], 100);
    fixture.world.put(6_000..7_000, 200);
    fixture.wait_rows(7_000);
    fixture.stop();
    fixture.assert_each_once_as_the_ledger_says(0..7_000);
    let rows = fixture.rows();
    assert!(rows.iter().filter(|row| row.id >= 6_000).all(|row| row.version == "v2"));
}

#[test]
fn a_canary_with_other_columns_is_refused() {
    let mut fixture = Fixture::new(1);
    fixture.start();
    let error = fixture.refused(&fixture.version("v2 columns"), &["--canary", "10"]);
    assert!(
        error.contains("refused at step check") && error.contains("other routes or columns"),
        "{error}"
    );
    fixture.stop();
}
