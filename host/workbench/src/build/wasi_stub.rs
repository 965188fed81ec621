//! Implements the WASI preview 1 functions that compilers import, so that no plugin gets real WASI.
//!
//! C's library and Go's runtime import a clock, random numbers and files, whether a plugin uses them or not.
//! The module made here answers these calls inside the sandbox, the same way each time: a clock that counts its
//! calls (and moves by sleeps), random numbers from a fixed seed, output that is accepted and dropped, and
//! nothing else. It contains only the functions that the plugin's module imports.

use wasm_encoder::{
    BlockType, CodeSection, ConstExpr, EntityType, ExportKind, ExportSection, Function,
    FunctionSection, GlobalSection, GlobalType, ImportSection, InstructionSink, MemArg, MemoryType,
    Module, TypeSection, ValType,
};
use wasmparser::{CompositeInnerType, FuncType, Parser, Payload, TypeRef};

/// Name under which modules import WASI preview 1.
pub(super) const MODULE: &str = "wasi_snapshot_preview1";

/// WASI error "bad file descriptor". It ends the search for preopened folders.
const BAD_DESCRIPTOR: i32 = 8;
/// WASI error "not supported".
const NOT_SUPPORTED: i32 = 58;
/// Nanoseconds by which the clock advances at each call.
const CLOCK_STEP_NS: i64 = 1_000;
/// Initial state of the random numbers; it must not be 0.
const RANDOM_SEED: i64 = 0x9e37_79b9_7f4a_7c15_u64.cast_signed();
/// Bytes of a subscription and of an event of `poll_oneoff`.
const SUBSCRIPTION_BYTES: i32 = 48;
const EVENT_BYTES: i32 = 32;

/// Indices of the globals with the state of the clock and of the random numbers.
const CLOCK: u32 = 0;
const RANDOM: u32 = 1;

/// Makes the module that answers the WASI imports of `core`. `None`: it has no such imports.
///
/// # Errors
/// `core` cannot be parsed.
pub(super) fn adapter(core: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
    let imports = imports(core)?;
    if imports.is_empty() {
        return Ok(None);
    }
    let (mut types, mut functions) = (TypeSection::new(), FunctionSection::new());
    let (mut exports, mut code) = (ExportSection::new(), CodeSection::new());
    for (index, (name, signature)) in (0..).zip(&imports) {
        types.ty().function(values(signature.params()), values(signature.results()));
        functions.function(index);
        exports.export(name, ExportKind::Func, index);
        code.function(&answer(name, signature));
    }
    let mut outer = ImportSection::new();
    let memory = MemoryType {
        minimum: 0,
        maximum: None,
        memory64: false,
        shared: false,
        page_size_log2: None,
    };
    outer.import("env", "memory", EntityType::Memory(memory));
    let mut globals = GlobalSection::new();
    let state = GlobalType { val_type: ValType::I64, mutable: true, shared: false };
    globals.global(state, &ConstExpr::i64_const(0));
    globals.global(state, &ConstExpr::i64_const(RANDOM_SEED));
    let mut module = Module::new();
    module
        .section(&types)
        .section(&outer)
        .section(&functions)
        .section(&globals)
        .section(&exports)
        .section(&code);
    Ok(Some(module.finish()))
}

/// Returns the functions that a module imports from WASI, each once.
fn imports(core: &[u8]) -> anyhow::Result<Vec<(String, FuncType)>> {
    let mut types = Vec::new();
    let mut found: Vec<(String, FuncType)> = Vec::new();
    for payload in Parser::new(0).parse_all(core) {
        match payload? {
            Payload::TypeSection(section) => {
                for group in section {
                    types.extend(group?.into_types().map(|ty| match ty.composite_type.inner {
                        CompositeInnerType::Func(function) => Some(function),
                        _ => None,
                    }));
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import?;
                    let TypeRef::Func(index) = import.ty else { continue };
                    let signature = types.get(index as usize).cloned().flatten();
                    let is_new = !found.iter().any(|(name, _)| name == import.name);
                    if let (MODULE, true, Some(signature)) = (import.module, is_new, signature) {
                        found.push((import.name.to_owned(), signature));
                    }
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Converts types of a signature. WASI functions have only numbers.
fn values(types: &[wasmparser::ValType]) -> Vec<ValType> {
    let value = |ty: &wasmparser::ValType| match ty {
        wasmparser::ValType::I64 => ValType::I64,
        wasmparser::ValType::F32 => ValType::F32,
        wasmparser::ValType::F64 => ValType::F64,
        _ => ValType::I32,
    };
    types.iter().map(value).collect()
}

/// Makes the body of one function. Its parameters are the locals from 0 on, in WASI's order.
fn answer(name: &str, signature: &FuncType) -> Function {
    // Three local variables: two of 32 bits, one of 64.
    let mut function = Function::new([(2, ValType::I32), (1, ValType::I64)]);
    let own = signature.params().len() as u32; // a handful
    let mut code = function.instructions();
    match (name, signature.params().len()) {
        ("args_sizes_get" | "environ_sizes_get", 2) => {
            code.local_get(0).i32_const(0).i32_store(word(0));
            code.local_get(1).i32_const(0).i32_store(word(0)).i32_const(0);
        }
        ("clock_time_get", 3) => {
            advance_clock(&mut code, |code| code.i64_const(CLOCK_STEP_NS));
            code.local_get(2).global_get(CLOCK).i64_store(double(0)).i32_const(0);
        }
        ("clock_res_get", 2) => {
            code.local_get(1).i64_const(CLOCK_STEP_NS).i64_store(double(0)).i32_const(0);
        }
        ("random_get", 2) => random(&mut code),
        ("fd_write", 4) => drop_output(&mut code, own),
        ("poll_oneoff", 4) => sleep(&mut code, own),
        ("fd_prestat_get", 2) => _ = code.i32_const(BAD_DESCRIPTOR),
        ("args_get" | "environ_get" | "sched_yield" | "fd_close", _) => _ = code.i32_const(0),
        ("proc_exit", _) => _ = code.unreachable(),
        _ => match signature.results() {
            [wasmparser::ValType::I32] => _ = code.i32_const(NOT_SUPPORTED),
            _ => _ = code.unreachable(),
        },
    }
    code.end();
    function
}

/// `random_get(start, length)`: fills the bytes with xorshift64.
fn random(code: &mut InstructionSink<'_>) {
    let (start, length) = (0, 1);
    code.block(BlockType::Empty).loop_(BlockType::Empty);
    code.local_get(length).i32_eqz().br_if(1);
    for (is_left, bits) in [(true, 13), (false, 7), (true, 17)] {
        code.global_get(RANDOM).global_get(RANDOM).i64_const(bits);
        _ = if is_left { code.i64_shl() } else { code.i64_shr_u() };
        code.i64_xor().global_set(RANDOM);
    }
    code.local_get(start).global_get(RANDOM).i64_store8(byte(0));
    code.local_get(start).i32_const(1).i32_add().local_set(start);
    code.local_get(length).i32_const(1).i32_sub().local_set(length);
    code.br(0).end().end().i32_const(0);
}

/// `fd_write(descriptor, pieces, count, written)`: reports that everything was written.
fn drop_output(code: &mut InstructionSink<'_>, own: u32) {
    let (pieces, count, written, sum) = (1, 2, 3, own);
    code.block(BlockType::Empty).loop_(BlockType::Empty);
    code.local_get(count).i32_eqz().br_if(1);
    code.local_get(sum).local_get(pieces).i32_load(word(4)).i32_add().local_set(sum);
    code.local_get(pieces).i32_const(8).i32_add().local_set(pieces);
    code.local_get(count).i32_const(1).i32_sub().local_set(count);
    code.br(0).end().end();
    code.local_get(written).local_get(sum).i32_store(word(0)).i32_const(0);
}

/// `poll_oneoff(subscriptions, events, count, happened)`: reports that all events happened at once. A sleep
/// moves the clock.
fn sleep(code: &mut InstructionSink<'_>, own: u32) {
    let (subscriptions, events, count, happened, done) = (0, 1, 2, 3, own);
    code.block(BlockType::Empty).loop_(BlockType::Empty);
    code.local_get(done).local_get(count).i32_ge_u().br_if(1);
    // The event: user data of the subscription, no error, its type.
    code.local_get(events).local_get(subscriptions).i64_load(double(0)).i64_store(double(0));
    code.local_get(events).i64_const(0).i64_store(double(8));
    code.local_get(events).i64_const(0).i64_store(double(16));
    code.local_get(events).i64_const(0).i64_store(double(24));
    code.local_get(events).local_get(subscriptions).i32_load8_u(byte(8)).i32_store8(byte(10));
    // Type 0 is a clock. Its timeout is at offset 24; bit 0 of the flags at offset 40 says that the timeout is
    // absolute.
    code.local_get(subscriptions).i32_load8_u(byte(8)).i32_eqz().if_(BlockType::Empty);
    code.local_get(subscriptions).i32_load8_u(byte(40)).if_(BlockType::Empty);
    code.local_get(subscriptions).i64_load(double(24)).global_get(CLOCK).i64_gt_u();
    code.if_(BlockType::Empty);
    code.local_get(subscriptions).i64_load(double(24)).global_set(CLOCK).end().else_();
    advance_clock(code, |code| code.local_get(subscriptions).i64_load(double(24)));
    code.end().end();
    code.local_get(subscriptions).i32_const(SUBSCRIPTION_BYTES).i32_add().local_set(subscriptions);
    code.local_get(events).i32_const(EVENT_BYTES).i32_add().local_set(events);
    code.local_get(done).i32_const(1).i32_add().local_set(done);
    code.br(0).end().end();
    code.local_get(happened).local_get(count).i32_store(word(0)).i32_const(0);
}

fn advance_clock<'c, 'm>(
    code: &'c mut InstructionSink<'m>,
    by: impl FnOnce(&'c mut InstructionSink<'m>) -> &'c mut InstructionSink<'m>,
) {
    by(code.global_get(CLOCK)).i64_add().global_set(CLOCK);
}

fn byte(offset: u64) -> MemArg {
    MemArg { offset, align: 0, memory_index: 0 }
}

/// The alignment is only a hint: 0 is valid for every address.
fn word(offset: u64) -> MemArg {
    byte(offset)
}

fn double(offset: u64) -> MemArg {
    byte(offset)
}

#[cfg(test)]
mod tests {
    use wasmtime::{Engine, Instance, Memory, Store, TypedFunc};

    use super::*;

    const I32: ValType = ValType::I32;

    /// A module with imports and nothing else, as a compiler may produce.
    fn core(imports: &[(&str, &[ValType], &[ValType])]) -> Vec<u8> {
        let (mut types, mut section) = (TypeSection::new(), ImportSection::new());
        for (index, (name, params, results)) in (0..).zip(imports) {
            types.ty().function(params.iter().copied(), results.iter().copied());
            section.import(MODULE, name, EntityType::Function(index));
        }
        let mut module = Module::new();
        module.section(&types).section(&section);
        module.finish()
    }

    /// A running adapter, with one page of memory.
    struct Running {
        store: Store<()>,
        memory: Memory,
        instance: Instance,
    }

    impl Running {
        fn new() -> Self {
            let four = &[I32; 4][..];
            let module = core(&[
                ("fd_write", four, &[I32]),
                ("random_get", &four[..2], &[I32]),
                ("clock_time_get", &[I32, ValType::I64, I32], &[I32]),
                ("poll_oneoff", four, &[I32]),
                ("environ_sizes_get", &four[..2], &[I32]),
                ("path_open", &four[..3], &[I32]),
                ("proc_exit", &four[..1], &[]),
            ]);
            let adapter = adapter(&module).unwrap().unwrap();
            let engine = Engine::default();
            let mut store = Store::new(&engine, ());
            let module = wasmtime::Module::new(&engine, adapter).unwrap();
            let memory = Memory::new(&mut store, wasmtime::MemoryType::new(1, None)).unwrap();
            let instance = Instance::new(&mut store, &module, &[memory.into()]).unwrap();
            Self { store, memory, instance }
        }

        fn call<P: wasmtime::WasmParams>(&mut self, name: &str, parameters: P) -> i32 {
            let function: TypedFunc<P, i32> =
                self.instance.get_typed_func(&mut self.store, name).unwrap();
            function.call(&mut self.store, parameters).unwrap()
        }

        fn write(&mut self, at: usize, bytes: &[u8]) {
            self.memory.write(&mut self.store, at, bytes).unwrap();
        }

        fn read<const N: usize>(&self, at: usize) -> [u8; N] {
            let mut bytes = [0; N];
            self.memory.read(&self.store, at, &mut bytes).unwrap();
            bytes
        }

        fn clock_ns(&mut self) -> u64 {
            assert_eq!(self.call("clock_time_get", (0, 0_i64, 64)), 0);
            u64::from_le_bytes(self.read(64))
        }
    }

    #[test]
    fn a_module_without_wasi_needs_no_adapter() {
        assert_eq!(adapter(b"\0asm\x01\0\0\0").unwrap(), None);
        assert!(adapter(b"\x7fELF").is_err());
    }

    #[test]
    fn output_is_taken_and_dropped() {
        let mut running = Running::new();
        let pieces = [100_u32, 7, 200, 0, 300, 35].map(u32::to_le_bytes).concat();
        running.write(16, &pieces);
        assert_eq!(running.call("fd_write", (1, 16, 3, 8)), 0);
        assert_eq!(u32::from_le_bytes(running.read(8)), 42);
    }

    #[test]
    fn random_numbers_are_the_same_in_each_instance() {
        let bytes = || {
            let mut running = Running::new();
            assert_eq!(running.call("random_get", (1, 33)), 0);
            let bytes: [u8; 35] = running.read(0);
            assert_eq!((bytes[0], bytes[34]), (0, 0), "only what was asked for is written");
            bytes
        };
        assert_eq!(bytes(), bytes());
        let distinct: std::collections::BTreeSet<u8> = bytes().into();
        assert!(distinct.len() > 25, "{distinct:?}");
    }

    #[test]
    fn the_clock_counts_and_sleep_moves_it() {
        let mut running = Running::new();
        let (first, second) = (running.clock_ns(), running.clock_ns());
        assert!(first < second);
        // Two clocks: one a second from now, one at a time in the past, which changes nothing.
        let subscription = |user: u64, timeout: u64, flags: u8| {
            let mut bytes = [0; 48];
            bytes[..8].copy_from_slice(&user.to_le_bytes());
            bytes[24..32].copy_from_slice(&timeout.to_le_bytes());
            bytes[40] = flags;
            bytes
        };
        running.write(1_000, &subscription(7, 1_000_000_000, 0));
        running.write(1_048, &subscription(8, 5, 1));
        assert_eq!(running.call("poll_oneoff", (1_000, 2_000, 2, 80)), 0);
        assert_eq!(u32::from_le_bytes(running.read(80)), 2);
        assert_eq!(u64::from_le_bytes(running.read(2_000)), 7);
        assert_eq!(u64::from_le_bytes(running.read(2_032)), 8);
        assert!((1_000_000_000..1_001_000_000).contains(&(running.clock_ns() - second)));
    }

    #[test]
    fn there_is_nothing_else() {
        let mut running = Running::new();
        running.write(8, &[9; 8]);
        assert_eq!(running.call("environ_sizes_get", (8, 12)), 0);
        assert_eq!(running.read(8), [0; 8]);
        assert_eq!(running.call("path_open", (3, 0, 0)), NOT_SUPPORTED);
        let exit: TypedFunc<i32, ()> =
            running.instance.get_typed_func(&mut running.store, "proc_exit").unwrap();
        assert!(exit.call(&mut running.store, 1).is_err(), "a trap");
    }
}
