//! {{name}}: greets. Takes `{"name":"Ada"}`, gives `{"greeting":"Hello, Ada!"}` on the route `out`.

use serde::{Deserialize, Serialize};
use shardmill_sdk::{Context, Descriptor, Emitter, Error, NoConfig, Plugin, Record, Route};

/// The routes, in the order in which they are declared.
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
    /// The TOML table `[stage.config]`: give it a struct of your own.
    type Config = NoConfig;

    fn configure(_: NoConfig, _: &Context) -> Result<(Self, Descriptor), Error> {
        let out = Route::new("out", "application/json").column("greeting", "text");
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("application/json")
            .route(out);
        Ok((Greet, descriptor))
    }

    /// An error rejects the record: it is kept with the reason, and its neighbours go on.
    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        let person: Person = serde_json::from_slice(record.payload())?;
        let greeting = format!("Hello, {}!", person.name); // edit me
        out.emit_json(OUT, &Greeting { greeting })
    }
}

shardmill_sdk::export!(Greet);
