//! Limits on time, memory and features of plugins.

mod features;
mod starts;
mod time;

/// Returns a loop for a core module that takes about as many nanoseconds of CPU time as it has turns.
fn work(turns: u64) -> String {
    format!(
        "(local.set $turns (i64.const {turns}))
         (loop $work
           (local.set $turns (i64.sub (local.get $turns) (i64.const 1)))
           (br_if $work (i64.ne (local.get $turns) (i64.const 0))))"
    )
}

/// Asserts that a compiler's output uses at most half of each limit on parts. Called for everything that the tests
/// build, in each of the five languages.
pub fn assert_parts_fit(component: &std::path::Path) {
    let bytes = std::fs::read(component).expect("a component");
    let (found, most) = (features::parts(&bytes), shardmill_plugin::PARTS_MAX);
    let fits = [
        found.memories * 2 <= most.memories,
        found.tables * 2 <= most.tables,
        found.instances * 2 <= most.instances,
        found.links * 2 <= most.links,
    ];
    assert_eq!(fits, [true; 4], "{}: {found:?} of {most:?}", component.display());
}
