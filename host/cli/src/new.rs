//! `shardmill new`: makes a plugin folder that can be built, tested and run without changes.

use std::path::PathBuf;

use super::Console;
use shardmill_workbench::manifest::Language;
use shardmill_workbench::scaffold::new_plugin;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Create a plugin folder: source, test cases, and a pipeline that runs the plugin.
    #[command(
        after_help = "Examples:\n  shardmill new plugin greet --lang rust\n  shardmill new plugin \
                      geo --lang go --dir plugins/geo"
    )]
    Plugin {
        /// Name of the plugin: a-z, 0-9, - and _.
        name: String,
        /// Language of the plugin.
        #[arg(long, value_enum)]
        lang: Language,
        /// Folder of the plugin; it must be missing or empty [default: the plugin's name, in the current
        /// folder].
        #[arg(long, value_name = "FOLDER")]
        dir: Option<PathBuf>,
    },
}

pub fn new(command: Command, console: &Console) -> anyhow::Result<()> {
    let Command::Plugin { name, lang, dir } = command;
    let folder = dir.unwrap_or_else(|| PathBuf::from(&name));
    let made = new_plugin(&name, lang, &folder)?;
    console.say(format!("created {}", made.folder.display()));
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
