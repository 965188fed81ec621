//! `shardmill new`: a plugin's folder that builds, is tested and runs as it is.

use std::path::PathBuf;

use super::Console;
use shardmill_workbench::manifest::Language;
use shardmill_workbench::scaffold::new_plugin;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a plugin's folder: its source, test cases, and a pipeline that runs it.
    #[command(
        after_help = "Examples:\n  shardmill new plugin greet --lang rust\n  shardmill new plugin \
                      geo --lang go --dir plugins/geo"
    )]
    Plugin {
        /// The plugin's name: a-z, 0-9, - and _.
        name: String,
        /// The language that it is written in.
        #[arg(long, value_enum)]
        lang: Language,
        /// Its folder, missing or empty; default: its name, here.
        #[arg(long, value_name = "FOLDER")]
        dir: Option<PathBuf>,
    },
}

pub fn new(command: Command, console: &Console) -> anyhow::Result<()> {
    let Command::Plugin { name, lang, dir } = command;
    let folder = dir.unwrap_or_else(|| PathBuf::from(&name));
    let made = new_plugin(&name, lang, &folder)?;
    console.say(format!("made {}", made.folder.display()));
    for file in &made.files {
        console.say(format!("  {}", file.display()));
    }
    console.say(format!("next: cd {}; shardmill test && shardmill run", made.folder.display()));
    console.report(&serde_json::json!({
        "name": name,
        "folder": made.folder,
        "files": made.files,
    }))
}
