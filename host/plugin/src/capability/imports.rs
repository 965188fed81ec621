//! The functions that a plugin imports, where their arguments are texts or lists.
//!
//! Generated code would copy each argument before our code runs. Here an argument stays a view of the plugin's
//! memory until its size was checked. So what a call may cost the host is bounded before anything is copied: by the
//! limits below, and by `limits.output` for everything that crosses in one call.

use wasmtime::component::{ComponentType, HasSelf, Lift, Linker, WasmList, WasmStr};
use wasmtime::{AsContext as _, StoreContextMut};

use super::{HasCaller, HostCaller};
use crate::bindings::shardmill::plugin as wit;
use shardmill_config::Capability;
use shardmill_net::{HEADER_BYTES_MAX, HEADERS_MAX, HttpRequest, URL_BYTES_MAX};

/// A request in the plugin's memory.
#[derive(ComponentType, Lift)]
#[component(record)]
struct RequestView {
    #[component(name = "method")]
    method: WasmStr,
    #[component(name = "url")]
    url: WasmStr,
    #[component(name = "headers")]
    headers: WasmList<(WasmStr, WasmStr)>,
    #[component(name = "body")]
    body: WasmList<u8>,
}

/// Links every capability; what a component imports is compared with its stage's grants.
pub(crate) fn offer<T: HasCaller>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    wit::clock::add_to_linker::<_, HasSelf<HostCaller>>(linker, T::caller_mut)?;
    wit::random::add_to_linker::<_, HasSelf<HostCaller>>(linker, T::caller_mut)?;
    offer_log(linker)?;
    offer_metrics(linker)?;
    let mut lookup = linker.instance(&Capability::Lookup.interface())?;
    type Get = (WasmStr, WasmList<u8>, WasmList<u32>);
    lookup.func_wrap("get", |mut store: StoreContextMut<'_, T>, (name, arena, keys): Get| {
        let caller = store.data().caller();
        caller.granted(Capability::Lookup)?;
        let name = name.to_str(store.as_context())?;
        let arena = arena.as_le_slice(store.as_context());
        let keys = keys.as_le_slice(store.as_context());
        // From here on, time counts as the host's: a slow table does not use up the plugin's CPU time.
        let call = caller.clock.host_begins("lookup.get");
        let found = caller.look_up(&name, (arena, keys), call.deadline);
        drop(name);
        store.data_mut().caller_mut().clock.host_ended(call);
        Ok((found?,))
    })?;
    let mut http = linker.instance(&Capability::Http.interface())?;
    http.func_wrap("send", |mut store: StoreContextMut<'_, T>, (view,): (RequestView,)| {
        store.data().caller().granted(Capability::Http)?;
        let request = match store.data().caller().unavailable(Capability::Http) {
            Some(why) => Err(why),
            None => copied(&mut store, &view)?,
        };
        let sent = match request {
            Ok(request) => store.data_mut().caller_mut().send(request)?,
            Err(message) => Err(wit::http::Failure { retryable: false, message }),
        };
        Ok((sent,))
    })
}

fn offer_log<T: HasCaller>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    let mut log = linker.instance(&Capability::Log.interface())?;
    type Write = (wit::log::Level, WasmStr);
    log.func_wrap("write", |store: StoreContextMut<'_, T>, (level, message): Write| {
        let caller = store.data().caller();
        caller.granted(Capability::Log)?;
        // A dropped line is not read.
        if caller.takes_line() {
            caller.write(level, &message.to_str(store.as_context())?);
        }
        Ok(())
    })
}

fn offer_metrics<T: HasCaller>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    let mut metrics = linker.instance(&Capability::Metrics.interface())?;
    type Register = (wit::metrics::Kind, WasmStr, WasmStr);
    metrics.func_wrap(
        "register",
        |mut store: StoreContextMut<'_, T>, (kind, name, help): Register| {
            store.data().caller().granted(Capability::Metrics)?;
            let name = beginning(&name.to_str(store.as_context())?);
            let help = beginning(&help.to_str(store.as_context())?);
            Ok((store.data_mut().caller_mut().register(kind, &name, &help),))
        },
    )?;
    type Observe = (u32, f64);
    metrics.func_wrap("observe", |mut store: StoreContextMut<'_, T>, (metric, value): Observe| {
        store.data().caller().granted(Capability::Metrics)?;
        store.data_mut().caller_mut().observe(metric, value)
    })
}

/// Returns the first KiB of a text: names and help texts are much shorter, and are validated afterwards.
fn beginning(text: &str) -> String {
    text[..text.floor_char_boundary(1 << 10)].to_owned()
}

/// Copies a request out of the plugin's memory, or says which part of it is too large.
fn copied<T: HasCaller>(
    store: &mut StoreContextMut<'_, T>,
    view: &RequestView,
) -> wasmtime::Result<Result<HttpRequest, String>> {
    if view.headers.len() > HEADERS_MAX {
        return Ok(Err(format!("the request has more than {HEADERS_MAX} headers")));
    }
    let mut header_bytes = 0;
    let mut headers = Vec::with_capacity(view.headers.len());
    for index in 0..view.headers.len() {
        let Some(header) = view.headers.get(&mut *store, index) else { break };
        let (name, value) = header?;
        let (name, value) = (name.to_str(store.as_context())?, value.to_str(store.as_context())?);
        header_bytes += name.len() + value.len();
        if header_bytes > HEADER_BYTES_MAX {
            return Ok(Err(format!(
                "the request has more than {HEADER_BYTES_MAX} bytes of headers"
            )));
        }
        headers.push((name.into_owned(), value.into_owned()));
    }
    let method = view.method.to_str(store.as_context())?;
    let url = view.url.to_str(store.as_context())?;
    if method.len() + url.len() > URL_BYTES_MAX {
        return Ok(Err(format!("the URL has more than {URL_BYTES_MAX} bytes")));
    }
    let body = view.body.as_le_slice(store.as_context()).to_vec();
    Ok(Ok(HttpRequest { method: method.into_owned(), url: url.into_owned(), headers, body }))
}
