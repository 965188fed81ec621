//! Standard output sink: prints rows as lines of text, at least once.
//!
//! The sink keeps no position: a printed line cannot be taken back, so after a crash the lines since the host's last
//! checkpoint are printed again. It prints to any writer that it is given.
//!
//! Rows are checked first, so that nothing of a refused row is printed. Lines are then written in pieces: a template
//! may repeat a field, so the lines of a commit, or even one line, may be much larger than the rows.
//!
//! [`TYPE`] is the entry in the program's registry of sinks: `settings` reads `type = "stdout"`, lists its keys and
//! makes the sink.

mod json;
mod pieces;
mod settings;
mod template;

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use async_trait::async_trait;

use self::pieces::Pieces;
pub use self::settings::{StdoutTarget, TYPE};
pub use self::template::TemplateError;
use self::template::{LineTemplate, RowContext};
use shardmill_config::SharedOutput;
use shardmill_core::record::BoundRoute;
use shardmill_core::record::{Position, RouteName, Row, ShardId, ShardKey, SinkName};
use shardmill_core::sink::{
    Acquired, Commit, Committed, Refusal, RefusalLog, Sink, SinkError, SinkWriter,
};
use shardmill_sinks_common::line::{LINE_MEDIA_TYPES, LineFormat};

/// Sink of lines of text.
pub struct StdoutSink {
    name: SinkName,
    template: Option<Arc<LineTemplate>>,
    output: SharedOutput,
    formats: RwLock<HashMap<RouteName, LineFormat>>,
}

impl StdoutSink {
    /// Makes a sink on the process's standard output; see [`StdoutSink::to`].
    ///
    /// # Errors
    /// An invalid template, with the place.
    pub fn new(name: SinkName, template: Option<&str>) -> Result<Self, TemplateError> {
        Self::to(name, template, Arc::new(Mutex::new(io::stdout())))
    }

    /// Makes a sink that prints each row's payload, or a line by a template. `{field}` or `{outer.inner}` is a field of
    /// the JSON payload; `{shard}`, `{sequence}`, `{key}` and `{route}` are those of the row (`{.shard}` is the
    /// payload's field with that name); `{{` and `}}` are braces.
    ///
    /// # Errors
    /// An invalid template, with the place.
    pub fn to(
        name: SinkName,
        template: Option<&str>,
        output: SharedOutput,
    ) -> Result<Self, TemplateError> {
        let template = template.map(LineTemplate::parse).transpose()?.map(Arc::new);
        Ok(Self { name, template, output, formats: RwLock::default() })
    }

    fn check_route(&self, route: &BoundRoute) -> Result<(RouteName, LineFormat), SinkError> {
        let needs_json = self.template.as_ref().is_some_and(|template| template.reads_payload());
        let (takes, way_out) = if needs_json {
            ("application/json, whose fields its template uses", "bind a route that carries JSON")
        } else {
            (LINE_MEDIA_TYPES, "add a stage that makes text of it")
        };
        match LineFormat::of_media_type(&route.format) {
            Some(format) if !needs_json || format == LineFormat::Json => {
                Ok((route.name.clone(), format))
            }
            _ => Err(SinkError::Unavailable {
                sink: self.name.clone(),
                cause: format!(
                    "route {} carries {}, this stdout sink takes {takes}: {way_out}",
                    route.name, route.format
                ),
            }),
        }
    }
}

#[async_trait]
impl Sink for StdoutSink {
    fn name(&self) -> &SinkName {
        &self.name
    }

    async fn prepare(&self, routes: &[BoundRoute]) -> Result<(), SinkError> {
        let checked = routes.iter().map(|route| self.check_route(route));
        let formats = checked.collect::<Result<HashMap<_, _>, _>>()?;
        self.formats.write().unwrap_or_else(PoisonError::into_inner).extend(formats);
        Ok(())
    }

    async fn acquire(&self, shard: &ShardKey) -> Result<Acquired, SinkError> {
        let formats = self.formats.read().unwrap_or_else(PoisonError::into_inner).clone();
        let writer = StdoutWriter {
            sink: self.name.clone(),
            printer: Arc::new(Printer {
                shard: shard.shard.clone(),
                template: self.template.clone(),
                formats,
            }),
            output: Arc::clone(&self.output),
        };
        Ok(Acquired {
            writer: Box::new(writer),
            position: None,
            keeps_position: false,
            must_cut_at: None,
        })
    }

    async fn position(&self, _shard: &ShardKey) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }
}

struct StdoutWriter {
    sink: SinkName,
    printer: Arc<Printer>,
    output: SharedOutput,
}

impl StdoutWriter {
    /// Runs work off the async threads, since the reader of the output may be slow.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, SinkError> {
        let error = match tokio::task::spawn_blocking(work).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => error,
            Err(error) => io::Error::other(error),
        };
        let sink = self.sink.clone();
        let cause = format!("failed to print rows to standard output: {error}");
        Err(match error.kind() {
            io::ErrorKind::BrokenPipe => SinkError::Closed {
                sink,
                cause: format!("{cause}: the reader has closed it; restart with a reader"),
            },
            _ => SinkError::Unavailable { sink, cause },
        })
    }
}

#[async_trait]
impl SinkWriter for StdoutWriter {
    async fn commit(
        &mut self,
        commit: &Commit,
        refusals: &dyn RefusalLog,
    ) -> Result<Committed, SinkError> {
        if commit.rows.is_empty() {
            return Ok(Committed::default());
        }
        let (printer, rows) = (Arc::clone(&self.printer), commit.rows.clone());
        let refused = self.off_thread(move || Ok(printer.refusals(&rows))).await?;
        if !refused.is_empty() {
            refusals.record(commit, &refused).await?;
        }
        let rows_refused = refused.len() as u64;
        let (printer, rows) = (Arc::clone(&self.printer), commit.rows.clone());
        let output = Arc::clone(&self.output);
        let printing = self.off_thread(move || {
            let mut pieces = Pieces::new(&output);
            printer.print(&rows, &refused, &mut pieces)?;
            pieces.finish()
        });
        let bytes_written = printing.await?;
        let rows_written = commit.rows.len() as u64 - rows_refused;
        Ok(Committed { rows_written, rows_refused, bytes_written })
    }
}

/// Printer of one shard's rows.
struct Printer {
    shard: ShardId,
    template: Option<Arc<LineTemplate>>,
    formats: HashMap<RouteName, LineFormat>,
}

impl Printer {
    /// Returns the rows that cannot be lines, ascending.
    fn refusals(&self, rows: &[Row]) -> Vec<Refusal> {
        let refusal = |(index, row)| {
            let reason = self.check(row).err()?;
            Some(Refusal { row: index, reason })
        };
        rows.iter().enumerate().filter_map(refusal).collect()
    }

    /// Writes the lines of all other rows.
    fn print(&self, rows: &[Row], refused: &[Refusal], lines: &mut dyn Write) -> io::Result<()> {
        let mut refused = refused.iter().peekable();
        for (index, row) in rows.iter().enumerate() {
            if refused.next_if(|refusal| refusal.row == index).is_some() {
                continue;
            }
            match &self.template {
                Some(template) => template.write(&RowContext { shard: &self.shard, row }, lines)?,
                None => self.format(row).write(&row.payload, lines)?,
            }
            lines.write_all(b"\n")?;
        }
        Ok(())
    }

    fn check(&self, row: &Row) -> Result<(), String> {
        match &self.template {
            Some(template) => template.check(row),
            None => self.format(row).check(&row.payload),
        }
    }

    fn format(&self, row: &Row) -> LineFormat {
        self.formats.get(row.route.name()).copied().unwrap_or(LineFormat::Text)
    }
}
