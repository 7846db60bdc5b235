//! Any fault in what comes back to the load generator, in any pieces. See `src/load/properties.rs`.
#![no_main]
#![allow(dead_code, reason = "the program's modules, of which only the checker is tried")]

#[path = "../../src/cli/mod.rs"]
mod cli;
#[path = "../../src/load/mod.rs"]
mod load;

use libfuzzer_sys::fuzz_target;
use load::properties::{Case, Fault, check};

fuzz_target!(|input: (u64, u8, u8, u16, u16, u32, Option<(u8, u8)>, Vec<u16>)| {
    let (seed, connection, messages, least, span, at, fault, pieces) = input;
    let least = u64::from(least % 2000) + 1;
    check(&Case {
        seed,
        connection: u64::from(connection) + 1,
        messages: usize::from(messages % 8) + 1,
        least,
        most: least + u64::from(span % 2000),
        pieces: pieces.into_iter().map(usize::from).collect(),
        fault: fault.map(|(kind, byte)| {
            let fault = match kind % 4 {
                0 => Fault::Change(byte),
                1 => Fault::Drop,
                2 => Fault::Repeat,
                _ => Fault::Insert(byte),
            };
            (at as usize, fault)
        }),
    });
});
