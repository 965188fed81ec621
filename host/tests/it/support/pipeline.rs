//! Builder of pipeline files: it writes tables in the order in which a test adds them, with short pauses.

use std::path::{Path, PathBuf};

/// `[timing]` of every file that [`PipelineToml`] writes: pauses that are short enough for a test.
pub const SHORT_PAUSES: &str = r#"
retry_pause = "50 ms"
shard_sync = "200 ms"
checkpoint = "50 ms"
"#;

/// Builder of a pipeline's file. Each method adds a table or lines; [`PipelineToml::write`] writes the file.
#[derive(Clone)]
pub struct PipelineToml {
    folder: PathBuf,
    name: String,
    pipeline: String,
    timing: String,
    tables: String,
}

impl PipelineToml {
    /// Makes a pipeline called `name`, with its file and its state (`state/`) in `folder`.
    pub fn new(folder: &Path, name: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            pipeline: String::new(),
            timing: SHORT_PAUSES.to_owned(),
            tables: String::new(),
        }
    }

    /// Adds lines to `[pipeline]`.
    pub fn pipeline(mut self, lines: &str) -> Self {
        self.pipeline += &format!("{lines}\n");
        self
    }

    /// Replaces [`SHORT_PAUSES`] as the content of `[timing]`.
    pub fn timing(mut self, lines: &str) -> Self {
        self.timing = lines.to_owned();
        self
    }

    /// Reads a Kinesis stream at `endpoint`: `embedded`, or a URL. `lines` are further lines of `[source]`.
    pub fn stream(self, stream: &str, endpoint: &str, lines: &str) -> Self {
        self.table(&format!(
            "[source]\ntype = \"kinesis\"\nstream = \"{stream}\"\nendpoint = \"{endpoint}\"\n{lines}"
        ))
    }

    /// Reads the lines of a file as one shard.
    pub fn file(self, path: &Path, lines: &str) -> Self {
        let path = path.display();
        self.table(&format!("[source]\ntype = \"file\"\npath = \"{path}\"\n{lines}"))
    }

    /// Adds a stage with a prebuilt plugin or a component's path; `lines` are its other lines, including its routes.
    pub fn stage(self, name: &str, plugin: &str, lines: &str) -> Self {
        let path = match plugin.contains('/') {
            true => plugin.to_owned(),
            false => super::plugin(plugin),
        };
        self.table(&format!("[[stage]]\nname = \"{name}\"\nplugin = \"{path}\"\n{lines}"))
    }

    /// Adds a stage that passes JSON rows on unchanged, to these sinks.
    pub fn route_all_to(self, sinks: &[&str]) -> Self {
        let lines =
            format!("config = {{ default = \"all\", rules = [] }}\nroutes = {{ all = {sinks:?} }}");
        self.stage("route", "route-json", &lines)
    }

    /// Adds a sink that commits after 50 ms. `lines` are its type and other keys, without sub-tables such as
    /// `[sink.commit]`.
    pub fn sink(self, name: &str, lines: &str) -> Self {
        let quick = "[sink.commit]\nlinger = \"50 ms\"";
        self.table(&format!("[[sink]]\nname = \"{name}\"\n{lines}\n{quick}"))
    }

    /// Adds a sink that commits by default, or as the sub-tables in `lines` say.
    pub fn plain_sink(self, name: &str, lines: &str) -> Self {
        self.table(&format!("[[sink]]\nname = \"{name}\"\n{lines}"))
    }

    /// Adds a sink into a table of the SQLite file `mart.db` in the folder.
    pub fn sqlite(self, name: &str, table: &str) -> Self {
        let path = self.folder.join("mart.db");
        let lines =
            format!("type = \"sqlite\"\npath = \"{}\"\ntable = \"{table}\"", path.display());
        self.sink(name, &lines)
    }

    /// Adds a sink into a table of the throw-away PostgreSQL.
    pub fn postgres(self, name: &str, table: &str) -> Self {
        let url = super::postgres_url();
        self.sink(name, &format!("type = \"postgres\"\nurl = \"{url}\"\ntable = \"{table}\""))
    }

    /// Adds lines to the table that was added last, unless it ends with a sub-table.
    pub fn lines(self, lines: &str) -> Self {
        self.table(lines)
    }

    /// Adds a table as written.
    pub fn table(mut self, text: &str) -> Self {
        self.tables += &format!("{text}\n");
        self
    }

    /// Returns the file's text.
    pub fn text(&self) -> String {
        let Self { folder, name, pipeline, timing, tables } = self;
        let state = folder.join("state");
        format!(
            "[pipeline]\nname = \"{name}\"\nstate_dir = \"{}\"\n{pipeline}[timing]\n{timing}\n{tables}",
            state.display()
        )
    }

    /// Writes `pipeline.toml` into the folder; returns its path.
    pub fn write(&self) -> String {
        let path = self.folder.join("pipeline.toml");
        std::fs::write(&path, self.text()).expect("written");
        path.display().to_string()
    }
}
