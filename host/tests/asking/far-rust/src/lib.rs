//! Calls the capabilities that ask other servers: lookup, http.

use serde::Deserialize;
use shardmill_sdk::http::{self, Request};
use shardmill_sdk::{Batch, BatchPlugin, Context, Descriptor, Error, Outbox, Record, Route, lookup};

const OUT: u32 = 0;

#[derive(Deserialize)]
struct Config {
    url: String,
}

struct Far {
    url: String,
}

impl BatchPlugin for Far {
    type Config = Config;

    fn configure(config: Config, _: &Context) -> Result<(Self, Descriptor), Error> {
        let descriptor = Descriptor::new("far", "0.1.0");
        Ok((Self { url: config.url }, descriptor.route(Route::new("out", "application/json"))))
    }

    fn batch(&mut self, batch: &Batch<'_>, out: &mut Outbox) -> Result<(), Error> {
        let names = batch.records().map(|record| std::str::from_utf8(record.payload()));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let rows = lookup::get("cars", &names)?;
        for ((record, name), row) in batch.records().zip(names).zip(rows) {
            match row {
                Some(row) => out.at(&record).emit(OUT, row),
                // An error here fails the whole batch: the host retries it, or searches for the culprit.
                None => out.at(&record).emit(OUT, self.ask(&record, name)?),
            }
        }
        Ok(())
    }
}

impl Far {
    fn ask(&self, record: &Record<'_>, name: &str) -> Result<Vec<u8>, Error> {
        let is_url = name.starts_with("http");
        let request = Request {
            method: "POST".into(),
            url: if is_url { name.into() } else { format!("{}{name}", self.url) },
            headers: vec![("x-key".into(), record.key().into())],
            body: name.into(),
        };
        Ok(http::send(&request)?.body)
    }
}

shardmill_sdk::export!(Far);
