//! Bounds of the answers of a store. `object_store` reads lists and errors whole before it parses them, so their length
//! is bounded in the HTTP client. Objects are read piece by piece, up to their expected length ([`read`]).

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt as _;
use http_body_util::{BodyExt as _, Limited};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService, ReqwestConnector,
};
use object_store::path::Path;
use object_store::{ClientOptions, GetResultPayload, ObjectStore, ObjectStoreExt as _};

/// Most bytes of an answer that is not an object. A page of a list has a thousand keys of 1,024 characters.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Reads an object of at most `bytes_max` bytes.
///
/// # Errors
/// The store's error, or that the object is longer.
pub(super) async fn read(
    store: &dyn ObjectStore,
    path: &Path,
    bytes_max: u64,
) -> object_store::Result<Bytes> {
    let found = store.get(path).await?;
    let too_long = || object_store::Error::Generic {
        store: "objects",
        source: format!("expected an object of at most {bytes_max} bytes, found a longer one")
            .into(),
    };
    if found.meta.size > bytes_max {
        return Err(too_long());
    }
    if let GetResultPayload::File(..) = &found.payload {
        return found.bytes().await;
    }
    // The length that a server reports may be wrong.
    let (mut pieces, mut bytes) = (found.into_stream(), BytesMut::new());
    while let Some(piece) = pieces.try_next().await? {
        if (bytes.len() + piece.len()) as u64 > bytes_max {
            return Err(too_long());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}

/// Connector that bounds the answers of the default connector, except objects.
#[derive(Debug)]
pub(super) struct Bounded;

impl HttpConnector for Bounded {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(BoundedClient(client)))
    }
}

#[derive(Debug)]
struct BoundedClient(HttpClient);

#[async_trait]
impl HttpService for BoundedClient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let may_be_object =
            request.method() == "GET" && !request.uri().query().is_some_and(is_list);
        let answer = self.0.execute(request).await?;
        if may_be_object && answer.status().is_success() {
            return Ok(answer);
        }
        Ok(answer.map(|body| {
            let body = Limited::new(body, ANSWER_BYTES_MAX).map_err(|error| {
                error.downcast::<HttpError>().map_or_else(
                    |error| HttpError::new_boxed(HttpErrorKind::Unknown, error),
                    |error| *error,
                )
            });
            HttpResponseBody::new(body)
        }))
    }
}

/// Returns whether a query requests a list.
///
/// Source: the REST references of S3 and Cloud Storage (`list-type`) and of Azure (`comp`).
fn is_list(query: &str) -> bool {
    url::form_urlencoded::parse(query.as_bytes())
        .any(|(name, value)| name == "list-type" || (name == "comp" && value == "list"))
}
