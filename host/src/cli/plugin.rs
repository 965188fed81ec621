//! `shardmill plugin`: build a component, look into one.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::Console;
use crate::plugin::{Capability, Column, Context, Instance, Services, WIT_VERSION};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Compile a plugin by its language's own tools and wrap it as a component.
    #[command(
        after_help = "Example:\n  shardmill plugin build plugins/car-decode -o car-decode.wasm"
    )]
    Build {
        /// The plugin's folder, with its plugin.toml.
        folder: PathBuf,
        /// Where the component goes; default: NAME.wasm in the folder.
        #[arg(short, long)]
        out: Option<PathBuf>,
    },
    /// Show what a component is: digest, size, routes, formats, columns.
    #[command(after_help = "Example:\n  shardmill plugin inspect car-decode.wasm --config '{}'")]
    Inspect {
        /// The component.
        file: PathBuf,
        /// The configuration to show it with, as JSON.
        #[arg(long, default_value = "{}")]
        config: String,
    },
}

#[derive(Serialize)]
struct Inspection {
    file: String,
    digest: String,
    bytes: usize,
    interface: String,
    imports: Vec<Capability>,
    name: Option<String>,
    version: Option<String>,
    accepts: Vec<String>,
    needs: Vec<String>,
    routes: Vec<RouteInspection>,
    configure: Option<String>,
}

#[derive(Serialize)]
struct RouteInspection {
    name: String,
    format: String,
    columns: Vec<String>,
}

pub fn plugin(command: Command, console: &Console) -> anyhow::Result<()> {
    match command {
        Command::Build { folder, out } => build(&folder, out, console),
        Command::Inspect { file, config } => inspect(&file, config, console),
    }
}

fn build(folder: &std::path::Path, out: Option<PathBuf>, console: &Console) -> anyhow::Result<()> {
    let built = crate::plugin::build::build_plugin(folder, out.as_deref())?;
    console.say(format!("built {} ({} bytes)", built.component.display(), built.component_bytes));
    console.report(&serde_json::json!({
        "component": built.component,
        "component_bytes": built.component_bytes,
    }))
}

fn inspect(file: &std::path::Path, config: String, console: &Console) -> anyhow::Result<()> {
    let plugin = super::load_plugin(file)?;
    let context = Context {
        stream_name: "inspect".into(),
        shard_id: String::new(),
        config,
        upstream: vec![crate::stage::source_route(None)],
        extra: Vec::new(),
    };
    let services = Arc::new(Services::alone("inspect".into()));
    let configured = Instance::start(&plugin, &Default::default(), &context, &services);
    let mut inspection = Inspection {
        file: file.display().to_string(),
        digest: plugin.digest.to_string(),
        bytes: plugin.component_bytes,
        interface: format!("shardmill:plugin/stage@{WIT_VERSION}"),
        imports: plugin.capabilities.iter().copied().collect(),
        name: None,
        version: None,
        accepts: Vec::new(),
        needs: Vec::new(),
        routes: Vec::new(),
        configure: None,
    };
    match configured {
        Ok((_, descriptor)) => {
            let needed = crate::stage::needed_columns(&descriptor).map_err(anyhow::Error::msg)?;
            inspection.needs = columns(needed);
            inspection.name = Some(descriptor.name);
            inspection.version = Some(descriptor.version);
            inspection.accepts = descriptor.accepts;
            inspection.routes = descriptor.routes.into_iter().map(route).collect();
        }
        Err(error) => inspection.configure = Some(error.message),
    }
    say(&inspection, console);
    console.report(&inspection)
}

fn route(route: crate::plugin::Route) -> RouteInspection {
    RouteInspection { columns: columns(route.columns), name: route.name, format: route.format }
}

fn columns(columns: Vec<Column>) -> Vec<String> {
    let columns = columns.into_iter().map(|column| {
        let null = if column.nullable { "" } else { " not null" };
        format!("{} {}{null}", column.name, column.data_type)
    });
    columns.collect()
}

fn say(inspection: &Inspection, console: &Console) {
    console.say(format!("file     {} ({} bytes)", inspection.file, inspection.bytes));
    console.say(format!("digest   {}", inspection.digest));
    console.say(format!("exports  {}", inspection.interface));
    let imports: Vec<_> = inspection.imports.iter().map(|capability| capability.name()).collect();
    let imports = imports.join(", ");
    console.say(format!("imports  {}", if imports.is_empty() { "nothing" } else { &imports }));
    if let (Some(name), Some(version)) = (&inspection.name, &inspection.version) {
        console.say(format!("plugin   {name} {version}"));
        let accepts = inspection.accepts.join(", ");
        console.say(format!("accepts  {}", if accepts.is_empty() { "anything" } else { &accepts }));
    }
    if !inspection.needs.is_empty() {
        console.say(format!("needs    {}", inspection.needs.join(", ")));
    }
    for route in &inspection.routes {
        console.say(format!("route    {} ({})", route.name, route.format));
        for column in &route.columns {
            console.say(format!("           {column}"));
        }
    }
    if let Some(why) = &inspection.configure {
        console.say(format!("routes   unknown without its configuration: {why} (--config JSON)"));
    }
}
