//! `shardmill intake`: only the HTTP intake of a pipeline, for hosts that run no worker.

use anyhow::Context as _;
use shardmill_core::boxed;

use super::{Console, PipelineFile, load, signals, stream};
use shardmill_kinesis::put_call::StreamWriter;
use shardmill_serve::admin::AdminPort;
use shardmill_serve::admin::access::Access;
use shardmill_serve::intake::IntakePort;

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pipeline: PipelineFile,
}

#[boxed]
pub async fn intake(options: Options, console: &Console) -> anyhow::Result<()> {
    let config = load(&options.pipeline.file)?;
    let file = options.pipeline.file.display();
    let missing = || format!("{file} has no intake: add [intake] with listen = \"127.0.0.1:8080\"");
    let intake = config.intake.as_ref().with_context(missing)?;
    let kinesis = config.source.kinesis().with_context(missing)?;
    let admin = match &config.admin {
        Some(admin) => Some((AdminPort::open(admin, config.timing.http).await?, admin)),
        None => None,
    };
    let port = IntakePort::open(intake, config.timing.http).await?;
    let stop = signals::stop_on_signals(config.timing.drain_max)?;
    let reach = async {
        let client = stream::intake_client(&config, kinesis, None).await?;
        stream::ensure(&client, kinesis).await?;
        anyhow::Ok(client)
    };
    let Some(client) = stop.unless_asked(reach).await else { return Ok(()) };
    let client = client?;
    if let Some((admin, admin_config)) = admin {
        console.say(format!("admin http://{}", admin.address()));
        // No lanes run here and nothing can be changed: the port is for metrics only.
        let access = Access::of(admin_config, None);
        admin.serve(Vec::new(), None, access, stop.token().clone());
    }
    let address = port.address();
    let writer = StreamWriter::new(client, kinesis.stream.value.clone());
    let serving = port.serve(writer, stop.token().clone());
    console.say(format!("intake http://{address}/events"));
    console.report(&serde_json::json!({ "intake": format!("http://{address}/events") }))?;
    serving.finished(&stop).await;
    Ok(())
}
