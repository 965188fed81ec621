//! Development tasks: `cargo xtask TASK`. One module per task.

mod bench;
mod bindings;
mod book;
mod data;
mod deny;
mod documentation;
mod fuzz;
mod graph;
mod kinesis_local;
mod languages;
mod plugins;
mod postgres;
mod process;
#[cfg(test)]
mod profiles;
mod soak;
mod test;
mod tools;
mod wasm_toolchain;
mod words;

use anyhow::Result;
use clap::Parser;

/// Development tasks of shardmill.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Task {
    Plugins(plugins::Plugins),
    Bindings(bindings::Bindings),
    Data(data::Data),
    Test(test::Test),
    WithParts(test::WithParts),
    Deny(deny::Deny),
    Soak(soak::Soak),
    Bench(bench::Bench),
    Book(book::Book),
    Graph(graph::Graph),
    Words(words::Words),
}

fn main() -> Result<()> {
    if let Some(out_dir) = documentation::is_asked_as_rustdoc() {
        return documentation::stand_in_for_rustdoc(&out_dir);
    }
    match Task::parse() {
        Task::Plugins(task) => task.run(),
        Task::Bindings(task) => task.run(),
        Task::Data(task) => task.run(),
        Task::Test(task) => task.run(),
        Task::WithParts(task) => task.run(),
        Task::Deny(task) => task.run(),
        Task::Soak(task) => task.run(),
        Task::Bench(task) => task.run(),
        Task::Book(task) => task.run(),
        Task::Graph(task) => task.run(),
        Task::Words(task) => task.run(),
    }
}
