//! Any command line: a line for each argument, the first one naming the command. See `src/cli/properties.rs`.
#![no_main]
#![allow(dead_code, reason = "the program's modules, of which only the flags are tried")]

#[path = "../../src/cli/mod.rs"]
mod cli;
#[path = "../../src/load/mod.rs"]
mod load;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| cli::properties::check_lines(bytes));
