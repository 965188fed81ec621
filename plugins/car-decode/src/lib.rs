//! Decodes cars: bincode `Car { id: u64, make: String }` to a JSON row.
//!
//! | | |
//! |---|---|
//! | accepts | `application/x-bincode` |
//! | route `cars` | `application/json`: `{"id":7,"make":"Honda 7"}` |
//! | columns | `id bigint`, `make text` |
//! | configuration | none |
//!
//! The bytes are those of bincode's *standard* configuration (little-endian, integers of variable length). A
//! payload must contain one car and nothing after it; any other payload is rejected with a reason.
//!
//! A host reads `bigint` as a signed 64-bit integer: an id above 2^63 - 1 is decoded here, and the table
//! refuses its row.

use bincode::config::{self, Config};
use bincode::error::DecodeError;
use serde::{Deserialize, Serialize};
use shardmill_sdk::{Context, Descriptor, Emitter, Error, NoConfig, Plugin, Record, Route, Writer};

/// Maximum bytes that a car may claim to have, whatever the length of its payload: a corrupt length must not
/// cause an allocation.
const CAR_BYTES_MAX: usize = 1 << 20;

const ROUTE_CARS: u32 = 0;

/// A car, borrowed from its payload.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Car<'a> {
    /// Id of the car.
    pub id: u64,
    /// Maker and model, such as `Honda 7`.
    pub make: &'a str,
}

impl<'a> Car<'a> {
    /// Decodes a payload that contains one car.
    ///
    /// # Errors
    ///
    /// The payload is empty, truncated or too large, the make is not UTF-8, or bytes follow the car.
    #[inline]
    pub fn decode(payload: &'a [u8]) -> Result<Self, Error> {
        let (car, length) = bincode::serde::borrow_decode_from_slice(payload, bincode_config())
            .map_err(|error| refusal(payload, &error))?;
        if length != payload.len() {
            let trailing = payload.len() - length;
            return Err(Error::reject(format!("{trailing} bytes follow the car's {length}")));
        }
        Ok(car)
    }
}

/// Decodes a payload and writes its row. This is all of the plugin's work on a record.
///
/// # Errors
///
/// As [`Car::decode`].
#[inline]
pub fn write_row(payload: &[u8], row: &mut Writer<'_>) -> Result<(), Error> {
    let Car { id, make } = Car::decode(payload)?;
    row.append(b"{\"id\":");
    serde_json::to_writer(&mut *row, &id)?;
    row.append(b",\"make\":");
    row.append_json_string(make);
    row.append(b"}");
    Ok(())
}

/// The plugin. It is public for native tests and benches.
pub struct CarDecode;

impl Plugin for CarDecode {
    type Config = NoConfig;

    fn configure(_: NoConfig, _: &Context) -> Result<(Self, Descriptor), Error> {
        let cars =
            Route::new("cars", "application/json").column("id", "bigint").column("make", "text");
        let descriptor = Descriptor::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .accepts("application/x-bincode")
            .route(cars);
        Ok((CarDecode, descriptor))
    }

    fn record(&mut self, record: &Record<'_>, out: &mut Emitter<'_>) -> Result<(), Error> {
        out.emit_with(ROUTE_CARS, |row| write_row(record.payload(), row))
    }
}

shardmill_sdk::export!(CarDecode);

fn bincode_config() -> impl Config {
    config::standard().with_limit::<CAR_BYTES_MAX>()
}

#[cold]
fn refusal(payload: &[u8], error: &DecodeError) -> Error {
    let length = payload.len();
    match error {
        _ if payload.is_empty() => Error::reject("empty payload: expected a bincode car"),
        DecodeError::UnexpectedEnd { additional } => Error::reject(format!(
            "truncated car: found {length} bytes, expected at least {additional} more"
        )),
        DecodeError::LimitExceeded => {
            Error::reject(format!("the car claims more than {CAR_BYTES_MAX} bytes"))
        }
        DecodeError::Utf8 { inner } => Error::reject(format!("the car's make: {inner}")),
        other => Error::reject(format!("no bincode car: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use shardmill_sdk::testing::{Fate, Harness};

    use super::*;

    fn encode(car: &Car<'_>) -> Vec<u8> {
        bincode::serde::encode_to_vec(car, config::standard()).unwrap()
    }

    fn reason(payload: &[u8]) -> String {
        match Harness::<CarDecode>::new("{}").unwrap().run_one(payload) {
            Fate::Rejected(reason) => reason,
            other => panic!("not rejected: {other:?}"),
        }
    }

    #[test]
    fn a_car_becomes_a_row() {
        let mut plugin = Harness::<CarDecode>::new("{}").unwrap();
        let honda = encode(&Car { id: 7, make: "Honda 7" });
        assert_eq!(
            plugin.run_one(&honda),
            Fate::delivered("cars", br#"{"id":7,"make":"Honda 7"}"#)
        );
        let extreme = encode(&Car { id: u64::MAX, make: "\"\\\n\u{1F697}" });
        assert_eq!(
            plugin.run_one(&extreme),
            Fate::delivered(
                "cars",
                "{\"id\":18446744073709551615,\"make\":\"\\\"\\\\\\n\u{1F697}\"}".as_bytes()
            )
        );
    }

    #[test]
    fn every_truncation_is_rejected() {
        let honda = encode(&Car { id: 70_000, make: "Honda 70000" });
        assert_eq!(reason(b""), "empty payload: expected a bincode car");
        for length in 1..honda.len() {
            let reason = reason(&honda[..length]);
            assert!(reason.starts_with("truncated car: "), "{length}: {reason}");
        }
    }

    #[test]
    fn trailing_bytes_are_rejected() {
        let mut honda = encode(&Car { id: 7, make: "Honda 7" });
        honda.extend_from_slice(b"!!");
        assert_eq!(reason(&honda), "2 bytes follow the car's 9");
    }

    #[test]
    fn invalid_utf8_is_rejected() {
        assert!(reason(b"\x07\x02\xff\xfe").starts_with("the car's make: invalid utf-8"));
    }

    #[test]
    fn a_wild_length_allocates_nothing() {
        let mut claim = vec![7, 253];
        claim.extend_from_slice(&(u64::MAX / 2).to_le_bytes());
        assert_eq!(reason(&claim), format!("the car claims more than {CAR_BYTES_MAX} bytes"));
    }

    #[test]
    fn garbage_is_rejected_alone() {
        let mut plugin = Harness::<CarDecode>::new("{}").unwrap();
        let honda = encode(&Car { id: 7, make: "Honda 7" });
        let garbage = vec![0xff; 1 << 20];
        let fates = plugin.run(&[&honda, &garbage, &honda]).unwrap();
        assert_eq!(fates[0], fates[2]);
        assert!(matches!(fates[1], Fate::Rejected(_)), "{:?}", fates[1]);
    }

    #[test]
    fn a_configuration_is_refused() {
        let error = Harness::<CarDecode>::new(r#"{"colour":"red"}"#).err().unwrap();
        assert!(error.contains("unknown field `colour`"), "{error}");
    }
}
