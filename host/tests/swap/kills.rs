//! A process that is killed at any step of a swap: the next one has one version, as the ledger says.

use std::time::Duration;

use crate::rig::Rig;
use crate::support::run;

const SEED: u64 = 2014;
const KILLS: u64 = 12;

#[test]
fn a_kill_at_any_step_of_a_swap_leaves_one_version() {
    let seed = std::env::var("SHARDMILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = fastrand::Rng::with_seed(seed.unwrap_or(SEED));
    let mut rig = Rig::new(3);
    let versions = [rig.version("v2 none"), rig.version("v3 none"), rig.version("v1 none")];
    rig.start();
    let mut put = 0;
    for kill in 0..KILLS {
        rig.world.put(put..put + 300, 30);
        put += 300;
        let (file, pipeline) = (versions[random.usize(..3)].clone(), rig.write_pipeline());
        let swap = std::thread::spawn(move || {
            run(&["plugin", "swap", "stamp", &file, "--pipeline", &pipeline, "--json"])
        });
        std::thread::sleep(Duration::from_millis(random.u64(0..250)));
        rig.kill();
        let _ = swap.join().expect("it ends");
        rig.start();
        rig.world.put(put..put + 100, 30);
        put += 100;
        rig.wait_rows(put);
        let rows = rig.rows();
        let ledger = rig.ledger();
        for row in &rows {
            assert_eq!(row.version, ledger.version_of(row), "kill {kill}, seed {seed:?}: {row:?}");
        }
        // What was put last was run by one version.
        let mut last: Vec<_> =
            rows.iter().filter(|row| row.id >= put - 100).map(|row| &row.version).collect();
        last.sort();
        last.dedup();
        assert_eq!(last.len(), 1, "kill {kill}, seed {seed:?}: {last:?}");
    }
    rig.stop();
    rig.assert_each_once_as_the_ledger_says(0..put);
}
