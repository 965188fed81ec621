//! The types and the export glue that wit-bindgen 0.61.1 generates from `wit/0.1.0` of SHA-256
//! fe0d0526495012673161965e89e65ec199c3f205667325a09b9928c63d9537e2.
//! Do not edit: `cargo xtask bindings` writes it.
#![allow(clippy::all, clippy::restriction, reason = "generated")]

#[allow(dead_code, clippy::all)]
pub mod shardmill {
    pub mod plugin {
        /// Functions of the host that a plugin may call. Each interface is a capability: a
        /// plugin that imports one is refused at load unless its stage grants it by name, under
        /// `[stage.grant]`. A capability that is not used costs nothing, and is not imported.
        ///
        /// Whatever a capability answers may differ at a replay. `check` warns where such a stage
        /// feeds more than one exactly-once sink.
        /// `log`: lines in the host's log, tagged with the stage, the plugin's version and the shard.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod log {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            /// The severity of a line.
            #[repr(u8)]
            #[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
            pub enum Level {
                Trace,
                Debug,
                Info,
                Warn,
                Error,
            }
            impl ::core::fmt::Debug for Level {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    match self {
                        Level::Trace => f.debug_tuple("Level::Trace").finish(),
                        Level::Debug => f.debug_tuple("Level::Debug").finish(),
                        Level::Info => f.debug_tuple("Level::Info").finish(),
                        Level::Warn => f.debug_tuple("Level::Warn").finish(),
                        Level::Error => f.debug_tuple("Level::Error").finish(),
                    }
                }
            }
            impl Level {
                #[doc(hidden)]
                pub unsafe fn _lift(val: u8) -> Level {
                    if !cfg!(debug_assertions) {
                        return unsafe { ::core::mem::transmute(val) };
                    }
                    match val {
                        0 => Level::Trace,
                        1 => Level::Debug,
                        2 => Level::Info,
                        3 => Level::Warn,
                        4 => Level::Error,
                        _ => panic!("invalid enum discriminant"),
                    }
                }
            }
            #[allow(unused_unsafe, clippy::all)]
            /// Writes one line. Line ends within it are shown escaped; it is cut at 8 KiB. More lines
            /// than the stage's limit allows are counted and dropped, and the count is logged.
            #[allow(async_fn_in_trait)]
            pub fn write(level: Level, message: &str) -> () {
                unsafe {
                    let vec0 = message;
                    let ptr0 = vec0.as_ptr().cast::<u8>();
                    let len0 = vec0.len();
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/log@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "write"]
                        fn wit_import1(_: i32, _: *mut u8, _: usize);
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import1(_: i32, _: *mut u8, _: usize) {
                        unreachable!()
                    }
                    wit_import1(level.clone() as i32, ptr0.cast_mut(), len0);
                }
            }
        }
        /// `metrics`: time series of the plugin, beside those of the host, with the stage as a label.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod metrics {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            use super::super::super::_rt;
            /// How a metric combines the values that it is given.
            #[repr(u8)]
            #[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
            pub enum Kind {
                /// Adds them up.
                Counter,
                /// Keeps the last one.
                Gauge,
                /// Counts how they are distributed.
                Histogram,
            }
            impl ::core::fmt::Debug for Kind {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    match self {
                        Kind::Counter => f.debug_tuple("Kind::Counter").finish(),
                        Kind::Gauge => f.debug_tuple("Kind::Gauge").finish(),
                        Kind::Histogram => f.debug_tuple("Kind::Histogram").finish(),
                    }
                }
            }
            impl Kind {
                #[doc(hidden)]
                pub unsafe fn _lift(val: u8) -> Kind {
                    if !cfg!(debug_assertions) {
                        return unsafe { ::core::mem::transmute(val) };
                    }
                    match val {
                        0 => Kind::Counter,
                        1 => Kind::Gauge,
                        2 => Kind::Histogram,
                        _ => panic!("invalid enum discriminant"),
                    }
                }
            }
            #[allow(unused_unsafe, clippy::all)]
            /// Announces a metric. Only in `configure`; the same name gives the same metric again. The
            /// name is `[a-z][a-z0-9_]*`, at most 64 characters; it is shown as `shardmill_plugin_NAME`.
            /// At most 32 a plugin. The number is for `observe`.
            #[allow(async_fn_in_trait)]
            pub fn register(
                kind: Kind,
                name: &str,
                help: &str,
            ) -> ::core::result::Result<u32, _rt::String> {
                unsafe {
                    #[cfg_attr(target_pointer_width = "64", repr(align(8)))]
                    #[cfg_attr(target_pointer_width = "32", repr(align(4)))]
                    struct RetArea(
                        [::core::mem::MaybeUninit<u8>; 3 * ::core::mem::size_of::<*const u8>()],
                    );
                    let mut ret_area = RetArea(
                        [::core::mem::MaybeUninit::uninit();
                            3 * ::core::mem::size_of::<*const u8>()],
                    );
                    let vec0 = name;
                    let ptr0 = vec0.as_ptr().cast::<u8>();
                    let len0 = vec0.len();
                    let vec1 = help;
                    let ptr1 = vec1.as_ptr().cast::<u8>();
                    let len1 = vec1.len();
                    let ptr2 = ret_area.0.as_mut_ptr().cast::<u8>();
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/metrics@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "register"]
                        fn wit_import3(
                            _: i32,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                        );
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import3(
                        _: i32,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                    ) {
                        unreachable!()
                    }
                    wit_import3(
                        kind.clone() as i32,
                        ptr0.cast_mut(),
                        len0,
                        ptr1.cast_mut(),
                        len1,
                        ptr2,
                    );
                    let l4 = i32::from(*ptr2.add(0).cast::<u8>());
                    let result9 = match l4 {
                        0 => {
                            let e = {
                                let l5 =
                                    *ptr2.add(::core::mem::size_of::<*const u8>()).cast::<i32>();
                                l5 as u32
                            };
                            Ok(e)
                        }
                        1 => {
                            let e = {
                                let l6 = *ptr2
                                    .add(::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l7 = *ptr2
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let len8 = l7;
                                let bytes8 = _rt::Vec::from_raw_parts(l6.cast(), len8, len8);
                                _rt::string_lift(bytes8)
                            };
                            Err(e)
                        }
                        _ => _rt::invalid_enum_discriminant(),
                    };
                    result9
                }
            }
            #[allow(unused_unsafe, clippy::all)]
            /// Gives a metric a value. A number that `register` did not give is a trap. A counter
            /// ignores values below 0; values that are not finite are ignored.
            #[allow(async_fn_in_trait)]
            pub fn observe(metric: u32, value: f64) -> () {
                unsafe {
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/metrics@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "observe"]
                        fn wit_import0(_: i32, _: f64);
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import0(_: i32, _: f64) {
                        unreachable!()
                    }
                    wit_import0(_rt::as_i32(&metric), _rt::as_f64(&value));
                }
            }
        }
        /// `lookup`: rows of reference tables, by key, through a query that the pipeline names.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod lookup {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            use super::super::super::_rt;
            /// The rows found, in the order of the keys asked for.
            #[derive(Clone)]
            pub struct Found {
                /// The bytes that `rows` points into.
                pub arena: _rt::Vec<u8>,
                /// Two words per key: the span of its row, a JSON object in UTF-8; or none (4294967295,
                /// 0) where the query has no row for it.
                pub rows: _rt::Vec<u32>,
            }
            impl ::core::fmt::Debug for Found {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Found")
                        .field("arena", &self.arena)
                        .field("rows", &self.rows)
                        .finish()
                }
            }
            /// A lookup that was not answered.
            #[derive(Clone)]
            pub struct Failure {
                /// True: the same lookup may succeed later. Return it as the failure of the batch.
                pub retryable: bool,
                /// The reason, for people.
                pub message: _rt::String,
            }
            impl ::core::fmt::Debug for Failure {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Failure")
                        .field("retryable", &self.retryable)
                        .field("message", &self.message)
                        .finish()
                }
            }
            impl ::core::fmt::Display for Failure {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    write!(f, "{:?}", self)
                }
            }
            impl ::core::error::Error for Failure {}
            #[allow(unused_unsafe, clippy::all)]
            /// Asks the table `name` for the rows of `keys`: two words per key, the span of its text
            /// (UTF-8) in `arena`. Ask for all keys of a batch at once: what is not in the host's
            /// cache is fetched by one query.
            #[allow(async_fn_in_trait)]
            pub fn get(
                name: &str,
                arena: &[u8],
                keys: &[u32],
            ) -> ::core::result::Result<Found, Failure> {
                unsafe {
                    #[cfg_attr(target_pointer_width = "64", repr(align(8)))]
                    #[cfg_attr(target_pointer_width = "32", repr(align(4)))]
                    struct RetArea(
                        [::core::mem::MaybeUninit<u8>; 5 * ::core::mem::size_of::<*const u8>()],
                    );
                    let mut ret_area = RetArea(
                        [::core::mem::MaybeUninit::uninit();
                            5 * ::core::mem::size_of::<*const u8>()],
                    );
                    let vec0 = name;
                    let ptr0 = vec0.as_ptr().cast::<u8>();
                    let len0 = vec0.len();
                    let vec1 = arena;
                    let ptr1 = vec1.as_ptr().cast::<u8>();
                    let len1 = vec1.len();
                    let vec2 = keys;
                    let ptr2 = vec2.as_ptr().cast::<u8>();
                    let len2 = vec2.len();
                    let ptr3 = ret_area.0.as_mut_ptr().cast::<u8>();
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/lookup@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "get"]
                        fn wit_import4(
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                        );
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import4(
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                    ) {
                        unreachable!()
                    }
                    wit_import4(
                        ptr0.cast_mut(),
                        len0,
                        ptr1.cast_mut(),
                        len1,
                        ptr2.cast_mut(),
                        len2,
                        ptr3,
                    );
                    let l5 = i32::from(*ptr3.add(0).cast::<u8>());
                    let result16 = match l5 {
                        0 => {
                            let e =
                                {
                                    let l6 = *ptr3
                                        .add(::core::mem::size_of::<*const u8>())
                                        .cast::<*mut u8>();
                                    let l7 = *ptr3
                                        .add(2 * ::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let len8 = l7;
                                    let l9 = *ptr3
                                        .add(3 * ::core::mem::size_of::<*const u8>())
                                        .cast::<*mut u8>();
                                    let l10 = *ptr3
                                        .add(4 * ::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let len11 = l10;
                                    Found {
                                        arena: <_ as From<_rt::Vec<_>>>::from(
                                            _rt::Vec::from_raw_parts(l6.cast(), len8, len8),
                                        ),
                                        rows: <_ as From<_rt::Vec<_>>>::from(
                                            _rt::Vec::from_raw_parts(l9.cast(), len11, len11),
                                        ),
                                    }
                                };
                            Ok(e)
                        }
                        1 => {
                            let e = {
                                let l12 = i32::from(
                                    *ptr3.add(::core::mem::size_of::<*const u8>()).cast::<u8>(),
                                );
                                let l13 = *ptr3
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l14 = *ptr3
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let len15 = l14;
                                let bytes15 = _rt::Vec::from_raw_parts(l13.cast(), len15, len15);
                                Failure {
                                    retryable: _rt::bool_lift(l12 as u8),
                                    message: _rt::string_lift(bytes15),
                                }
                            };
                            Err(e)
                        }
                        _ => _rt::invalid_enum_discriminant(),
                    };
                    result16
                }
            }
        }
        /// `clock`: the time of day. Without it, a plugin knows the time at which each record arrived.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod clock {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            #[allow(unused_unsafe, clippy::all)]
            /// Milliseconds since the Unix epoch.
            #[allow(async_fn_in_trait)]
            pub fn now_ms() -> u64 {
                unsafe {
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/clock@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "now-ms"]
                        fn wit_import0() -> i64;
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import0() -> i64 {
                        unreachable!()
                    }
                    let ret = wit_import0();
                    ret as u64
                }
            }
        }
        /// `random`: unpredictable numbers. Without it, a plugin can derive numbers from each record, which
        /// a replay repeats.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod random {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            #[allow(unused_unsafe, clippy::all)]
            /// 64 random bits.
            #[allow(async_fn_in_trait)]
            pub fn next_u64() -> u64 {
                unsafe {
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/random@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "next-u64"]
                        fn wit_import0() -> i64;
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import0() -> i64 {
                        unreachable!()
                    }
                    let ret = wit_import0();
                    ret as u64
                }
            }
        }
        /// `http`: requests to the hosts that the stage's grant lists, and to no other. Headers with
        /// secrets are added by the host; the plugin never sees them.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod http {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            use super::super::super::_rt;
            /// A request.
            #[derive(Clone)]
            pub struct Request {
                /// Such as `GET`.
                pub method: _rt::String,
                /// `https://` or `http://`, with a host that is granted.
                pub url: _rt::String,
                /// Names and values.
                pub headers: _rt::Vec<(_rt::String, _rt::String)>,
                /// Empty: none.
                pub body: _rt::Vec<u8>,
            }
            impl ::core::fmt::Debug for Request {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Request")
                        .field("method", &self.method)
                        .field("url", &self.url)
                        .field("headers", &self.headers)
                        .field("body", &self.body)
                        .finish()
                }
            }
            /// A response, whatever its status. Redirects are not followed.
            #[derive(Clone)]
            pub struct Response {
                /// Such as 200.
                pub status: u16,
                /// Names in lower case, and values.
                pub headers: _rt::Vec<(_rt::String, _rt::String)>,
                /// At most the grant's limit; beyond, the request fails.
                pub body: _rt::Vec<u8>,
            }
            impl ::core::fmt::Debug for Response {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Response")
                        .field("status", &self.status)
                        .field("headers", &self.headers)
                        .field("body", &self.body)
                        .finish()
                }
            }
            /// A request without a response.
            #[derive(Clone)]
            pub struct Failure {
                /// True: the same request may succeed later. False: it is not allowed, or invalid.
                pub retryable: bool,
                /// The reason, for people.
                pub message: _rt::String,
            }
            impl ::core::fmt::Debug for Failure {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Failure")
                        .field("retryable", &self.retryable)
                        .field("message", &self.message)
                        .finish()
                }
            }
            impl ::core::fmt::Display for Failure {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    write!(f, "{:?}", self)
                }
            }
            impl ::core::error::Error for Failure {}
            #[allow(unused_unsafe, clippy::all)]
            /// Sends a request and waits for the response, at most for the stage's `host_time`. The wait does
            /// not count towards the time of the call.
            #[allow(async_fn_in_trait)]
            pub fn send(request: &Request) -> ::core::result::Result<Response, Failure> {
                unsafe {
                    #[cfg_attr(target_pointer_width = "64", repr(align(8)))]
                    #[cfg_attr(target_pointer_width = "32", repr(align(4)))]
                    struct RetArea(
                        [::core::mem::MaybeUninit<u8>; 6 * ::core::mem::size_of::<*const u8>()],
                    );
                    let mut ret_area = RetArea(
                        [::core::mem::MaybeUninit::uninit();
                            6 * ::core::mem::size_of::<*const u8>()],
                    );
                    let Request { method: method0, url: url0, headers: headers0, body: body0 } =
                        request;
                    let vec1 = method0;
                    let ptr1 = vec1.as_ptr().cast::<u8>();
                    let len1 = vec1.len();
                    let vec2 = url0;
                    let ptr2 = vec2.as_ptr().cast::<u8>();
                    let len2 = vec2.len();
                    let vec6 = headers0;
                    let len6 = vec6.len();
                    let layout6 = _rt::alloc::Layout::from_size_align(
                        vec6.len() * (4 * ::core::mem::size_of::<*const u8>()),
                        ::core::mem::size_of::<*const u8>(),
                    )
                    .unwrap();
                    let (result6, _cleanup6) = wit_bindgen::rt::Cleanup::new(layout6);
                    for (i, e) in vec6.into_iter().enumerate() {
                        let base = result6.add(i * (4 * ::core::mem::size_of::<*const u8>()));
                        {
                            let (t3_0, t3_1) = e;
                            let vec4 = t3_0;
                            let ptr4 = vec4.as_ptr().cast::<u8>();
                            let len4 = vec4.len();
                            *base.add(::core::mem::size_of::<*const u8>()).cast::<usize>() = len4;
                            *base.add(0).cast::<*mut u8>() = ptr4.cast_mut();
                            let vec5 = t3_1;
                            let ptr5 = vec5.as_ptr().cast::<u8>();
                            let len5 = vec5.len();
                            *base.add(3 * ::core::mem::size_of::<*const u8>()).cast::<usize>() =
                                len5;
                            *base.add(2 * ::core::mem::size_of::<*const u8>()).cast::<*mut u8>() =
                                ptr5.cast_mut();
                        }
                    }
                    let vec7 = body0;
                    let ptr7 = vec7.as_ptr().cast::<u8>();
                    let len7 = vec7.len();
                    let ptr8 = ret_area.0.as_mut_ptr().cast::<u8>();
                    #[cfg(target_arch = "wasm32")]
                    #[link(wasm_import_module = "shardmill:plugin/http@0.1.0")]
                    unsafe extern "C" {
                        #[link_name = "send"]
                        fn wit_import9(
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                            _: usize,
                            _: *mut u8,
                        );
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    unsafe extern "C" fn wit_import9(
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                        _: usize,
                        _: *mut u8,
                    ) {
                        unreachable!()
                    }
                    wit_import9(
                        ptr1.cast_mut(),
                        len1,
                        ptr2.cast_mut(),
                        len2,
                        result6,
                        len6,
                        ptr7.cast_mut(),
                        len7,
                        ptr8,
                    );
                    let l10 = i32::from(*ptr8.add(0).cast::<u8>());
                    let result28 = match l10 {
                        0 => {
                            let e = {
                                let l11 = i32::from(
                                    *ptr8.add(::core::mem::size_of::<*const u8>()).cast::<u16>(),
                                );
                                let l12 = *ptr8
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l13 = *ptr8
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base20 = l12;
                                let len20 = l13;
                                let mut result20 = _rt::Vec::with_capacity(len20);
                                for i in 0..len20 {
                                    let base =
                                        base20.add(i * (4 * ::core::mem::size_of::<*const u8>()));
                                    let e20 = {
                                        let l14 = *base.add(0).cast::<*mut u8>();
                                        let l15 = *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        let len16 = l15;
                                        let bytes16 =
                                            _rt::Vec::from_raw_parts(l14.cast(), len16, len16);
                                        let l17 = *base
                                            .add(2 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>();
                                        let l18 = *base
                                            .add(3 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        let len19 = l18;
                                        let bytes19 =
                                            _rt::Vec::from_raw_parts(l17.cast(), len19, len19);
                                        (_rt::string_lift(bytes16), _rt::string_lift(bytes19))
                                    };
                                    result20.push(e20);
                                }
                                _rt::cabi_dealloc(
                                    base20,
                                    len20 * (4 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                );
                                let l21 = *ptr8
                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l22 = *ptr8
                                    .add(5 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let len23 = l22;
                                Response {
                                    status: l11 as u16,
                                    headers: result20,
                                    body: <_ as From<_rt::Vec<_>>>::from(_rt::Vec::from_raw_parts(
                                        l21.cast(),
                                        len23,
                                        len23,
                                    )),
                                }
                            };
                            Ok(e)
                        }
                        1 => {
                            let e = {
                                let l24 = i32::from(
                                    *ptr8.add(::core::mem::size_of::<*const u8>()).cast::<u8>(),
                                );
                                let l25 = *ptr8
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l26 = *ptr8
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let len27 = l26;
                                let bytes27 = _rt::Vec::from_raw_parts(l25.cast(), len27, len27);
                                Failure {
                                    retryable: _rt::bool_lift(l24 as u8),
                                    message: _rt::string_lift(bytes27),
                                }
                            };
                            Err(e)
                        }
                        _ => _rt::invalid_enum_discriminant(),
                    };
                    result28
                }
            }
        }
        /// The types of arguments and results.
        #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
        pub mod types {
            #[used]
            #[doc(hidden)]
            static __FORCE_SECTION_REF: fn() =
                super::super::super::__link_custom_section_describing_imports;
            use super::super::super::_rt;
            /// The argument of one call of `process`: at least one record, in the order of the
            /// shard.
            #[derive(Clone)]
            pub struct Batch {
                /// The bytes that the spans of `inputs` point into.
                pub arena: _rt::Vec<u8>,
                /// The records: 10 words each, end to end, so input `i` begins at word
                /// `10 * i`.
                ///
                /// | word | what it holds |
                /// |---|---|
                /// | 0, 1 | `key`: the span of the partition key. UTF-8, as the host guarantees |
                /// | 2, 3 | `payload`: the span of the payload. Any bytes, possibly none; at most 10 MiB |
                /// | 4, 5 | `sequence`: the span of the sequence number in its shard: 1 to 129 ASCII digits without leading zeros. Larger than 64 bits, therefore text |
                /// | 6 | `sub-sequence`: the position within an aggregated record, from 0; 0 if not aggregated |
                /// | 7 | `route`: where the record comes from, an index into `context.upstream` |
                /// | 8, 9 | `arrived-ms`: when the stream took the record, in milliseconds since the Unix epoch: the low 32 bits, then the high 32 bits |
                pub inputs: _rt::Vec<u32>,
            }
            impl ::core::fmt::Debug for Batch {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Batch")
                        .field("arena", &self.arena)
                        .field("inputs", &self.inputs)
                        .finish()
                }
            }
            /// The result of a batch. An input with neither an output nor a reject is filtered:
            /// dropped on purpose.
            #[derive(Clone)]
            pub struct Outcome {
                /// The bytes that the spans of `outputs` and `rejects` point into. Its size is
                /// limited per stage by the pipeline's configuration; beyond that limit the
                /// call fails like a trap.
                pub arena: _rt::Vec<u8>,
                /// The records on their way out: 6 words each, end to end. The number of words
                /// must be a multiple of 6.
                ///
                /// | word | what it holds |
                /// |---|---|
                /// | 0 | `input`: the record it was made from, an index that counts the inputs of the batch (not words) from 0. Must be in range. Outputs must be ordered by it; several outputs of one input stay in the order given |
                /// | 1 | `route`: where it goes, an index into `descriptor.routes`. Must be in range |
                /// | 2, 3 | `key`: the span of the partition key, UTF-8; or none: as it came in, without a copy |
                /// | 4, 5 | `payload`: the span of the payload; or none: as it came in, without a copy |
                pub outputs: _rt::Vec<u32>,
                /// Records that this plugin cannot process, whatever the circumstances: 3 words
                /// each, end to end. The number of words must be a multiple of 3. Each is
                /// dead-lettered with its reason; its neighbours are delivered.
                ///
                /// | word | what it holds |
                /// |---|---|
                /// | 0 | `input`: the record, an index as in `outputs`. Must be in range, must not appear in `outputs`, and must not be rejected twice. Rejects must be ordered by it |
                /// | 1, 2 | `reason`: the span of the reason, for people: UTF-8. It should say what was expected and what was found, and fit after "rejected: " |
                pub rejects: _rt::Vec<u32>,
            }
            impl ::core::fmt::Debug for Outcome {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Outcome")
                        .field("arena", &self.arena)
                        .field("outputs", &self.outputs)
                        .field("rejects", &self.rejects)
                        .finish()
                }
            }
            /// The whole batch failed; nothing of it is delivered by this call.
            #[derive(Clone)]
            pub struct Failure {
                /// True: the same batch may succeed later, so the host backs off and retries
                /// before it blames a record. False: it never will.
                pub retryable: bool,
                /// The record that caused the failure, an index as in `outcome.outputs`, if the
                /// plugin knows it; must be in range. It saves the host the search.
                pub input: ::core::option::Option<u32>,
                /// The reason, for people.
                pub message: _rt::String,
            }
            impl ::core::fmt::Debug for Failure {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Failure")
                        .field("retryable", &self.retryable)
                        .field("input", &self.input)
                        .field("message", &self.message)
                        .finish()
                }
            }
            impl ::core::fmt::Display for Failure {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    write!(f, "{:?}", self)
                }
            }
            impl ::core::error::Error for Failure {}
            /// A column of the rows that a route carries.
            #[derive(Clone)]
            pub struct Column {
                /// The member's name in the JSON object, and the column's name in a table.
                pub name: _rt::String,
                /// A PostgreSQL type name, such as `bigint`, `text`, `timestamptz`.
                pub data_type: _rt::String,
                /// Whether the value may be null or absent.
                pub nullable: bool,
            }
            impl ::core::fmt::Debug for Column {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Column")
                        .field("name", &self.name)
                        .field("data-type", &self.data_type)
                        .field("nullable", &self.nullable)
                        .finish()
                }
            }
            /// A named output of a stage. The pipeline's configuration binds it to sinks or
            /// to the next stage; that binding is the grant.
            #[derive(Clone)]
            pub struct Route {
                /// Unique within its descriptor: `[a-z0-9_-]`, 1 to 64 characters.
                pub name: _rt::String,
                /// The media type of the payloads, such as `application/json`. Adjacent stages
                /// and sinks are checked against it before a record flows.
                pub format: _rt::String,
                /// The columns of the rows, where the plugin knows them; checked against the
                /// live table. Empty: not declared.
                pub columns: _rt::Vec<Column>,
            }
            impl ::core::fmt::Debug for Route {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Route")
                        .field("name", &self.name)
                        .field("format", &self.format)
                        .field("columns", &self.columns)
                        .finish()
                }
            }
            /// Where and how a plugin is used. The same for all calls of an instance.
            #[derive(Clone)]
            pub struct Context {
                /// The stream's name.
                pub stream_name: _rt::String,
                /// The shard that this instance serves, such as `shardId-000000000003`.
                pub shard_id: _rt::String,
                /// The TOML table `[stage.config]` as a JSON object; `{}` where it is absent.
                pub config: _rt::String,
                /// The routes that lead here; an input's `route` indexes them. Never empty: for the
                /// first stage it is one route that stands for the source.
                pub upstream: _rt::Vec<Route>,
                /// Names and values added after this version. Unknown names are ignored.
                pub extra: _rt::Vec<(_rt::String, _rt::String)>,
            }
            impl ::core::fmt::Debug for Context {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Context")
                        .field("stream-name", &self.stream_name)
                        .field("shard-id", &self.shard_id)
                        .field("config", &self.config)
                        .field("upstream", &self.upstream)
                        .field("extra", &self.extra)
                        .finish()
                }
            }
            /// A plugin's name and version, what it accepts and what it emits.
            #[derive(Clone)]
            pub struct Descriptor {
                /// The plugin's name, for error texts and metrics. Not empty.
                pub name: _rt::String,
                /// The plugin's own version, such as `0.1.0`. Not empty.
                pub version: _rt::String,
                /// The media types it can process. Empty: any.
                pub accepts: _rt::Vec<_rt::String>,
                /// The routes; an output's `route` indexes them. Not empty, names unique.
                pub routes: _rt::Vec<Route>,
                /// Names and values added after this version. Unknown names are ignored. Known is
                /// `needs-columns`: the columns that incoming rows must have, as a JSON array of
                /// objects with `name`, `data_type` and `nullable`, checked like `routes`' columns.
                pub extra: _rt::Vec<(_rt::String, _rt::String)>,
            }
            impl ::core::fmt::Debug for Descriptor {
                fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                    f.debug_struct("Descriptor")
                        .field("name", &self.name)
                        .field("version", &self.version)
                        .field("accepts", &self.accepts)
                        .field("routes", &self.routes)
                        .field("extra", &self.extra)
                        .finish()
                }
            }
        }
    }
}
#[allow(dead_code, clippy::all)]
pub mod exports {
    pub mod shardmill {
        pub mod plugin {
            /// A stage of a pipeline: maps records to records. Decoding, transforming and
            /// routing are the same interface.
            #[allow(dead_code, async_fn_in_trait, unused_imports, clippy::all)]
            pub mod stage {
                #[used]
                #[doc(hidden)]
                static __FORCE_SECTION_REF: fn() =
                    super::super::super::super::__link_custom_section_describing_imports;
                use super::super::super::super::_rt;
                pub type Batch = super::super::super::super::shardmill::plugin::types::Batch;
                pub type Outcome = super::super::super::super::shardmill::plugin::types::Outcome;
                pub type Failure = super::super::super::super::shardmill::plugin::types::Failure;
                pub type Context = super::super::super::super::shardmill::plugin::types::Context;
                pub type Descriptor =
                    super::super::super::super::shardmill::plugin::types::Descriptor;
                #[doc(hidden)]
                #[allow(non_snake_case, unused_unsafe)]
                pub unsafe fn _export_configure_cabi<T_: Guest>(
                    arg0: *mut u8,
                    arg1: usize,
                    arg2: *mut u8,
                    arg3: usize,
                    arg4: *mut u8,
                    arg5: usize,
                    arg6: *mut u8,
                    arg7: usize,
                    arg8: *mut u8,
                    arg9: usize,
                ) -> *mut u8 {
                    unsafe {
                        #[cfg(target_arch = "wasm32")]
                        _rt::run_ctors_once();
                        let result27 = {
                            let len0 = arg1;
                            let bytes0 = _rt::Vec::from_raw_parts(arg0.cast(), len0, len0);
                            let len1 = arg3;
                            let bytes1 = _rt::Vec::from_raw_parts(arg2.cast(), len1, len1);
                            let len2 = arg5;
                            let bytes2 = _rt::Vec::from_raw_parts(arg4.cast(), len2, len2);
                            let base19 = arg6;
                            let len19 = arg7;
                            let mut result19 = _rt::Vec::with_capacity(len19);
                            for i in 0..len19 {
                                let base =
                                    base19.add(i * (6 * ::core::mem::size_of::<*const u8>()));
                                let e19 = {
                                    let l3 = *base.add(0).cast::<*mut u8>();
                                    let l4 = *base
                                        .add(::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let len5 = l4;
                                    let bytes5 = _rt::Vec::from_raw_parts(l3.cast(), len5, len5);
                                    let l6 = *base
                                        .add(2 * ::core::mem::size_of::<*const u8>())
                                        .cast::<*mut u8>();
                                    let l7 = *base
                                        .add(3 * ::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let len8 = l7;
                                    let bytes8 = _rt::Vec::from_raw_parts(l6.cast(), len8, len8);
                                    let l9 = *base
                                        .add(4 * ::core::mem::size_of::<*const u8>())
                                        .cast::<*mut u8>();
                                    let l10 = *base
                                        .add(5 * ::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let base18 = l9;
                                    let len18 = l10;
                                    let mut result18 = _rt::Vec::with_capacity(len18);
                                    for i in 0..len18 {
                                        let base = base18
                                            .add(i * (5 * ::core::mem::size_of::<*const u8>()));
                                        let e18 = {
                                            let l11 = *base.add(0).cast::<*mut u8>();
                                            let l12 = *base
                                                .add(::core::mem::size_of::<*const u8>())
                                                .cast::<usize>();
                                            let len13 = l12;
                                            let bytes13 =
                                                _rt::Vec::from_raw_parts(l11.cast(), len13, len13);
                                            let l14 = *base
                                                .add(2 * ::core::mem::size_of::<*const u8>())
                                                .cast::<*mut u8>();
                                            let l15 = *base
                                                .add(3 * ::core::mem::size_of::<*const u8>())
                                                .cast::<usize>();
                                            let len16 = l15;
                                            let bytes16 =
                                                _rt::Vec::from_raw_parts(l14.cast(), len16, len16);
                                            let l17 = i32::from(
                                                *base
                                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                                    .cast::<u8>(),
                                            );
                                            super::super::super::super::shardmill::plugin::types::Column {
                                                name: _rt::string_lift(bytes13),
                                                data_type: _rt::string_lift(bytes16),
                                                nullable: _rt::bool_lift(l17 as u8),
                                            }
                                        };
                                        result18.push(e18);
                                    }
                                    _rt::cabi_dealloc(
                                        base18,
                                        len18 * (5 * ::core::mem::size_of::<*const u8>()),
                                        ::core::mem::size_of::<*const u8>(),
                                    );
                                    super::super::super::super::shardmill::plugin::types::Route {
                                        name: _rt::string_lift(bytes5),
                                        format: _rt::string_lift(bytes8),
                                        columns: result18,
                                    }
                                };
                                result19.push(e19);
                            }
                            _rt::cabi_dealloc(
                                base19,
                                len19 * (6 * ::core::mem::size_of::<*const u8>()),
                                ::core::mem::size_of::<*const u8>(),
                            );
                            let base26 = arg8;
                            let len26 = arg9;
                            let mut result26 = _rt::Vec::with_capacity(len26);
                            for i in 0..len26 {
                                let base =
                                    base26.add(i * (4 * ::core::mem::size_of::<*const u8>()));
                                let e26 = {
                                    let l20 = *base.add(0).cast::<*mut u8>();
                                    let l21 = *base
                                        .add(::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let len22 = l21;
                                    let bytes22 =
                                        _rt::Vec::from_raw_parts(l20.cast(), len22, len22);
                                    let l23 = *base
                                        .add(2 * ::core::mem::size_of::<*const u8>())
                                        .cast::<*mut u8>();
                                    let l24 = *base
                                        .add(3 * ::core::mem::size_of::<*const u8>())
                                        .cast::<usize>();
                                    let len25 = l24;
                                    let bytes25 =
                                        _rt::Vec::from_raw_parts(l23.cast(), len25, len25);
                                    (_rt::string_lift(bytes22), _rt::string_lift(bytes25))
                                };
                                result26.push(e26);
                            }
                            _rt::cabi_dealloc(
                                base26,
                                len26 * (4 * ::core::mem::size_of::<*const u8>()),
                                ::core::mem::size_of::<*const u8>(),
                            );
                            T_::configure(
                                super::super::super::super::shardmill::plugin::types::Context {
                                    stream_name: _rt::string_lift(bytes0),
                                    shard_id: _rt::string_lift(bytes1),
                                    config: _rt::string_lift(bytes2),
                                    upstream: result19,
                                    extra: result26,
                                },
                            )
                        };
                        let ptr28 = (&raw mut _RET_AREA.0).cast::<u8>();
                        match result27 {
                            Ok(e) => {
                                *ptr28.add(0).cast::<u8>() = (0i32) as u8;
                                let super::super::super::super::shardmill::plugin::types::Descriptor {
                                    name: name29,
                                    version: version29,
                                    accepts: accepts29,
                                    routes: routes29,
                                    extra: extra29,
                                } = e;
                                let vec30 = (name29.into_bytes()).into_boxed_slice();
                                let ptr30 = vec30.as_ptr().cast::<u8>();
                                let len30 = vec30.len();
                                ::core::mem::forget(vec30);
                                *ptr28
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len30;
                                *ptr28.add(::core::mem::size_of::<*const u8>()).cast::<*mut u8>() =
                                    ptr30.cast_mut();
                                let vec31 = (version29.into_bytes()).into_boxed_slice();
                                let ptr31 = vec31.as_ptr().cast::<u8>();
                                let len31 = vec31.len();
                                ::core::mem::forget(vec31);
                                *ptr28
                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len31;
                                *ptr28
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = ptr31.cast_mut();
                                let vec33 = accepts29;
                                let len33 = vec33.len();
                                let layout33 = _rt::alloc::Layout::from_size_align(
                                    vec33.len() * (2 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                )
                                .unwrap();
                                let (result33, _cleanup33) =
                                    wit_bindgen::rt::Cleanup::new(layout33);
                                if let Some(cleanup) = _cleanup33 {
                                    cleanup.forget();
                                }
                                for (i, e) in vec33.into_iter().enumerate() {
                                    let base =
                                        result33.add(i * (2 * ::core::mem::size_of::<*const u8>()));
                                    {
                                        let vec32 = (e.into_bytes()).into_boxed_slice();
                                        let ptr32 = vec32.as_ptr().cast::<u8>();
                                        let len32 = vec32.len();
                                        ::core::mem::forget(vec32);
                                        *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>() = len32;
                                        *base.add(0).cast::<*mut u8>() = ptr32.cast_mut();
                                    }
                                }
                                *ptr28
                                    .add(6 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len33;
                                *ptr28
                                    .add(5 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = result33;
                                let vec41 = routes29;
                                let len41 = vec41.len();
                                let layout41 = _rt::alloc::Layout::from_size_align(
                                    vec41.len() * (6 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                )
                                .unwrap();
                                let (result41, _cleanup41) =
                                    wit_bindgen::rt::Cleanup::new(layout41);
                                if let Some(cleanup) = _cleanup41 {
                                    cleanup.forget();
                                }
                                for (i, e) in vec41.into_iter().enumerate() {
                                    let base =
                                        result41.add(i * (6 * ::core::mem::size_of::<*const u8>()));
                                    {
                                        let super::super::super::super::shardmill::plugin::types::Route {
                                            name: name34,
                                            format: format34,
                                            columns: columns34,
                                        } = e;
                                        let vec35 = (name34.into_bytes()).into_boxed_slice();
                                        let ptr35 = vec35.as_ptr().cast::<u8>();
                                        let len35 = vec35.len();
                                        ::core::mem::forget(vec35);
                                        *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>() = len35;
                                        *base.add(0).cast::<*mut u8>() = ptr35.cast_mut();
                                        let vec36 = (format34.into_bytes()).into_boxed_slice();
                                        let ptr36 = vec36.as_ptr().cast::<u8>();
                                        let len36 = vec36.len();
                                        ::core::mem::forget(vec36);
                                        *base
                                            .add(3 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>() = len36;
                                        *base
                                            .add(2 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>() = ptr36.cast_mut();
                                        let vec40 = columns34;
                                        let len40 = vec40.len();
                                        let layout40 = _rt::alloc::Layout::from_size_align(
                                            vec40.len() * (5 * ::core::mem::size_of::<*const u8>()),
                                            ::core::mem::size_of::<*const u8>(),
                                        )
                                        .unwrap();
                                        let (result40, _cleanup40) =
                                            wit_bindgen::rt::Cleanup::new(layout40);
                                        if let Some(cleanup) = _cleanup40 {
                                            cleanup.forget();
                                        }
                                        for (i, e) in vec40.into_iter().enumerate() {
                                            let base = result40
                                                .add(i * (5 * ::core::mem::size_of::<*const u8>()));
                                            {
                                                let super::super::super::super::shardmill::plugin::types::Column {
                                                    name: name37,
                                                    data_type: data_type37,
                                                    nullable: nullable37,
                                                } = e;
                                                let vec38 =
                                                    (name37.into_bytes()).into_boxed_slice();
                                                let ptr38 = vec38.as_ptr().cast::<u8>();
                                                let len38 = vec38.len();
                                                ::core::mem::forget(vec38);
                                                *base
                                                    .add(::core::mem::size_of::<*const u8>())
                                                    .cast::<usize>() = len38;
                                                *base.add(0).cast::<*mut u8>() = ptr38.cast_mut();
                                                let vec39 =
                                                    (data_type37.into_bytes()).into_boxed_slice();
                                                let ptr39 = vec39.as_ptr().cast::<u8>();
                                                let len39 = vec39.len();
                                                ::core::mem::forget(vec39);
                                                *base
                                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                                    .cast::<usize>() = len39;
                                                *base
                                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                                    .cast::<*mut u8>() = ptr39.cast_mut();
                                                *base
                                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                                    .cast::<u8>() = (match nullable37 {
                                                    true => 1,
                                                    false => 0,
                                                })
                                                    as u8;
                                            }
                                        }
                                        *base
                                            .add(5 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>() = len40;
                                        *base
                                            .add(4 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>() = result40;
                                    }
                                }
                                *ptr28
                                    .add(8 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len41;
                                *ptr28
                                    .add(7 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = result41;
                                let vec45 = extra29;
                                let len45 = vec45.len();
                                let layout45 = _rt::alloc::Layout::from_size_align(
                                    vec45.len() * (4 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                )
                                .unwrap();
                                let (result45, _cleanup45) =
                                    wit_bindgen::rt::Cleanup::new(layout45);
                                if let Some(cleanup) = _cleanup45 {
                                    cleanup.forget();
                                }
                                for (i, e) in vec45.into_iter().enumerate() {
                                    let base =
                                        result45.add(i * (4 * ::core::mem::size_of::<*const u8>()));
                                    {
                                        let (t42_0, t42_1) = e;
                                        let vec43 = (t42_0.into_bytes()).into_boxed_slice();
                                        let ptr43 = vec43.as_ptr().cast::<u8>();
                                        let len43 = vec43.len();
                                        ::core::mem::forget(vec43);
                                        *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>() = len43;
                                        *base.add(0).cast::<*mut u8>() = ptr43.cast_mut();
                                        let vec44 = (t42_1.into_bytes()).into_boxed_slice();
                                        let ptr44 = vec44.as_ptr().cast::<u8>();
                                        let len44 = vec44.len();
                                        ::core::mem::forget(vec44);
                                        *base
                                            .add(3 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>() = len44;
                                        *base
                                            .add(2 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>() = ptr44.cast_mut();
                                    }
                                }
                                *ptr28
                                    .add(10 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len45;
                                *ptr28
                                    .add(9 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = result45;
                            }
                            Err(e) => {
                                *ptr28.add(0).cast::<u8>() = (1i32) as u8;
                                let vec46 = (e.into_bytes()).into_boxed_slice();
                                let ptr46 = vec46.as_ptr().cast::<u8>();
                                let len46 = vec46.len();
                                ::core::mem::forget(vec46);
                                *ptr28
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len46;
                                *ptr28.add(::core::mem::size_of::<*const u8>()).cast::<*mut u8>() =
                                    ptr46.cast_mut();
                            }
                        };
                        ptr28
                    }
                }
                #[doc(hidden)]
                #[allow(non_snake_case)]
                pub unsafe fn __post_return_configure<T_: Guest>(arg0: *mut u8) {
                    unsafe {
                        let l0 = i32::from(*arg0.add(0).cast::<u8>());
                        match l0 {
                            0 => {
                                let l1 = *arg0
                                    .add(::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l2 = *arg0
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                _rt::cabi_dealloc(l1, l2, 1);
                                let l3 = *arg0
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l4 = *arg0
                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                _rt::cabi_dealloc(l3, l4, 1);
                                let l5 = *arg0
                                    .add(5 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l6 = *arg0
                                    .add(6 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base9 = l5;
                                let len9 = l6;
                                for i in 0..len9 {
                                    let base =
                                        base9.add(i * (2 * ::core::mem::size_of::<*const u8>()));
                                    {
                                        let l7 = *base.add(0).cast::<*mut u8>();
                                        let l8 = *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        _rt::cabi_dealloc(l7, l8, 1);
                                    }
                                }
                                _rt::cabi_dealloc(
                                    base9,
                                    len9 * (2 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                );
                                let l10 = *arg0
                                    .add(7 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l11 = *arg0
                                    .add(8 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base23 = l10;
                                let len23 = l11;
                                for i in 0..len23 {
                                    let base =
                                        base23.add(i * (6 * ::core::mem::size_of::<*const u8>()));
                                    {
                                        let l12 = *base.add(0).cast::<*mut u8>();
                                        let l13 = *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        _rt::cabi_dealloc(l12, l13, 1);
                                        let l14 = *base
                                            .add(2 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>();
                                        let l15 = *base
                                            .add(3 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        _rt::cabi_dealloc(l14, l15, 1);
                                        let l16 = *base
                                            .add(4 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>();
                                        let l17 = *base
                                            .add(5 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        let base22 = l16;
                                        let len22 = l17;
                                        for i in 0..len22 {
                                            let base = base22
                                                .add(i * (5 * ::core::mem::size_of::<*const u8>()));
                                            {
                                                let l18 = *base.add(0).cast::<*mut u8>();
                                                let l19 = *base
                                                    .add(::core::mem::size_of::<*const u8>())
                                                    .cast::<usize>();
                                                _rt::cabi_dealloc(l18, l19, 1);
                                                let l20 = *base
                                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                                    .cast::<*mut u8>();
                                                let l21 = *base
                                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                                    .cast::<usize>();
                                                _rt::cabi_dealloc(l20, l21, 1);
                                            }
                                        }
                                        _rt::cabi_dealloc(
                                            base22,
                                            len22 * (5 * ::core::mem::size_of::<*const u8>()),
                                            ::core::mem::size_of::<*const u8>(),
                                        );
                                    }
                                }
                                _rt::cabi_dealloc(
                                    base23,
                                    len23 * (6 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                );
                                let l24 = *arg0
                                    .add(9 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l25 = *arg0
                                    .add(10 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base30 = l24;
                                let len30 = l25;
                                for i in 0..len30 {
                                    let base =
                                        base30.add(i * (4 * ::core::mem::size_of::<*const u8>()));
                                    {
                                        let l26 = *base.add(0).cast::<*mut u8>();
                                        let l27 = *base
                                            .add(::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        _rt::cabi_dealloc(l26, l27, 1);
                                        let l28 = *base
                                            .add(2 * ::core::mem::size_of::<*const u8>())
                                            .cast::<*mut u8>();
                                        let l29 = *base
                                            .add(3 * ::core::mem::size_of::<*const u8>())
                                            .cast::<usize>();
                                        _rt::cabi_dealloc(l28, l29, 1);
                                    }
                                }
                                _rt::cabi_dealloc(
                                    base30,
                                    len30 * (4 * ::core::mem::size_of::<*const u8>()),
                                    ::core::mem::size_of::<*const u8>(),
                                );
                            }
                            _ => {
                                let l31 = *arg0
                                    .add(::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l32 = *arg0
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                _rt::cabi_dealloc(l31, l32, 1);
                            }
                        }
                    }
                }
                #[doc(hidden)]
                #[allow(non_snake_case, unused_unsafe)]
                pub unsafe fn _export_process_cabi<T_: Guest>(
                    arg0: *mut u8,
                    arg1: usize,
                    arg2: *mut u8,
                    arg3: usize,
                ) -> *mut u8 {
                    unsafe {
                        #[cfg(target_arch = "wasm32")]
                        _rt::run_ctors_once();
                        let result2 = {
                            let len0 = arg1;
                            let len1 = arg3;
                            T_::process(
                                super::super::super::super::shardmill::plugin::types::Batch {
                                    arena: <_ as From<_rt::Vec<_>>>::from(
                                        _rt::Vec::from_raw_parts(arg0.cast(), len0, len0),
                                    ),
                                    inputs: <_ as From<_rt::Vec<_>>>::from(
                                        _rt::Vec::from_raw_parts(arg2.cast(), len1, len1),
                                    ),
                                },
                            )
                        };
                        let ptr3 = (&raw mut _RET_AREA.0).cast::<u8>();
                        match result2 {
                            Ok(e) => {
                                *ptr3.add(0).cast::<u8>() = (0i32) as u8;
                                let super::super::super::super::shardmill::plugin::types::Outcome {
                                    arena: arena4,
                                    outputs: outputs4,
                                    rejects: rejects4,
                                } = e;
                                let vec5 =
                                    <_ as Into<_rt::Vec<_>>>::into(arena4).into_boxed_slice();
                                let ptr5 = vec5.as_ptr().cast::<u8>();
                                let len5 = vec5.len();
                                ::core::mem::forget(vec5);
                                *ptr3
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len5;
                                *ptr3.add(::core::mem::size_of::<*const u8>()).cast::<*mut u8>() =
                                    ptr5.cast_mut();
                                let vec6 =
                                    <_ as Into<_rt::Vec<_>>>::into(outputs4).into_boxed_slice();
                                let ptr6 = vec6.as_ptr().cast::<u8>();
                                let len6 = vec6.len();
                                ::core::mem::forget(vec6);
                                *ptr3
                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len6;
                                *ptr3
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = ptr6.cast_mut();
                                let vec7 =
                                    <_ as Into<_rt::Vec<_>>>::into(rejects4).into_boxed_slice();
                                let ptr7 = vec7.as_ptr().cast::<u8>();
                                let len7 = vec7.len();
                                ::core::mem::forget(vec7);
                                *ptr3
                                    .add(6 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len7;
                                *ptr3
                                    .add(5 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = ptr7.cast_mut();
                            }
                            Err(e) => {
                                *ptr3.add(0).cast::<u8>() = (1i32) as u8;
                                let super::super::super::super::shardmill::plugin::types::Failure {
                                    retryable: retryable8,
                                    input: input8,
                                    message: message8,
                                } = e;
                                *ptr3.add(::core::mem::size_of::<*const u8>()).cast::<u8>() =
                                    (match retryable8 {
                                        true => 1,
                                        false => 0,
                                    }) as u8;
                                match input8 {
                                    Some(e) => {
                                        *ptr3
                                            .add(4 + 1 * ::core::mem::size_of::<*const u8>())
                                            .cast::<u8>() = (1i32) as u8;
                                        *ptr3
                                            .add(8 + 1 * ::core::mem::size_of::<*const u8>())
                                            .cast::<i32>() = _rt::as_i32(e);
                                    }
                                    None => {
                                        *ptr3
                                            .add(4 + 1 * ::core::mem::size_of::<*const u8>())
                                            .cast::<u8>() = (0i32) as u8;
                                    }
                                };
                                let vec9 = (message8.into_bytes()).into_boxed_slice();
                                let ptr9 = vec9.as_ptr().cast::<u8>();
                                let len9 = vec9.len();
                                ::core::mem::forget(vec9);
                                *ptr3
                                    .add(8 + 3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>() = len9;
                                *ptr3
                                    .add(8 + 2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>() = ptr9.cast_mut();
                            }
                        };
                        ptr3
                    }
                }
                #[doc(hidden)]
                #[allow(non_snake_case)]
                pub unsafe fn __post_return_process<T_: Guest>(arg0: *mut u8) {
                    unsafe {
                        let l0 = i32::from(*arg0.add(0).cast::<u8>());
                        match l0 {
                            0 => {
                                let l1 = *arg0
                                    .add(::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l2 = *arg0
                                    .add(2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base3 = l1;
                                let len3 = l2;
                                _rt::cabi_dealloc(base3, len3 * 1, 1);
                                let l4 = *arg0
                                    .add(3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l5 = *arg0
                                    .add(4 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base6 = l4;
                                let len6 = l5;
                                _rt::cabi_dealloc(base6, len6 * 4, 4);
                                let l7 = *arg0
                                    .add(5 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l8 = *arg0
                                    .add(6 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                let base9 = l7;
                                let len9 = l8;
                                _rt::cabi_dealloc(base9, len9 * 4, 4);
                            }
                            _ => {
                                let l10 = *arg0
                                    .add(8 + 2 * ::core::mem::size_of::<*const u8>())
                                    .cast::<*mut u8>();
                                let l11 = *arg0
                                    .add(8 + 3 * ::core::mem::size_of::<*const u8>())
                                    .cast::<usize>();
                                _rt::cabi_dealloc(l10, l11, 1);
                            }
                        }
                    }
                }
                pub trait Guest {
                    /// Prepares the instance. Called once, before the first `process`. The same
                    /// context must yield the same descriptor. An error is for people: it refuses
                    /// the configuration, at load and at swap, before a record flows.
                    #[allow(async_fn_in_trait)]
                    fn configure(
                        context: Context,
                    ) -> ::core::result::Result<Descriptor, _rt::String>;
                    /// Processes one batch. The outputs must depend on the records and the
                    /// configuration alone, not on how the records are cut into batches nor on earlier
                    /// calls: a record may be replayed in another batch, by another instance. What an
                    /// instance remembers is a cache.
                    #[allow(async_fn_in_trait)]
                    fn process(batch: Batch) -> ::core::result::Result<Outcome, Failure>;
                }
                #[doc(hidden)]
                #[macro_export]
                macro_rules! __export_shardmill_plugin_stage_0_1_0_cabi {
                    ($ty:ident with_types_in $($path_to_types:tt)*) => {
                        const _ : () = { #[unsafe (export_name =
                        "shardmill:plugin/stage@0.1.0#configure")] unsafe extern "C" fn
                        export_configure(arg0 : * mut u8, arg1 : usize, arg2 : * mut u8,
                        arg3 : usize, arg4 : * mut u8, arg5 : usize, arg6 : * mut u8,
                        arg7 : usize, arg8 : * mut u8, arg9 : usize,) -> * mut u8 {
                        unsafe { $($path_to_types)*:: _export_configure_cabi::<$ty >
                        (arg0, arg1, arg2, arg3, arg4, arg5, arg6, arg7, arg8, arg9) } }
                        #[unsafe (export_name =
                        "cabi_post_shardmill:plugin/stage@0.1.0#configure")] unsafe
                        extern "C" fn _post_return_configure(arg0 : * mut u8,) { unsafe {
                        $($path_to_types)*:: __post_return_configure::<$ty > (arg0) } }
                        #[unsafe (export_name = "shardmill:plugin/stage@0.1.0#process")]
                        unsafe extern "C" fn export_process(arg0 : * mut u8, arg1 :
                        usize, arg2 : * mut u8, arg3 : usize,) -> * mut u8 { unsafe {
                        $($path_to_types)*:: _export_process_cabi::<$ty > (arg0, arg1,
                        arg2, arg3) } } #[unsafe (export_name =
                        "cabi_post_shardmill:plugin/stage@0.1.0#process")] unsafe extern
                        "C" fn _post_return_process(arg0 : * mut u8,) { unsafe {
                        $($path_to_types)*:: __post_return_process::<$ty > (arg0) } } };
                    };
                }
                #[doc(hidden)]
                pub use __export_shardmill_plugin_stage_0_1_0_cabi;
                #[cfg_attr(target_pointer_width = "64", repr(align(8)))]
                #[cfg_attr(target_pointer_width = "32", repr(align(4)))]
                struct _RetArea(
                    [::core::mem::MaybeUninit<u8>; 11 * ::core::mem::size_of::<*const u8>()],
                );
                static mut _RET_AREA: _RetArea = _RetArea(
                    [::core::mem::MaybeUninit::uninit(); 11 * ::core::mem::size_of::<*const u8>()],
                );
            }
        }
    }
}
mod _rt {
    #![allow(dead_code, unused_imports, clippy::all)]
    pub use alloc_crate::string::String;
    pub use alloc_crate::vec::Vec;
    pub unsafe fn string_lift(bytes: Vec<u8>) -> String {
        if cfg!(debug_assertions) {
            String::from_utf8(bytes).unwrap()
        } else {
            unsafe { String::from_utf8_unchecked(bytes) }
        }
    }
    pub unsafe fn invalid_enum_discriminant<T>() -> T {
        if cfg!(debug_assertions) {
            panic!("invalid enum discriminant")
        } else {
            unsafe { core::hint::unreachable_unchecked() }
        }
    }
    pub fn as_i32<T: AsI32>(t: T) -> i32 {
        t.as_i32()
    }
    pub trait AsI32 {
        fn as_i32(self) -> i32;
    }
    impl<'a, T: Copy + AsI32> AsI32 for &'a T {
        fn as_i32(self) -> i32 {
            (*self).as_i32()
        }
    }
    impl AsI32 for i32 {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for u32 {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for i16 {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for u16 {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for i8 {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for u8 {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for char {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    impl AsI32 for usize {
        #[inline]
        fn as_i32(self) -> i32 {
            self as i32
        }
    }
    pub fn as_f64<T: AsF64>(t: T) -> f64 {
        t.as_f64()
    }
    pub trait AsF64 {
        fn as_f64(self) -> f64;
    }
    impl<'a, T: Copy + AsF64> AsF64 for &'a T {
        fn as_f64(self) -> f64 {
            (*self).as_f64()
        }
    }
    impl AsF64 for f64 {
        #[inline]
        fn as_f64(self) -> f64 {
            self as f64
        }
    }
    pub unsafe fn bool_lift(val: u8) -> bool {
        if cfg!(debug_assertions) {
            match val {
                0 => false,
                1 => true,
                _ => panic!("invalid bool discriminant"),
            }
        } else {
            val != 0
        }
    }
    pub use alloc_crate::alloc;
    pub unsafe fn cabi_dealloc(ptr: *mut u8, size: usize, align: usize) {
        if size == 0 {
            return;
        }
        unsafe {
            let layout = alloc::Layout::from_size_align_unchecked(size, align);
            alloc::dealloc(ptr, layout);
        }
    }
    #[cfg(target_arch = "wasm32")]
    pub fn run_ctors_once() {
        wit_bindgen::rt::run_ctors_once();
    }
    extern crate alloc as alloc_crate;
}
/// Generates `#[unsafe(no_mangle)]` functions to export the specified type as
/// the root implementation of all generated traits.
///
/// For more information see the documentation of `wit_bindgen::generate!`.
///
/// ```rust
/// # macro_rules! __export_plugin{ ($($t:tt)*) => (); }
/// # trait Guest {}
/// struct MyType;
///
/// impl Guest for MyType {
///     // ...
/// }
///
/// __export_plugin!(MyType);
/// ```
#[allow(unused_macros)]
#[doc(hidden)]
#[macro_export]
macro_rules! __export_plugin_with_capabilities_impl {
    ($ty:ident) => {
        shardmill_sdk::bindings::__export_plugin!($ty with_types_in
        shardmill_sdk::bindings);
    };
    ($ty:ident with_types_in $($path_to_types_root:tt)*) => {
        $($path_to_types_root)*::
        exports::shardmill::plugin::stage::__export_shardmill_plugin_stage_0_1_0_cabi!($ty
        with_types_in $($path_to_types_root)*:: exports::shardmill::plugin::stage); const
        _ : () = { #[cfg(target_arch = "wasm32")] #[unsafe (link_section =
        "component-type:wit-bindgen:0.61.1:shardmill:plugin@0.1.0:plugin-with-capabilities:imports and exports")]
        #[doc(hidden)] #[allow(clippy::octal_escapes)] pub static
        __WIT_BINDGEN_COMPONENT_TYPE : [u8; 1531] = *
        b"\
\0asm\x0d\0\x01\0\0\x19\x16wit-component-encoding\x04\0\x07\xec\x0a\x01A\x02\x01\
A\x15\x01B\x04\x01m\x05\x05trace\x05debug\x04info\x04warn\x05error\x04\0\x05leve\
l\x03\0\0\x01@\x02\x05level\x01\x07messages\x01\0\x04\0\x05write\x01\x02\x03\0\x1a\
shardmill:plugin/log@0.1.0\x05\0\x01B\x07\x01m\x03\x07counter\x05gauge\x09histog\
ram\x04\0\x04kind\x03\0\0\x01j\x01y\x01s\x01@\x03\x04kind\x01\x04names\x04helps\0\
\x02\x04\0\x08register\x01\x03\x01@\x02\x06metricy\x05valueu\x01\0\x04\0\x07obse\
rve\x01\x04\x03\0\x1eshardmill:plugin/metrics@0.1.0\x05\x01\x01B\x09\x01p}\x01py\
\x01r\x02\x05arena\0\x04rows\x01\x04\0\x05found\x03\0\x02\x01r\x02\x09retryable\x7f\
\x07messages\x04\0\x07failure\x03\0\x04\x01j\x01\x03\x01\x05\x01@\x03\x04names\x05\
arena\0\x04keys\x01\0\x06\x04\0\x03get\x01\x07\x03\0\x1dshardmill:plugin/lookup@\
0.1.0\x05\x02\x01B\x02\x01@\0\0w\x04\0\x06now-ms\x01\0\x03\0\x1cshardmill:plugin\
/clock@0.1.0\x05\x03\x01B\x02\x01@\0\0w\x04\0\x08next-u64\x01\0\x03\0\x1dshardmi\
ll:plugin/random@0.1.0\x05\x04\x01B\x0c\x01o\x02ss\x01p\0\x01p}\x01r\x04\x06meth\
ods\x03urls\x07headers\x01\x04body\x02\x04\0\x07request\x03\0\x03\x01r\x03\x06st\
atus{\x07headers\x01\x04body\x02\x04\0\x08response\x03\0\x05\x01r\x02\x09retryab\
le\x7f\x07messages\x04\0\x07failure\x03\0\x07\x01j\x01\x06\x01\x08\x01@\x01\x07r\
equest\x04\0\x09\x04\0\x04send\x01\x0a\x03\0\x1bshardmill:plugin/http@0.1.0\x05\x05\
\x01B\x16\x01p}\x01py\x01r\x02\x05arena\0\x06inputs\x01\x04\0\x05batch\x03\0\x02\
\x01r\x03\x05arena\0\x07outputs\x01\x07rejects\x01\x04\0\x07outcome\x03\0\x04\x01\
ky\x01r\x03\x09retryable\x7f\x05input\x06\x07messages\x04\0\x07failure\x03\0\x07\
\x01r\x03\x04names\x09data-types\x08nullable\x7f\x04\0\x06column\x03\0\x09\x01p\x0a\
\x01r\x03\x04names\x06formats\x07columns\x0b\x04\0\x05route\x03\0\x0c\x01p\x0d\x01\
o\x02ss\x01p\x0f\x01r\x05\x0bstream-names\x08shard-ids\x06configs\x08upstream\x0e\
\x05extra\x10\x04\0\x07context\x03\0\x11\x01ps\x01r\x05\x04names\x07versions\x07\
accepts\x13\x06routes\x0e\x05extra\x10\x04\0\x0adescriptor\x03\0\x14\x03\0\x1csh\
ardmill:plugin/types@0.1.0\x05\x06\x02\x03\0\x06\x05batch\x02\x03\0\x06\x07outco\
me\x02\x03\0\x06\x07failure\x02\x03\0\x06\x07context\x02\x03\0\x06\x0adescriptor\
\x01B\x10\x02\x03\x02\x01\x07\x04\0\x05batch\x03\0\0\x02\x03\x02\x01\x08\x04\0\x07\
outcome\x03\0\x02\x02\x03\x02\x01\x09\x04\0\x07failure\x03\0\x04\x02\x03\x02\x01\
\x0a\x04\0\x07context\x03\0\x06\x02\x03\x02\x01\x0b\x04\0\x0adescriptor\x03\0\x08\
\x01j\x01\x09\x01s\x01@\x01\x07context\x07\0\x0a\x04\0\x09configure\x01\x0b\x01j\
\x01\x03\x01\x05\x01@\x01\x05batch\x01\0\x0c\x04\0\x07process\x01\x0d\x04\0\x1cs\
hardmill:plugin/stage@0.1.0\x05\x0c\x04\0/shardmill:plugin/plugin-with-capabilit\
ies@0.1.0\x04\0\x0b\x1e\x01\0\x18plugin-with-capabilities\x03\0\0\0G\x09producer\
s\x01\x0cprocessed-by\x02\x0dwit-component\x070.258.3\x10wit-bindgen-rust\x060.6\
1.1";
        };
    };
}
#[doc(inline)]
pub use __export_plugin_with_capabilities_impl as __export_plugin;
#[cfg(target_arch = "wasm32")]
#[unsafe(link_section = "component-type:wit-bindgen:0.61.1:shardmill:plugin@0.1.0:plugin-with-capabilities-with-all-of-its-exports-removed:encoded world")]
#[doc(hidden)]
#[allow(clippy::octal_escapes)]
pub static __WIT_BINDGEN_COMPONENT_TYPE: [u8; 1343] = *b"\
\0asm\x0d\0\x01\0\0\x19\x16wit-component-encoding\x04\0\x07\x90\x09\x01A\x02\x01\
A\x0e\x01B\x04\x01m\x05\x05trace\x05debug\x04info\x04warn\x05error\x04\0\x05leve\
l\x03\0\0\x01@\x02\x05level\x01\x07messages\x01\0\x04\0\x05write\x01\x02\x03\0\x1a\
shardmill:plugin/log@0.1.0\x05\0\x01B\x07\x01m\x03\x07counter\x05gauge\x09histog\
ram\x04\0\x04kind\x03\0\0\x01j\x01y\x01s\x01@\x03\x04kind\x01\x04names\x04helps\0\
\x02\x04\0\x08register\x01\x03\x01@\x02\x06metricy\x05valueu\x01\0\x04\0\x07obse\
rve\x01\x04\x03\0\x1eshardmill:plugin/metrics@0.1.0\x05\x01\x01B\x09\x01p}\x01py\
\x01r\x02\x05arena\0\x04rows\x01\x04\0\x05found\x03\0\x02\x01r\x02\x09retryable\x7f\
\x07messages\x04\0\x07failure\x03\0\x04\x01j\x01\x03\x01\x05\x01@\x03\x04names\x05\
arena\0\x04keys\x01\0\x06\x04\0\x03get\x01\x07\x03\0\x1dshardmill:plugin/lookup@\
0.1.0\x05\x02\x01B\x02\x01@\0\0w\x04\0\x06now-ms\x01\0\x03\0\x1cshardmill:plugin\
/clock@0.1.0\x05\x03\x01B\x02\x01@\0\0w\x04\0\x08next-u64\x01\0\x03\0\x1dshardmi\
ll:plugin/random@0.1.0\x05\x04\x01B\x0c\x01o\x02ss\x01p\0\x01p}\x01r\x04\x06meth\
ods\x03urls\x07headers\x01\x04body\x02\x04\0\x07request\x03\0\x03\x01r\x03\x06st\
atus{\x07headers\x01\x04body\x02\x04\0\x08response\x03\0\x05\x01r\x02\x09retryab\
le\x7f\x07messages\x04\0\x07failure\x03\0\x07\x01j\x01\x06\x01\x08\x01@\x01\x07r\
equest\x04\0\x09\x04\0\x04send\x01\x0a\x03\0\x1bshardmill:plugin/http@0.1.0\x05\x05\
\x01B\x16\x01p}\x01py\x01r\x02\x05arena\0\x06inputs\x01\x04\0\x05batch\x03\0\x02\
\x01r\x03\x05arena\0\x07outputs\x01\x07rejects\x01\x04\0\x07outcome\x03\0\x04\x01\
ky\x01r\x03\x09retryable\x7f\x05input\x06\x07messages\x04\0\x07failure\x03\0\x07\
\x01r\x03\x04names\x09data-types\x08nullable\x7f\x04\0\x06column\x03\0\x09\x01p\x0a\
\x01r\x03\x04names\x06formats\x07columns\x0b\x04\0\x05route\x03\0\x0c\x01p\x0d\x01\
o\x02ss\x01p\x0f\x01r\x05\x0bstream-names\x08shard-ids\x06configs\x08upstream\x0e\
\x05extra\x10\x04\0\x07context\x03\0\x11\x01ps\x01r\x05\x04names\x07versions\x07\
accepts\x13\x06routes\x0e\x05extra\x10\x04\0\x0adescriptor\x03\0\x14\x03\0\x1csh\
ardmill:plugin/types@0.1.0\x05\x06\x04\0Oshardmill:plugin/plugin-with-capabiliti\
es-with-all-of-its-exports-removed@0.1.0\x04\0\x0b>\x01\08plugin-with-capabiliti\
es-with-all-of-its-exports-removed\x03\0\0\0G\x09producers\x01\x0cprocessed-by\x02\
\x0dwit-component\x070.258.3\x10wit-bindgen-rust\x060.61.1";
#[inline(never)]
#[doc(hidden)]
pub fn __link_custom_section_describing_imports() {
    wit_bindgen::rt::maybe_link_cabi_realloc();
}
