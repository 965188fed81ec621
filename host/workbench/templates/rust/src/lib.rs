//! {{name}}: greets. Accepts `{"name":"Ada"}`, emits `{"greeting":"Hello, Ada!"}` on the route `out`.

use serde::{Deserialize, Serialize};
use shardmill_sdk::{Context, Descriptor, Emitter, Error, NoConfig, Plugin, Record, Route};

/// Routes, in the order of their declaration.
const OUT: u32 = 0;

#[derive(Deserialize)]
struct Person {
    name: String,
}

#[derive(Serialize)]
struct Greeting {
    greeting: String,
}

struct Greet;

impl Plugin for Greet {
    /// Type of the TOML table `[stage.config]`; use a struct of your own.
    type Config = NoConfig;

    fn configure(_: NoConfig, _: &Context) -> Result<(Self, Descriptor), Error> {
        let out = Route::new("out", "application/json").column("greeting", "text");
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("application/json")
            .route(out);
        Ok((Greet, descriptor))
    }

    /// An error rejects the record: it becomes a dead letter with the reason. Other records are not affected.
    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        let person: Person = serde_json::from_slice(record.payload())?;
        let greeting = format!("Hello, {}!", person.name); // edit me
        out.emit_json(OUT, &Greeting { greeting })
    }
}

shardmill_sdk::export!(Greet);
